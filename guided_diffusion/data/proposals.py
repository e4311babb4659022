"""From what is wrong with values or names to what would be right: settings for dataset.json, ready to paste."""

import itertools
import json
import re
from collections.abc import Collection, Mapping

from .specs import DatasetSpec

_UNLABELLED = (255, 65535)  # ids that stand for "no class" in most files that have them
_PEAK = 0.02  # a value that so large a share of the pixels has is no accident of an edge
_TRIED = 20  # names whose ends are compared
_LEAST_GAP = 8  # between the values of classes that softened edges can be told from
_GENERIC = 'raise --num_classes, or in dataset.json name an "ignore_id" or a "remap"'


def remedy_for_ids(counts: Mapping[int, int], spec: DatasetSpec) -> str:
    """What to do about label maps whose ids are no classes. `counts`: pixels by stored id of one map, or of several."""
    if spec.name != "custom":
        return f"check --num_classes and that this is data for dataset_mode {spec.name}"
    return proposal_for_ids(counts, spec) or _GENERIC


def proposal_for_ids(counts: Mapping[int, int], spec: DatasetSpec) -> str:
    """The entry of dataset.json that makes all these ids classes; empty where none can be told from them."""
    classes = spec.num_classes - (spec.ignore_class is not None)
    ids = sorted(counts)
    if (order := _spread_ids(ids, classes)) is not None:
        kept = {stored: network for stored, network in spec.remap.items() if network != spec.ignore_class}
        remap = {str(i): k for i, k in sorted({**kept, **order}.items()) if i != k}
        known = ", ".join(f"{i} becomes class {order[i]}" for i in ids)
        return f'put "remap": {json.dumps(remap)} into dataset.json, if that is what they mean ({known})'
    foreign = [i for i in ids if not 0 <= i < classes and i not in spec.remap]
    if len(foreign) == 1 and foreign[0] in _UNLABELLED and spec.ignore_class is None:
        return (
            f'if {foreign[0]} means unlabelled, put "ignore_id": {foreign[0]} into dataset.json, beside "classes": it'
            f" becomes one more class, so that --num_classes is {classes + 1}"
        )
    return _softened(counts, spec, classes)


def _spread_ids(ids: list[int], classes: int) -> dict[int, int] | None:
    """Stored id -> class where the ids are grey levels spread over 0 to 255 (0, 128, 255 for three classes), or as many
    as there are classes; None where they are neither."""
    if not 2 <= classes <= 256 or ids == list(range(classes)):
        return None
    levels = {}
    for i in ids:
        level = round(i * (classes - 1) / 255)
        if abs(level * 255 / (classes - 1) - i) < 1 and level < classes:
            levels[i] = level
    between = any(0 < level < classes - 1 for level in levels.values())  # 0 and 255 alone may be a class and none
    if len(levels) == len(ids) == len(set(levels.values())) and (len(ids) == classes or (classes <= 4 and between)):
        return levels
    return {i: k for k, i in enumerate(ids)} if len(ids) == classes and ids[0] >= 0 else None


def _softened(counts: Mapping[int, int], spec: DatasetSpec, classes: int) -> str:
    """Says so where a few values far apart have most pixels, and many values between them the rest."""
    total = sum(counts.values())
    peaks = sorted(i for i, pixels in counts.items() if pixels >= _PEAK * total)
    odd = total - sum(counts[i] for i in peaks)
    gap = min((b - a for a, b in itertools.pairwise(peaks)), default=0)
    if not 2 <= len(peaks) <= classes or len(counts) < len(peaks) + 5 or gap < _LEAST_GAP or max(counts) > 255:
        return ""
    entries = [{"name": spec.class_names[k], "color": [value] * 3} for k, value in enumerate(peaks)]
    return (
        f"{_share(odd, total)} of the pixels have one of {len(counts) - len(peaks)} other values than"
        f" {', '.join(map(str, peaks))}, as softened edges or JPEG noise leave them: save the mask without smoothing,"
        ' or let the nearest value count, by "label_encoding": "colors", "tolerance":'
        f' {int(gap * 3**0.5 / 2)}, "classes": {json.dumps(entries)} in dataset.json'
    )


def suffixes_for(spec: DatasetSpec, first: str, stems: Collection[str], second: str, others: Collection[str]) -> str:
    """Where files do not pair because the names of one kind, or of both, end in something: the lines of dataset.json
    that say so, after which all files of one of the two have partners. Empty where there are none.

    first, second: the kinds, as dataset.json calls them (image, label, instance). stems: names without extension, and
    without the suffixes that are known already.
    """
    if spec.name != "custom" or not stems or not others:
        return ""
    known = {kind: getattr(spec.layout, f"{kind}_suffix") for kind in (first, second)}
    lines = [
        ", ".join(
            f'"{kind}_suffix": {json.dumps(end + known[kind])}'
            for kind, end in zip((first, second), ends, strict=True)
            if end
        )
        for ends in sorted(_pairing_ends(set(stems), set(others)))
    ]
    if not lines:
        return ""
    which = "the line" if len(lines) == 1 else "one of the lines"
    return f"; their names pair with {which} {' or '.join(lines)} in dataset.json"


def _pairing_ends(stems: set[str], others: set[str]) -> set[tuple[str, str]]:
    """The pairs of ends without which all names of the smaller set, at least, stand in the other one, too."""
    found, ordered = set(), sorted(stems)
    for sample in {ordered[0], ordered[len(ordered) // 2], ordered[-1]}:  # one of them may lack its partner
        for common in (_common, _common_words):
            shared = {other: len(common(sample, other)) for other in others}
            longest = max(shared.values())
            nearest = sorted((other for other in others if longest and shared[other] == longest), key=len)
            found |= {(sample[longest:], other[longest:]) for other in nearest[:_TRIED]}
    return _shortest({ends for ends in found if _pair(stems, others, *ends)})


def _common(one: str, other: str) -> str:
    """What two names begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _common_words(one: str, other: str) -> str:
    """The same, up to a mark: 01 of 01_left and 01_label."""
    return re.sub(r"[_\-. ]+[^_\-. ]*$", "", _common(one, other))


def _pair(stems: set[str], others: set[str], end: str, other_end: str) -> bool:
    if not all(stem.endswith(end) for stem in stems):
        return False
    left = {stem[: len(stem) - len(end)] for stem in stems}
    right = {stem[: len(stem) - len(other_end)] for stem in others if stem.endswith(other_end)}
    return (
        bool(left & right)
        and "" not in left | right
        and (left <= right or (right <= left and len(right) == len(others)))
    )


def _shortest(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those with an end for one kind only, where there are any; else those that begin with a mark, as _image does."""
    single = {ends for ends in found if "" in ends}
    marked = {ends for ends in found if all(end[0] in "_-. " for end in ends if end)}
    return single or marked or found


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.2g} %"
