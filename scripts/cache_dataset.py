"""A copy of a data set whose photographs are already shrunk, for the image size of one training run.

    python scripts/cache_dataset.py --data_dir ./data/cityscapes --dataset_mode cityscapes --image_size 256
    --cache_dir ./data/cityscapes-256 python image_train.py --data_dir ./data/cityscapes-256 --dataset_mode cityscapes
    --image_size 256 ...

The copy has the layout of the original and gives the loader the same pixels, to the bit. Photographs are stored as
PNG, so nothing is lost; files that would not shrink are copied as they are. Worth it for Cityscapes and for large
photographs, not for COCO-Stuff or ADE20K (`benchmarks/loader.py` measures it). Running it again goes on where it was
interrupted.
"""

import argparse
import io
import json
import os
import sys
from dataclasses import dataclass
from functools import partial

import blobfile
import numpy as np
from PIL import Image

from guided_diffusion.dataset_specs import DATASET_MODES, SPLITS, DataError, DatasetSpec, MissingSplitError, get_spec
from guided_diffusion.image_listing import (
    CACHE_FILE,
    Item,
    is_remote,
    join,
    list_items,
    open_stream,
    read_bytes,
    read_cache_settings,
)
from guided_diffusion.image_transforms import cached_image, read_image, read_label, whole_picture
from guided_diffusion.parallel import map_in_processes


@dataclass(frozen=True)
class CacheJob:
    """What a worker needs to know of the whole."""

    spec: DatasetSpec
    data_dir: str
    cache_dir: str
    image_size: int
    scale_jitter: float
    training: bool

    @property
    def fixed(self) -> bool:
        """Whether every later use resizes the whole picture in one way."""
        return whole_picture(self.training, self.spec.crop, self.scale_jitter)


def write_bytes(path: str, content: bytes) -> None:
    """The file under a temporary name in its folder, then renamed into place."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.part{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def encode_png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", compress_level=4)
    return stream.getvalue()


def shrunk_map(path: str, size: tuple[int, int]) -> bytes:
    """A label or instance map at `size`, with the ids (or colours) of the file unchanged."""
    picture = Image.open(open_stream(path))
    if picture.mode.startswith("I"):  # nearest-pixel resizing of 16 bits is not in every Pillow
        ids = np.asarray(picture.convert("I").resize(size, Image.Resampling.NEAREST))
        return encode_png(Image.fromarray(ids.astype(np.uint16)))
    return encode_png(picture.resize(size, Image.Resampling.NEAREST))


def cache_item(job: CacheJob, item: Item) -> bool:
    """Writes one item's files into the cache, the photograph last; False where they were there already."""

    def target(path: str, extension: str | None = None) -> str:
        place = os.path.join(job.cache_dir, path[len(job.data_dir) :].lstrip("/"))
        return place if extension is None else os.path.splitext(place)[0] + extension

    if os.path.exists(target(item.image)) or os.path.exists(target(item.image, ".png")):
        return False
    photograph = read_image(item.image, job.spec)
    read_label(item.label, job.spec)  # a wrong id is found here, not in the middle of a training run
    shrunk = cached_image(photograph, job.image_size, job.spec.crop, job.training, job.scale_jitter)
    maps = [path for path in (item.label, item.instance) if path is not None]
    for path in maps:
        if job.fixed:
            write_bytes(target(path, ".png"), shrunk_map(path, shrunk.size))
        else:  # crops of several sizes need the map as it is; maps are quick to read
            write_bytes(target(path), read_bytes(path))
    if shrunk.size == photograph.size:
        write_bytes(target(item.image), read_bytes(item.image))
    else:
        write_bytes(target(item.image, ".png"), encode_png(shrunk))
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the data set; a folder or a bucket")
    parser.add_argument("--dataset_mode", required=True, choices=DATASET_MODES)
    parser.add_argument(
        "--image_size", required=True, type=int, help="the image size of the runs that will use the cache"
    )
    parser.add_argument("--cache_dir", required=True, help="a local folder for the copy")
    parser.add_argument("--num_classes", type=int, help="for custom without classes in dataset.json")
    parser.add_argument("--scale_jitter", type=float, default=0.0, help="the largest scale_jitter of those runs")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        build_cache(options)
    except (DataError, MissingSplitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_cache(options: argparse.Namespace) -> None:
    """Fills the cache folder split by split, and marks it as complete at the end."""
    data_dir = options.data_dir.rstrip("/")
    if is_remote(options.cache_dir) or os.path.abspath(options.cache_dir) == os.path.abspath(data_dir):
        raise DataError(f"cache_dir {options.cache_dir} must be a local folder other than the data folder")
    if read_cache_settings(data_dir):
        raise DataError(f"{data_dir} is a cache itself; give the original")
    spec = get_spec(options.dataset_mode, data_dir, options.num_classes)
    splits, folders = {}, set()
    for split in SPLITS:  # everything is listed and paired before the first picture is written
        try:
            items = list_items(spec, data_dir, split)
        except MissingSplitError:
            continue
        if items[0].image not in folders:  # val and test may be one folder
            splits[split] = items
            folders.add(items[0].image)
    if not splits:
        list_items(spec, data_dir, "train")  # raises the error that names the layout
    settings = {key: getattr(options, key) for key in ("dataset_mode", "image_size", "scale_jitter")}
    note = os.path.join(options.cache_dir, CACHE_FILE)
    if os.path.exists(note):
        with open(note) as file:
            made = {**json.load(file), "complete": None}
        if made != {**settings, "complete": None}:
            raise DataError(f"{options.cache_dir} is a cache for other settings: {made}; choose another cache_dir")
    elif os.path.isdir(options.cache_dir) and os.listdir(options.cache_dir):
        raise DataError(f"cache_dir {options.cache_dir} is not empty and no cache; choose another")
    write_bytes(note, json.dumps({**settings, "complete": False}).encode())
    description = join(data_dir, "dataset.json")
    if options.dataset_mode == "custom" and blobfile.exists(description):
        write_bytes(os.path.join(options.cache_dir, "dataset.json"), read_bytes(description))
    for split, items in splits.items():
        job = CacheJob(spec, data_dir, options.cache_dir, options.image_size, options.scale_jitter, split == "train")
        written = sum(
            map_in_processes(partial(cache_item, job), items, f"{split} -> {options.cache_dir}", options.workers)
        )
        print(f"{split}: {written} of {len(items)} written, {len(items) - written} were there")
    write_bytes(note, json.dumps({**settings, "complete": True}).encode())
    print(f"done: use --data_dir {options.cache_dir} with --image_size {options.image_size}")


if __name__ == "__main__":
    raise SystemExit(main())
