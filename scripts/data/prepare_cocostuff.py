"""Prepares COCO-Stuff: pixel maps and photographs in the `coco` layout, instance maps drawn from COCO's annotations.

    python scripts/data/prepare_cocostuff.py --images coco --pixelmaps stuffthingmaps_trainval2017 \\
        --instances annotations --out data/coco

reads `train2017/` and `val2017/` of photographs and of pixel maps (ids 0..181, 255 unlabelled) and
`instances_train2017.json`, `instances_val2017.json`, and writes, for train and val: `train_img/NAME.jpg`,
`train_label/NAME.png` (both hard links where the file system has them, else copies) and `train_inst/NAME.png`.

An instance map is a 16-bit image. A pixel of no single object keeps its class id; the objects of an image are numbered
from 256 in the order of the annotations, later ones over earlier ones, so no object has the number of a class or of
another object. (In the maps usual for this data set, of 8 bits, the objects count from 0 and some meet a class id.)
Crowds, which are annotated as one region, keep their class id.

Running the same command again goes on where it stopped. Needs pycocotools (`pip install '.[coco]'`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from preparation import (
    PreparationError,
    available_cpus,
    clear_errors,
    files_by_stem,
    link_or_copy,
    open_output,
    run_parallel,
    write_png,
)

SPLITS = ("train", "val")
KINDS = {"img": ".jpg", "label": ".png", "inst": ".png"}
FIRST_INSTANCE = 256  # above every class id
UNLABELLED = 255
LAST_CLASS = 181


def load_mask_tools() -> Any:
    """pycocotools' polygon and run-length code."""
    try:
        from pycocotools import mask
    except ImportError:
        raise PreparationError("pycocotools is missing, instance maps need it: pip install '.[coco]'") from None
    return mask


def read_annotations(file: Path, names: set[str]) -> dict[str, tuple[tuple[int, int], list[Any]]]:
    """Stem of an image -> ((height, width), segmentations of its single objects), in the order of the file.

    Raises PreparationError where the file is unreadable, is not of COCO's structure, or misses one of `names`.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        images = {i["id"]: (Path(i["file_name"]).stem, (i["height"], i["width"])) for i in content["images"]}
        found: dict[str, tuple[tuple[int, int], list[Any]]] = {
            stem: (size, []) for stem, size in images.values() if stem in names
        }
        for annotation in content["annotations"]:
            stem, _ = images[annotation["image_id"]]
            if stem in found and not annotation["iscrowd"]:
                found[stem][1].append(annotation["segmentation"])
    except OSError as error:
        raise PreparationError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PreparationError(f"{file} has not the structure of COCO's instances ({error!r}): load it again") from None
    missing = sorted(names - found.keys())
    if missing:
        raise PreparationError(
            f"{file} does not list {missing[0]}.jpg ({len(missing)} such images): is it another split's?"
        )
    return found


def read_pixel_map(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Class ids [H, W] uint8. Raises PreparationError for an unreadable file, another size or other ids."""
    try:
        with Image.open(file) as image:
            ids = np.asarray(image)
    except OSError as error:
        raise PreparationError(f"{file} cannot be read ({error}): unpack the archive again") from None
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise PreparationError(f"{file} is not a map of 8-bit ids (it has {ids.shape} values of {ids.dtype})")
    if ids.shape != size:
        raise PreparationError(f"{file} is {ids.shape}, the annotations say {size}: are both of the same release?")
    wrong = np.unique(ids[(ids > LAST_CLASS) & (ids != UNLABELLED)])
    if wrong.size:
        raise PreparationError(
            f"{file} has the ids {wrong.tolist()}; COCO-Stuff's pixel maps have 0..{LAST_CLASS} and {UNLABELLED}"
        )
    return ids


def draw_instances(ids: np.ndarray, segmentations: list[Any]) -> np.ndarray:
    """Class ids [H, W] and the objects' polygons or run lengths -> instance map [H, W] uint16."""
    mask_tools = load_mask_tools()
    height, width = ids.shape
    instances = ids.astype(np.uint16)
    for number, segmentation in enumerate(segmentations, start=FIRST_INSTANCE):
        if isinstance(segmentation, list):  # the polygons of one object
            encoded = mask_tools.merge(mask_tools.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            encoded = mask_tools.frPyObjects(segmentation, height, width)
        else:
            encoded = segmentation
        instances[mask_tools.decode(encoded) != 0] = number
    return instances


def _prepare_image(job: tuple[Path, Path, Path, str, str, tuple[tuple[int, int], list[Any]]]) -> None:
    image, pixel_map, out, split, name, (size, segmentations) = job
    ids = read_pixel_map(pixel_map, size)
    try:
        instances = draw_instances(ids, segmentations)
    except PreparationError:
        raise
    except Exception as error:  # whatever pycocotools makes of a broken polygon
        raise PreparationError(f"the annotations of {name}.jpg ({split}) cannot be drawn: {error}") from None
    write_png(Image.fromarray(instances), out / f"{split}_inst" / f"{name}.png")
    link_or_copy(pixel_map, out / f"{split}_label" / f"{name}.png")
    link_or_copy(image, out / f"{split}_img" / f"{name}.jpg")


def find_pairs(images: Path, pixelmaps: Path) -> dict[str, tuple[Path, Path]]:
    """Stem -> (photograph, pixel map). Raises PreparationError where one lacks the other."""
    photographs, maps = files_by_stem(images, ".jpg"), files_by_stem(pixelmaps, ".png")
    single = sorted(photographs.keys() ^ maps.keys())
    if single:
        here, there = (images, pixelmaps) if single[0] in photographs else (pixelmaps, images)
        raise PreparationError(
            f"{single[0]} is in {here} and not in {there} ({len(single)} such files): unpack both archives completely"
        )
    return {stem: (photographs[stem], maps[stem]) for stem in photographs}


def prepare(images: Path, pixelmaps: Path, instances: Path, out: Path, workers: int) -> None:
    """Writes the data set; see the module's docstring. Raises PreparationError on unusable input."""
    load_mask_tools()
    pairs = {split: find_pairs(images / f"{split}2017", pixelmaps / f"{split}2017") for split in SPLITS}
    files = {split: instances / f"instances_{split}2017.json" for split in SPLITS}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise PreparationError(
            f"{missing[0]} is not there: unpack annotations_trainval2017.zip, name it by --instances"
        )
    print("split: COCO's own: " + ", ".join(f"{len(pairs[split]):,} {split}" for split in SPLITS))
    expected = {
        f"{split}_{kind}": {f"{stem}{suffix}" for stem in pairs[split]}
        for split in SPLITS
        for kind, suffix in KINDS.items()
    }
    finished = open_output(out, "prepare_cocostuff.py", expected, sources=[images, pixelmaps, instances])
    for split in SPLITS:
        done = [{Path(name).stem for name in finished[f"{split}_{kind}"]} for kind in KINDS]
        names = pairs[split].keys() - set.intersection(*done)
        if names:
            print(f"reading {files[split]}")
            annotations = read_annotations(files[split], names)
            jobs = [(*pairs[split][stem], out, split, stem, annotations[stem]) for stem in sorted(names)]
            run_parallel(_prepare_image, jobs, workers, f"drawing instances into {out} ({split})")
        print(f"{split}: {len(names):,} images prepared, {len(pairs[split]) - len(names):,} were there already: {out}")
    print(f"train with: --data_dir {out} --dataset_mode coco --num_classes {LAST_CLASS + 2}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with train2017/ and val2017/ of photographs")
    parser.add_argument("--pixelmaps", type=Path, required=True, help="the same of stuffthingmaps_trainval2017")
    parser.add_argument("--instances", type=Path, required=True, help="folder with instances_{train,val}2017.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made when missing")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes")
    with clear_errors("prepare_cocostuff"):
        prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
