"""Cuts large pictures of a data set into tiles: photograph, label map and instance map together.

    python scripts/data/tile_dataset.py --data_dir data/aerial --out data/aerial-tiles --tile 1024 --overlap 128

For dataset_mode custom. Every tile is TILE pixels wide and high and shares at least OVERLAP pixels with its neighbours;
the last of a row or column ends with the picture. A picture no larger than a tile stays whole. NAME_y000896_x001792
is the tile of NAME that begins 896 pixels from the top and 1792 from the left. All tiles are PNG: photographs as they
are read (turned, in sRGB), ids and colours of maps as they are stored. `dataset.json` comes along. Pictures of any size
are read, one at a time and process, which takes about 5 bytes of memory per pixel. Running it again goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from preparation import PreparationError, clear_errors, open_output, run_parallel, write_json, write_png

from guided_diffusion.data.listing import Item, list_items
from guided_diffusion.data.masks import open_map, storable_map
from guided_diffusion.data.picture_files import open_undecoded
from guided_diffusion.data.specs import (
    SPLITS,
    DataError,
    DatasetSpec,
    MissingSplitError,
    get_spec,
    read_dataset_json,
)
from guided_diffusion.data.transforms import check_sizes, read_image, read_instances, read_label

_ANY_SIZE = 1 << 62
# What tiles have no more: ends of names, a limit that they do not reach, a turn that has been made.
_DONE = ("image_suffix", "label_suffix", "instance_suffix", "max_pixels", "exif")


@dataclass(frozen=True)
class Job:
    """One picture of a split with its maps, the tiles' boxes by name, and which of them are there already."""

    spec: DatasetSpec
    item: Item
    folder: Path
    tiles: dict[str, tuple[int, int, int, int]]
    finished: frozenset[str]  # as images/NAME.png


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of a side begin: every `tile - overlap` pixels, the last so that it ends with the picture."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def tiles_of(name: str, size: tuple[int, int], tile: int, overlap: int) -> dict[str, tuple[int, int, int, int]]:
    """Name of a tile -> its box (left, top, right, bottom) in a picture of `size` (width, height)."""
    width, height = min(tile, size[0]), min(tile, size[1])
    return {
        f"{name}_y{top:06d}_x{left:06d}": (left, top, left + width, top + height)
        for top in starts(size[1], tile, overlap)
        for left in starts(size[0], tile, overlap)
    }


def maps_of(job: Job) -> Iterator[tuple[str, Image.Image]]:
    """(folder, picture) of an item's files, one after the other. Raises DataError for what the loader would refuse."""
    item, spec = job.item, job.spec
    photograph = read_image(item.image, spec)
    yield "images", photograph
    label = storable_map(open_map(item.label, "label map", spec.label_content, max_pixels=spec.max_pixels))
    check_sizes(spec, item.image, photograph.size, item.label, label.size)
    yield "labels", label
    if item.instance is not None:
        instances = read_instances(item.instance, max_pixels=spec.max_pixels)
        check_sizes(spec, item.label, label.size, item.instance, instances.size)
        yield "instances", storable_map(instances)


def cut(job: Job) -> int:
    """Writes the tiles of one picture that are not there; how many files."""
    names = {f"{kind}/{tile}.png" for kind in kinds(job.item) for tile in job.tiles}
    if names <= job.finished:
        return 0
    written = 0
    try:
        read_label(job.item.label, job.spec)  # a wrong id is named before anything is written
        for kind, picture in maps_of(job):
            for tile, box in job.tiles.items():
                if f"{kind}/{tile}.png" not in job.finished:
                    part = picture.crop(box)
                    part.info.clear()
                    write_png(part, job.folder / kind / f"{tile}.png")
                    written += 1
    except DataError as error:
        raise PreparationError(str(error)) from error
    return written


def kinds(item: Item) -> tuple[str, ...]:
    return ("images", "labels") if item.instance is None else ("images", "labels", "instances")


def tile_data(data_dir: Path, out: Path, tile: int, overlap: int, num_classes: int | None, workers: int) -> None:
    """Cuts all splits. Raises PreparationError where that cannot be."""
    if tile < 1 or not 0 <= overlap < tile:
        raise PreparationError(
            f"--tile {tile} --overlap {overlap}: a tile has pixels, and shares fewer than all of them"
        )
    try:
        spec = replace(get_spec("custom", data_dir, num_classes), max_pixels=_ANY_SIZE)
        settings = read_dataset_json(data_dir)
        if spec.segments_files:
            raise DataError("panoptic label maps cannot be cut here: segments_info names whole files; store ids first")
        splits = {}
        for split in SPLITS:
            try:
                splits[split] = list_items(spec, data_dir, split)
            except MissingSplitError:
                if split == "train":
                    raise
        if "test" in splits and "val" in splits and splits["test"][0] == splits["val"][0]:
            del splits["test"]  # one folder
        boxes = {
            (split, item.name): tiles_of(
                item.name, open_undecoded(item.label, "label map", _ANY_SIZE).size, tile, overlap
            )
            for split, items in splits.items()
            for item in items
        }
    except (DataError, MissingSplitError) as error:
        raise PreparationError(str(error)) from error
    expected: dict[str, set[str]] = {}
    for split, items in splits.items():
        for item in items:
            for kind in kinds(item):
                names = {f"{name}.png" for name in boxes[split, item.name]}
                expected.setdefault(f"{split}/{kind}", set()).update(names)
    description = {key: value for key, value in settings.items() if key not in _DONE} or None
    finished = open_output(out, "tile_dataset.py", expected, sources=[data_dir], description=description)
    jobs = [
        Job(
            spec, item, out / split, boxes[split, item.name],
            frozenset(f"{kind}/{name}" for kind in kinds(item) for name in finished[f"{split}/{kind}"]),
        )
        for split, items in splits.items()
        for item in items
    ]  # fmt: skip
    run_parallel(cut, jobs, workers, "tiles")
    if description is not None:
        write_json(description, out / "dataset.json")
    for split, items in splits.items():
        print(f"{split}: {len(items)} pictures, {len(expected[f'{split}/images'])} tiles")
    sizes = {(box[2] - box[0], box[3] - box[1]) for tiles in boxes.values() for box in tiles.values()}
    if len(sizes) > 1:
        print(f"note: pictures narrower or lower than {tile} made tiles of {len(sizes) - 1} other sizes")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir", required=True, type=Path, help="a data set of dataset_mode custom, a local folder"
    )
    parser.add_argument("--out", required=True, type=Path, help="a folder that is new, or a run of this that goes on")
    parser.add_argument("--tile", type=int, default=1024, help="width and height of a tile in pixels")
    parser.add_argument("--overlap", type=int, default=0, help="pixels that neighbours share at least")
    parser.add_argument("--num_classes", type=int, help="for data without classes in dataset.json")
    parser.add_argument("--workers", type=int, default=1, help="processes; each holds a whole picture")
    options = parser.parse_args(arguments)
    with clear_errors("tile_dataset.py"):
        tile_data(options.data_dir, options.out, options.tile, options.overlap, options.num_classes, options.workers)


if __name__ == "__main__":
    main()
