"""When a score is low: would the predicted ids, shifted or in another order, mean the labels' classes?"""

from __future__ import annotations

import json

import torch
from label_maps import REMAPS
from scipy.optimize import linear_sum_assignment

LOW = 10.0  # percent of mIoU, below which no segmenter of photographs is at work
MOST_CLASSES = 1024  # among which orders are compared, in seconds
_CLEAR = 2.0, 10.0  # an order counts as the right one from so many times the score on, and so many percent more
_NEARLY = 0.9  # of the best order's score, at which one that can be named is preferred


def class_ious(confusion: torch.Tensor) -> torch.Tensor:
    """IoU in percent [C, C] of each class of the labels (row) with each of the predictions, from a confusion matrix
    [C, C + 1]."""
    confusion = confusion.double()
    labelled, predicted = confusion.sum(dim=1, keepdim=True), confusion[:, :-1].sum(dim=0, keepdim=True)
    hits = confusion[:, :-1]
    return torch.nan_to_num(100 * hits / (labelled + predicted - hits))


def order_advice(confusion: torch.Tensor) -> str:
    """Which shift, shipped table or permutation of the predicted ids would score best, where one scores far better
    than the ids as they are; empty where none does, or of more than `MOST_CLASSES`.

    confusion: pixels by label and prediction, [C, C + 1].
    """
    count = len(confusion)
    if count > MOST_CLASSES:
        return ""
    ious, present = class_ious(confusion), confusion.sum(dim=1) > 0
    classes = torch.arange(count)

    def mean(predicted: torch.Tensor) -> float:
        """mIoU where class i of the labels is id predicted[i] of the predictions (outside: none)."""
        inside = (predicted >= 0) & (predicted < count)
        found = torch.where(inside, ious[classes, predicted.clamp(0, count - 1)], 0.0)
        return found[present].mean().item()

    rows, columns = linear_sum_assignment(ious.numpy(), maximize=True)
    best_order = torch.empty(count, dtype=torch.long)
    best_order[torch.from_numpy(rows)] = torch.from_numpy(columns)
    now, best = mean(classes), mean(best_order)
    if best < max(_CLEAR[0] * now, now + _CLEAR[1]):
        return ""
    shifts = {shift: mean(classes + shift) for shift in range(1 - count, count) if shift}
    shift = max(shifts, key=lambda step: (shifts[step], -abs(step)))
    if shifts[shift] >= _NEARLY * best:
        table = {str(i + shift): i for i in range(count) if 0 <= i + shift < count}
        what = f"predicted ids that are {abs(shift)} too {'high' if shift > 0 else 'low'} ({_shown(table)})"
        return f"{what} would score {shifts[shift]:.1f}; write them to a file, and give --remap_predictions FILE"
    for name, mapping in REMAPS.items():
        if set(mapping.values()) == set(range(count)) and max(mapping) < count:
            named = torch.tensor([key for key, _ in sorted(mapping.items(), key=lambda entry: entry[1])])
            if len(named) == count and mean(named) >= _NEARLY * best:
                return (
                    f"the order {name} of the predicted ids would score {mean(named):.1f}: --remap_predictions {name}"
                )
    table = {str(int(best_order[i])): i for i in range(count) if present[i]}
    return (
        f"in the order {_shown(table)} (predicted id to class) they would score {best:.1f}; if that is what they mean,"
        " write it to a file, and give --remap_predictions FILE"
    )


def _shown(table: dict[str, int], most: int = 40) -> str:
    part = dict(sorted(table.items(), key=lambda entry: int(entry[0]))[:most])
    return json.dumps(part) + (f" and {len(table) - most} more" if len(table) > most else "")
