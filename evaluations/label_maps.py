"""Label maps: stored ids and the classes they mean, and scores of predicted maps against given ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import EvaluationError
from PIL import Image
from result_folders import raw_mode, shown

IDS = 65536  # label maps have 8 or 16 bits
MOST_CLASSES = 8192  # their confusion matrix takes half a gigabyte
IGNORED = -1
FORBIDDEN = -2

# Label ids to the classes that are scored; ids left out are ignored. Cityscapes: its 34 ids to its 19 train ids.
# ADE20K: the network's ids, which sampling writes to labels/ (150 is unlabelled), and those of the annotations.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
REMAPS = {
    "cityscapes": {label_id: index for index, label_id in enumerate(CITYSCAPES_IDS)},
    "ade20k": {label_id: label_id for label_id in range(150)},
    "ade20k-annotations": {label_id: label_id - 1 for label_id in range(1, 151)},
    # CelebAMask-HQ: ids of the face parser that most code uses (face-parsing.PyTorch) to those of the data's authors.
    "celeba-face-parser": dict(enumerate((0, 1, 6, 7, 4, 5, 3, 8, 9, 15, 2, 10, 11, 12, 17, 16, 18, 13, 14))),
}

# What gives ids back as they were stored, as Pillow names formats and a TIFF's compression (the latter's beginnings).
LOSSLESS = ("PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "PCX", "SGI")
LOSSLESS_TIFF = ("raw", "packbits", "group3", "group4", "lzma", "zstd", "tiff_raw", "tiff_lzw", "tiff_adobe_deflate",
                 "tiff_deflate", "tiff_ccitt")  # fmt: skip


@dataclass(frozen=True)
class Classes:
    """The classes that are scored, and tables [IDS] from stored ids to them; IGNORED and FORBIDDEN are no classes."""

    count: int
    of_labels: torch.Tensor
    of_predictions: torch.Tensor


def read_remap(name: str, flag: str = "--remap") -> dict[int, int] | None:
    """The mapping of stored ids to classes that a flag names; None for none."""
    if name == "none":
        return None
    if name in REMAPS:
        return REMAPS[name]
    try:
        # An object as its pairs: a dict would keep the last of an id that stands twice.
        pairs = json.loads(Path(name).read_text("utf-8"), object_pairs_hook=tuple)
        if not isinstance(pairs, tuple):
            raise TypeError("it is no object")
        mapping = {int(label_id): int(index) for label_id, index in pairs}
        if len(mapping) < len(pairs):
            raise ValueError("an id stands twice")
    except OSError as error:
        raise EvaluationError(f"{flag} {name}: not none, {', '.join(REMAPS)}, nor a readable file") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise EvaluationError(f'{flag} {name}: expected JSON such as {{"7": 0, "8": 1}} ({error})') from error
    outside = [(label_id, index) for label_id, index in mapping.items() if not 0 <= label_id < IDS or index < 0]
    if outside or not mapping:
        raise EvaluationError(f"{flag} {name}: ids must be 0..{IDS - 1} and classes 0 or more; found {shown(outside)}")
    return mapping


def make_classes(
    remap: str, num_classes: int | None, ignore_ids: tuple[int, ...] | None, remap_predictions: bool | str
) -> Classes:
    """The tables from stored ids to classes. Raises EvaluationError if the flags do not fit together.

    Predictions are classes already unless `remap_predictions`, which is True for `remap` or names a mapping of their
    own; among classes only an ignored id that is no class is void. ignore_ids: None for 255, where it is no class.
    """
    mapping = read_remap(remap)
    count = num_classes or (max(mapping.values()) + 1 if mapping else None)
    if count is None:
        raise EvaluationError("--num_classes is needed with --remap none")
    if count > MOST_CLASSES:
        raise EvaluationError(f"--num_classes {count}: a score has at most {MOST_CLASSES} classes")
    if ignore_ids is None:
        ignore_ids = default_ignored(count)
    outside = [label_id for label_id in ignore_ids if not 0 <= label_id < IDS]
    if outside:
        raise EvaluationError(f"--ignore_ids {outside[0]}: label maps hold ids 0..{IDS - 1}")
    identity = torch.full((IDS,), FORBIDDEN)
    identity[:count] = torch.arange(count)
    if mapping is None:
        labels = identity.clone()
    else:
        if max(mapping.values()) >= count:
            raise EvaluationError(f"--remap {remap} has class {max(mapping.values())} of {count} classes")
        labels = torch.full((IDS,), IGNORED)
        labels[list(mapping)] = torch.tensor(list(mapping.values()))
    ignored = torch.tensor(ignore_ids, dtype=torch.long)
    labels[ignored] = IGNORED
    if isinstance(remap_predictions, str):
        own = read_remap(remap_predictions, "--remap_predictions") or {}
        if max(own.values(), default=0) >= count:
            raise EvaluationError(f"--remap_predictions {remap_predictions}: a class is {max(own.values())} of {count}")
        predictions = torch.full((IDS,), IGNORED)
        predictions[list(own)] = torch.tensor(list(own.values()))
        return Classes(count, labels, predictions)
    if mapping is None or remap_predictions:
        return Classes(count, labels, labels)
    identity[ignored[ignored >= count]] = IGNORED
    return Classes(count, labels, identity)


def default_ignored(count: int) -> tuple[int, ...]:
    """The stored ids that are not scored where none are named: 255, where it is no class."""
    return (255,) if count <= 255 else ()


def lossy_format(image: Image.Image) -> str | None:
    """The decoder's name of a format that may change ids; None for one that gives them back as they were stored."""
    if image.format not in LOSSLESS:
        return image.format or "an unknown format"
    compression = str(image.info.get("compression", "unknown"))
    if image.format == "TIFF" and not compression.startswith(LOSSLESS_TIFF):
        return f"TIFF with compression {compression}"
    return None


def load_label_map(path: Path) -> torch.Tensor:
    """A label map's ids [H, W], bytes or, of 16 bits, integers.

    Channels that are all equal, beside an opaque one at most, count as one. Raises ValueError for other pictures, and
    for formats that may change ids.
    """
    with Image.open(path) as image:
        if (lossy := lossy_format(image)) is not None:
            raise ValueError(f"stored as {lossy}, which may change ids; save the original as PNG")
        if image.mode.startswith("I"):
            return torch.from_numpy(np.array(image).astype(np.int32))
        if image.mode in ("RGB", "RGBA", "LA") and ";16" not in raw_mode(image):
            channels = np.array(image)
            colors = channels[..., :3] if image.mode != "LA" else channels[..., :1]
            if (colors == colors[..., :1]).all() and (image.mode == "RGB" or (channels[..., -1] == 255).all()):
                return torch.from_numpy(colors[..., 0].copy())
        if image.mode not in ("L", "P"):
            raise ValueError(f"mode {image.mode}, but a label map has one channel with an id per pixel")
        if image.mode == "L" and (stored := raw_mode(image)).startswith(("L;2", "L;4")):
            raise ValueError(
                f"grey with {stored[2]} bits per pixel, which readers scale to brightness, so that its ids are lost; "
                "save it with 8 bits, or as a palette PNG"
            )
        return torch.from_numpy(np.array(image))


def check_ids(ids: torch.Tensor, table: torch.Tensor, count: int, path: Path) -> None:
    """Raises EvaluationError if the map holds an id that the table forbids."""
    wrong = [label_id for label_id in ids.unique().tolist() if not 0 <= label_id < IDS or table[label_id] == FORBIDDEN]
    if wrong:
        raise EvaluationError(
            f"{path}: holds id {shown(wrong)}, but there are {count} classes, 0..{count - 1}; see --num_classes, "
            "--ignore_ids (ids not scored) and --remap (ids to classes, of predictions too: --remap_predictions True)"
        )


def confusion_matrix(labels: torch.Tensor, predictions: torch.Tensor, count: int) -> torch.Tensor:
    """Pixels [count, count + 1] by class of the label (row) and prediction (column; the last is none of the classes).

    `labels` and `predictions` are classes or IGNORED; pixels with an ignored label are not counted.
    """
    counted = labels >= 0
    labels, predictions = labels[counted], predictions[counted]
    predictions = torch.where(predictions >= 0, predictions, count)
    pairs = torch.bincount(labels * (count + 1) + predictions, minlength=count * (count + 1))
    return pairs.view(count, count + 1)


def scores_of(confusion: torch.Tensor) -> dict[str, Any]:
    """Scores in percent from a confusion matrix [C, C + 1].

    A class in neither labels nor predictions has no IoU (None) and does not count in the mean; one that is predicted
    though no label has it counts with 0.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    labelled = confusion.sum(dim=1)
    union = labelled + confusion[:, :-1].sum(dim=0) - hits
    iou = 100 * hits / union  # NaN where the union is empty
    present = union > 0
    return {
        "miou": iou[present].mean().item(),
        "pixel_accuracy": (100 * hits.sum() / labelled.sum()).item(),
        "frequency_weighted_iou": ((labelled * iou)[present].sum() / labelled.sum()).item(),
        "class_iou": [
            value if is_there else None for value, is_there in zip(iou.tolist(), present.tolist(), strict=True)
        ],
    }
