"""Checking a data set file by file: what `scripts/data/verify_data.py` reports. It does not stop at the first fault."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .duplicates import Fingerprint, fingerprint
from .listing import Item
from .masks import UnknownIds
from .notes import Notes
from .picture_files import open_undecoded
from .proposals import proposal_for_ids
from .specs import DataError, DatasetSpec
from .transforms import (
    check_sizes,
    read_header,
    read_image,
    read_instances,
    read_label,
    read_orientation,
    sampling_geometry,
)


@dataclass
class ItemReport:
    """What one item's files hold. `pixels`: (class, count) pairs; sizes are (width, height)."""

    name: str
    problems: list[str] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    modes: tuple[str, ...] = ()  # Pillow's modes of photograph, label map and instance map
    turned: bool = False  # the photograph has an orientation tag
    pixels: list[tuple[int, int]] = field(default_factory=list)
    stored: dict[int, int] = field(default_factory=dict)  # pixels by stored id, of maps of ids
    unknown_ids: bool = False
    instances: int = 0
    largest_instance: int = 0
    notes: Notes = field(default_factory=Notes)
    fingerprint: Fingerprint | None = None  # of the photograph


def check_headers(spec: DatasetSpec, item: Item) -> ItemReport:
    """Sizes and modes from the files' headers alone, which takes a fraction of a millisecond."""
    report = ItemReport(item.name)
    sizes, modes = {}, []
    for kind, path in (("photograph", item.image), ("label map", item.label), ("instance map", item.instance)):
        if path is None:
            continue
        try:
            with open_undecoded(path, kind, spec.max_pixels) as picture:
                header = read_header(picture)
                orientation = read_orientation(picture) if kind == "photograph" else 1
            sizes[kind] = header.size
            modes.append(header.mode)
            if orientation != 1:
                report.turned = True
                if spec.exif == "apply" and 5 <= orientation <= 8:
                    sizes[kind] = header.size[::-1]
        except DataError as error:
            report.problems.append(str(error))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            report.problems.append(f"the {kind} {path} cannot be read ({error})")
    for kind, path, other, other_path, scale in (
        ("photograph", item.image, "label map", item.label, spec.label_scale),
        ("label map", item.label, "instance map", item.instance, False),
    ):
        if kind in sizes and other in sizes:
            try:
                check_sizes(spec, path, sizes[kind], other_path, sizes[other], scale)
            except DataError as error:
                report.problems.append(str(error))
    report.modes = tuple(modes)
    report.image_size = sizes.get("photograph")
    return report


def check_pixels(spec: DatasetSpec, item: Item) -> ItemReport:
    """Everything that needs the files decoded: damage, ids, colours, transparency, instance ids."""
    report = ItemReport(item.name)
    for step in (_check_photograph, _check_label, _check_instances):
        try:
            step(spec, item, report)
        except DataError as error:
            report.problems.append(str(error))
    return report


def _check_photograph(spec: DatasetSpec, item: Item, report: ItemReport) -> None:
    photograph = read_image(item.image, spec, report.notes)
    report.image_size, report.fingerprint = photograph.size, fingerprint(photograph)


def _check_label(spec: DatasetSpec, item: Item, report: ItemReport) -> None:
    try:
        label, table = read_label(item.label, spec, report.notes)
    except UnknownIds as error:
        report.stored, report.unknown_ids = error.counts, True
        raise
    if label.mode == "L":
        counts = np.asarray(label.histogram())
    else:
        counts = np.bincount(np.asarray(label).ravel(), minlength=len(table))
    stored = np.flatnonzero(counts)
    pixels = np.bincount(table[stored], weights=counts[stored], minlength=spec.num_classes)
    report.pixels = [(int(i), int(pixels[i])) for i in np.flatnonzero(pixels)]
    report.stored = dict(zip(stored.tolist(), counts[stored].tolist(), strict=True))


def _check_instances(spec: DatasetSpec, item: Item, report: ItemReport) -> None:
    if item.instance is not None:
        ids = np.unique(np.asarray(read_instances(item.instance, report.notes, spec.max_pixels)))
        report.instances, report.largest_instance = len(ids), int(ids.max())


@dataclass
class SplitReport:
    """The findings of a split, added up. `pixels` and `images` count per class, [num_classes]."""

    items: int
    problems: list[str]
    notes: list[str]
    pixels: np.ndarray
    images: np.ndarray
    sizes: Counter
    modes: Counter
    instances: int = 0
    largest_instance: int = 0
    turned: int = 0
    notes_of_files: Notes = field(default_factory=Notes)
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)  # of photographs, by name


def summarize(
    spec: DatasetSpec, items: list[Item], headers: list[ItemReport], pixels: list[ItemReport], image_size: int
) -> SplitReport:
    """Adds the items' reports up, and judges what only all of them together show."""
    report = SplitReport(
        len(items),
        [p for r in headers for p in r.problems] + [p for r in pixels for p in r.problems],
        [],
        np.zeros(spec.num_classes, dtype=np.int64),
        np.zeros(spec.num_classes, dtype=np.int64),
        Counter(r.image_size for r in headers if r.image_size),
        Counter(r.modes for r in headers if not r.problems),
    )
    for item in pixels:
        for class_id, count in item.pixels:
            report.pixels[class_id] += count
            report.images[class_id] += 1
        report.instances += item.instances
        report.largest_instance = max(report.largest_instance, item.largest_instance)
        report.notes_of_files.merge(item.notes)
        if item.fingerprint is not None:
            report.fingerprints[item.name] = item.fingerprint
    report.notes += report.notes_of_files.lines()
    if any(item.unknown_ids for item in pixels):
        report.problems = _ids_of_all(spec, pixels) + report.problems
    report.turned = sum(r.turned for r in headers)
    if report.turned and spec.exif == "ignore":
        report.notes.append(f"{report.turned} photographs have an EXIF orientation tag, which is ignored")
    if spec.crop == "keep_aspect":
        report.problems += _different_shapes(spec, headers, image_size)
    if spec.name == "cityscapes" and items and items[0].instance and report.largest_instance < 1000:
        report.problems.append(
            f"the largest instance id is {report.largest_instance}, but Cityscapes' are class * 1000 + number in 16"
            " bits: these were cut to 8 bits; restore the instanceIds"
        )
    absent = [spec.class_names[i] for i in np.flatnonzero(report.images == 0)]
    if absent:
        shown = ", ".join(absent[:8]) + (f", ... ({len(absent)} in all)" if len(absent) > 8 else "")
        report.notes.append(f"classes in no label map: {shown}")
    return report


def _ids_of_all(spec: DatasetSpec, reports: list[ItemReport]) -> list[str]:
    """What would make all ids of all label maps classes, where one of them alone does not say it."""
    counts: Counter = Counter()
    for report in reports:
        counts.update(report.stored)
    remedy = proposal_for_ids(counts, spec) if spec.name == "custom" else ""
    if not remedy:
        return []
    return [f"all label maps together hold the ids {spec.describe_ids(np.array(sorted(counts)))}: {remedy}"]


def _different_shapes(spec: DatasetSpec, headers: list[ItemReport], image_size: int) -> list[str]:
    """With the aspect kept, all photographs must come to one shape."""
    shapes: dict[tuple[int, int], list[str]] = {}
    for report in headers:
        if report.image_size:
            shapes.setdefault(sampling_geometry(report.image_size, image_size, spec.crop).size, []).append(report.name)
    usual = max(shapes, key=lambda size: len(shapes[size]), default=None)
    return [
        f"{len(names)} photographs ({names[0]}, ...) become {size[0]} x {size[1]} at image size {image_size}, where"
        f" most become {usual[0]} x {usual[1]}; with the aspect kept, all must have one aspect"
        for size, names in shapes.items()
        if size != usual
    ]
