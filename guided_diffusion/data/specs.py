"""What each data set is: one frozen record per mode, with its classes, colours, label ids and folder layout.

The facts that are long (class names, colours) lie in `palettes/*.csv`; what differs from data set to data set lies
here, so that the loader, the pictures and the checks hold no special case for any of them.
"""

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import blobfile
import numpy as np

from .dataset_json import (
    SUFFIXES,
    UNLABELLED,
    check_names,
    checked,
    ignored_class,
    json_classes,
    json_remap,
    read_dataset_json,
    read_json,
)
from .errors import DataError, MissingSplitError

__all__ = [
    "DATASET_MODES",
    "SPLITS",
    "DataError",
    "DatasetSpec",
    "FolderLayout",
    "MissingSplitError",
    "check_address",
    "distinct_colors",
    "get_spec",
    "json_classes",
    "read_classes",
    "read_dataset_json",
    "with_num_classes",
]

DATASET_MODES = ("ade20k", "cityscapes", "celeba", "coco", "custom")
SPLITS = ("train", "val", "test")
_MAX_CLASSES = 32767  # what 16 bits with a sign hold
_PALETTES = Path(__file__).parent / "palettes"
_EVALUATION = {"val": ("val", "validation", "test"), "test": ("test", "val", "validation")}


def check_address(path: str | os.PathLike) -> None:
    """Raises DataError where `path` is an address of a kind that cannot be read."""
    text = os.fspath(path)
    if "://" not in text and not text.startswith(("gs:/", "az:/", "s3:/")):
        return
    if not re.match(r"(gs|az)://[^/]+|https://[^/]+\.blob\.core\.windows\.net/", text):
        raise DataError(
            f"{text} cannot be read: a data set is a local folder, or in a bucket gs://BUCKET/..., az://ACCOUNT/... or"
            " https://ACCOUNT.blob.core.windows.net/...; copy it to a local folder"
        )


@dataclass(frozen=True)
class FolderLayout:
    """Where photographs, label maps and instance maps lie: folders with `{split}`, and the ends of the file stems."""

    images: str
    labels: str
    instances: str | None = None
    image_suffix: str = ""
    label_suffix: str = ""
    instance_suffix: str = ""
    nested: bool = False  # one more level of folders below (Cityscapes' cities)
    splits: Mapping[str, tuple[str, ...]] = field(  # split -> names of its folder, the first that exists is taken
        default_factory=lambda: {"train": ("train", "training"), **_EVALUATION}
    )


@dataclass(frozen=True, eq=False)
class DatasetSpec:
    """All that the loader, the pictures and the checks know about a data set.

    `palette` is uint8 [num_classes, 3]. `remap` maps ids in the files to ids of the network; ids it does not name
    stay as they are where `keeps_other_ids` is set and are errors otherwise. `instances`: "none", "files" (maps of
    their own), "optional" (files where their folder exists) or "labels" (the label map serves, as for faces). `crop`:
    "square" or "keep_aspect" (short side to the image size, whole image). `label_colors` [classes, 3]: set where
    label maps are RGB images in these colours rather than ids. `exif`: what a photograph's orientation tag does,
    "ignore", "apply" or "refuse".
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    palette: np.ndarray
    layout: FolderLayout
    remap: Mapping[int, int] = field(default_factory=dict)
    keeps_other_ids: bool = True
    ignore_class: int | None = None  # the network's id for unlabelled pixels
    instances: str = "none"
    crop: str = "square"
    label_colors: np.ndarray | None = None
    palette_layouts: bool = False  # label maps of ids may be pictures in the palette's colours as well
    color_tolerance: int = 0  # how far a pixel's colour may be from its class's
    segments_files: tuple[str, ...] = ()  # JSON files of the segments, where label maps are panoptic maps
    label_scale: bool = False  # labels may be smaller or larger than their photograph, of the same aspect
    grey: bool = False
    exif: str = "ignore"
    icc: str = "ignore"  # colour profiles of photographs: "convert" (to sRGB) or "ignore"
    max_pixels: int | None = None  # of a picture file; None: as many as Pillow opens
    preparation: str = ""  # the end of a message about files that are missing: what makes them

    @property
    def label_content(self) -> str:
        """What label maps hold: "ids", "colors" (of classes), "nearby colors", "segments" (of panoptic maps), or
        "ids or colors" (of the palette)."""
        if self.label_colors is not None:
            return "nearby colors" if self.color_tolerance else "colors"
        if self.segments_files:
            return "segments"
        return "ids or colors" if self.palette_layouts else "ids"

    def lookup_table(self, size: int) -> np.ndarray:
        """int32 [size]: the network's id for each id in a file, -1 where that id is not allowed."""
        table = np.arange(size, dtype=np.int32) if self.keeps_other_ids else np.full(size, -1, dtype=np.int32)
        for stored, network in self.remap.items():
            if stored < size:
                table[stored] = network
        # A class that ignore_id adds is not one that files know: an id like its own is out of range in them.
        if self.name == "custom" and self.remap and self.ignore_class not in (None, *self.remap):
            table[self.ignore_class : self.ignore_class + 1] = -1
        table[table >= self.num_classes] = -1
        return table

    def describe_ids(self, ids: np.ndarray, limit: int = 10) -> str:
        """Ids as a reader wants to see them in a message: at most `limit` of them."""
        shown = ", ".join(str(int(i)) for i in ids[:limit])
        return shown + (f", ... ({len(ids)} in all)" if len(ids) > limit else "")


def distinct_colors(count: int, avoid: np.ndarray | None = None) -> np.ndarray:
    """`count` colours far from each other and from `avoid`, uint8 [count, 3]; the same for the same arguments.

    Farthest-point choice in the OKLab space (B. Ottosson, 2020), where distance is close to perceived difference, among
    a regular grid of RGB colours that are neither nearly black nor nearly white nor glaring.
    """
    steps = np.linspace(0, 255, 14).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 0.32) & (lab[:, 0] < 0.93) & (chroma < (0.17 if count <= 40 else 0.23))
    candidates, lab = candidates[usable], lab[usable]
    taken = np.zeros((1, 3)) if avoid is None or len(avoid) == 0 else np.asarray(avoid, dtype=np.float64)
    distance = ((lab[:, None] - _oklab(taken)[None]) ** 2).sum(-1).min(1)
    chosen = np.zeros((count, 3), dtype=np.uint8)
    for i in range(count):
        best = int(distance.argmax())
        chosen[i] = candidates[best]
        distance = np.minimum(distance, ((lab - lab[best]) ** 2).sum(-1))
    return chosen


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [N, 3] in 0..255 to OKLab [N, 3]."""
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


def read_classes(name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and palette (uint8 [num_classes, 3]) of the data file `palettes/NAME.csv`."""
    with open(_PALETTES / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    palette = np.array([[int(row[c]) for c in ("red", "green", "blue")] for row in rows], dtype=np.uint8)
    return tuple(row["name"] for row in rows), palette


def _benchmark(mode: str) -> DatasetSpec:
    names, palette = read_classes(mode)
    known = {"name": mode, "num_classes": len(names), "class_names": names, "palette": palette}
    if mode == "ade20k":  # SceneParsing: 1..150 are classes, 0 is unlabelled
        layout = FolderLayout("images/{split}", "annotations/{split}")
        remap = {0: 150, **{i: i - 1 for i in range(1, 151)}}
        return DatasetSpec(**known, layout=layout, remap=remap, keeps_other_ids=False, ignore_class=150)
    if mode == "cityscapes":  # the test split's labels are withheld, so that val is the only one to evaluate on
        layout = FolderLayout(
            "leftImg8bit/{split}",
            "gtFine/{split}",
            "gtFine/{split}",
            "_leftImg8bit",
            "_gtFine_labelIds",
            "_gtFine_instanceIds",
            nested=True,
            splits={"train": ("train",), "val": ("val",), "test": ("val",)},
        )
        return DatasetSpec(
            **known,
            layout=layout,
            ignore_class=0,
            instances="files",
            crop="keep_aspect",
            preparation="; scripts/data/prepare_cityscapes.py makes labelIds and instanceIds from the polygons",
        )
    if mode == "celeba":  # photographs of 1024 x 1024 with label maps of 512 x 512
        layout = FolderLayout("{split}/images", "{split}/labels")
        return DatasetSpec(
            **known,
            layout=layout,
            instances="labels",
            label_scale=True,
            preparation="; scripts/data/prepare_celebamask.py makes it from the published archive",
        )
    layout = FolderLayout("{split}_img", "{split}_label", "{split}_inst")
    return DatasetSpec(
        **known,
        layout=layout,
        remap={255: 182},
        ignore_class=182,
        instances="files",
        preparation="; scripts/data/prepare_cocostuff.py makes it from the published archives",
    )


def get_spec(
    dataset_mode: str,
    data_dir: str | os.PathLike | None = None,
    num_classes: int | None = None,
    dataset_json: dict | None = None,
) -> DatasetSpec:
    """The record of a data set.

    dataset_mode: one of `DATASET_MODES`. data_dir: for "custom", where an optional `dataset.json` lies. num_classes:
    the network's; more than the data set has is fine (further classes get generic names and colours), fewer leaves
    the surplus ids to be found in the files. Needed for "custom" without class names in `dataset.json`. dataset_json:
    the content of that file, in place of reading it (what a training run recorded). Raises DataError where the mode is
    unknown, `num_classes` is missing, or `dataset.json` is wrong.
    """
    if dataset_mode not in DATASET_MODES:
        raise DataError(f"dataset_mode {dataset_mode!r} is unknown; the modes are {', '.join(DATASET_MODES)}")
    if num_classes is not None and not 1 <= num_classes <= _MAX_CLASSES:
        raise DataError(f"num_classes is {num_classes}; it must lie between 1 and {_MAX_CLASSES}")
    if data_dir is not None:
        check_address(data_dir)
    if dataset_mode != "custom":
        return with_num_classes(_benchmark(dataset_mode), num_classes)
    return _custom(data_dir, num_classes, dataset_json)


def with_num_classes(spec: DatasetSpec, num_classes: int | None) -> DatasetSpec:
    """The same data set for a network of `num_classes`: names and colours cut, or extended by generic ones."""
    if num_classes is None or num_classes == spec.num_classes:
        return spec
    surplus = num_classes - spec.num_classes
    names, palette = spec.class_names[:num_classes], spec.palette[:num_classes]
    if surplus > 0:
        names = (*names, *(f"class {i}" for i in range(spec.num_classes, num_classes)))
        palette = np.concatenate([palette, distinct_colors(surplus, avoid=palette)])
    return replace(spec, num_classes=num_classes, class_names=names, palette=palette)


def _custom(data_dir: str | os.PathLike | None, num_classes: int | None, recorded: dict | None = None) -> DatasetSpec:
    path = blobfile.join(os.fspath(data_dir), "dataset.json") if data_dir is not None else "dataset.json"
    if recorded is None:
        settings = read_json(path) if data_dir is not None else {}
    else:
        path = "dataset_json in config.json"
        settings = checked(path, recorded)
    names, colors = json_classes(path, settings.get("classes", []))
    if recorded is None:  # older trainings did take a name twice, and sampling from them goes on
        check_names(path, names, settings)
    remap, ignore_class = json_remap(path, settings), None
    if "ignore_id" in settings:  # unlabelled pixels become a class of their own, after the named ones
        if not names:
            raise DataError(f"{path}: ignore_id needs classes, because it becomes the class after the last of them")
        stored = settings["ignore_id"]
        if not 0 <= stored <= 65535:  # a negative id would count from the end of the table of ids
            raise DataError(
                f"{path}: ignore_id is {stored}; it must be an id in the label maps, 0 to 65535 (-1 in 8 bits is 255)"
            )
        if stored in remap:
            raise DataError(f"{path}: remap and ignore_id both name the id {stored}; remove it from one of them")
        if recorded is None and stored < len(names) and stored not in remap.values():
            raise DataError(ignored_class(path, stored, names, remap))
        ignore_class = len(names)
        remap[stored] = ignore_class
        names.append(UNLABELLED)
        colors[ignore_class] = (0, 0, 0)
    if not names and num_classes is None:
        raise DataError(f"dataset_mode custom needs num_classes, or classes in {path}")
    for stored, network in remap.items():
        if network >= (num_classes or len(names)):
            raise DataError(f"{path}: remap sends {stored} to {network}, which is not below the number of classes")
    count = len(names) or num_classes
    if count > _MAX_CLASSES:
        raise DataError(f"{path}: there are {count} classes; at most {_MAX_CLASSES} are possible")
    names = names or [f"class {i}" for i in range(count)]
    encoding = settings.get("label_encoding", "ids")
    if encoding == "colors" and not count == len(names) == len(colors) == len(set(colors.values())):
        raise DataError(f"{path}: label_encoding colors needs classes, with a color of its own for each")
    if encoding == "colors" and remap:
        raise DataError(
            f"{path}: remap and ignore_id are for label maps of ids; give unlabelled pixels a class and color"
        )
    palette = _fill_palette(count, colors)
    spec = DatasetSpec(
        name="custom",
        num_classes=count,
        class_names=tuple(names),
        palette=palette,
        layout=FolderLayout(
            "{split}/images",
            "{split}/labels",
            "{split}/instances",
            **{key: settings[key] for key in SUFFIXES if key in settings},
        ),
        remap=remap,
        ignore_class=ignore_class,
        instances={None: "optional", True: "files", False: "none"}[settings.get("instances")],
        crop=settings.get("crop", "square"),
        label_colors=palette if encoding == "colors" else None,
        color_tolerance=settings.get("tolerance", 0),
        segments_files=_segments_files(path, settings, data_dir) if encoding == "panoptic" else (),
        label_scale=settings.get("label_scale", False),
        grey=settings.get("grey", False),
        exif=settings.get("exif", "refuse"),
        icc=settings.get("icc", "convert"),
        max_pixels=settings.get("max_pixels"),
    )
    return with_num_classes(spec, num_classes)


def _segments_files(path: str, settings: dict, data_dir: str | os.PathLike | None) -> tuple[str, ...]:
    """Where `segments_info` lies; nowhere without a data set: label maps alone hold ids of categories then."""
    if not settings.get("segments_info"):
        raise DataError(
            f'{path}: label_encoding panoptic needs the files that say which class a segment has: "segments_info":'
            ' ["panoptic_train.json", "panoptic_val.json"]'
        )
    return tuple(blobfile.join(os.fspath(data_dir), name) for name in settings["segments_info"]) if data_dir else ()


def _fill_palette(count: int, colors: Mapping[int, tuple[int, int, int]]) -> np.ndarray:
    """uint8 [count, 3]: the given colours, and distinct ones for the classes without."""
    given = np.array(list(colors.values()), dtype=np.uint8).reshape(-1, 3)
    rest = iter(distinct_colors(count - len(colors), avoid=given))
    return np.array([colors[i] if i in colors else next(rest) for i in range(count)], dtype=np.uint8)
