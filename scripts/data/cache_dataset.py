"""A copy of a data set whose photographs are already shrunk, for the image size of one training run.

    python scripts/data/cache_dataset.py --data_dir ./data/cityscapes --dataset_mode cityscapes --image_size 256 \\
        --cache_dir ./data/cityscapes-256
    python image_train.py --data_dir ./data/cityscapes-256 --dataset_mode cityscapes --image_size 256 ...

The copy has the layout of the original and gives the loader the same pixels, to the bit. Photographs are stored as
PNG, so nothing is lost; files that would not shrink are copied as they are. Worth it for Cityscapes and for large
photographs, not for COCO-Stuff or ADE20K (`benchmarks/loader.py` measures it). Running it again goes on where it was
interrupted, remakes what changed in the original (by size and time of its files) or was damaged in the copy (by size
and checksum), and removes what is gone from it. Only files that `cache_sources.jsonl` names are replaced or removed.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import blobfile
import numpy as np
from PIL import Image

from guided_diffusion.data.listing import (
    CACHE_FILE,
    IMAGE_EXTENSIONS,
    MAP_EXTENSIONS,
    Item,
    is_remote,
    join,
    list_items,
    printable,
    read_bytes,
    read_cache_note,
    read_cache_settings,
    some_names,
)
from guided_diffusion.data.masks import storable_map
from guided_diffusion.data.picture_files import open_undecoded
from guided_diffusion.data.specs import (
    DATASET_MODES,
    SPLITS,
    DataError,
    DatasetSpec,
    MissingSplitError,
    check_address,
    get_spec,
    read_dataset_json,
)
from guided_diffusion.data.transforms import cached_image, read_image, read_instances, read_label, whole_picture
from guided_diffusion.hosts.parallel import map_in_processes

SOURCES_FILE = "cache_sources.jsonl"  # beside CACHE_FILE, which the loader reads and which stays short
_APPEARANCE = (
    "class_names",
    "palette",
    "layout",
    "preparation",
    "max_pixels",
    "segments_files",
)  # of a spec: what no cached file depends on


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
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{_short(name)}.part{os.getpid()}")  # no longer than what a file system takes
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _short(name: str) -> str:
    return f"{zlib.crc32(os.fsencode(name)):08x}"


def encode_png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", compress_level=4)
    return stream.getvalue()


def shrunk_map(path: str, size: tuple[int, int], max_pixels: int | None) -> bytes:
    """A label or instance map at `size`, with the ids (or colours) of the file unchanged."""
    picture = open_undecoded(path, "map", max_pixels)
    if picture.mode == "F" or picture.mode.startswith("I"):  # nearest-pixel resizing of 16 bits is not in every Pillow
        numbers = Image.fromarray(np.asarray(picture).astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        return encode_png(storable_map(numbers))
    return encode_png(picture.resize(size, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class Record:
    """What is known of a cached item: the state of its source files, its files below the cache folder, and their sizes
    and checksums (None in a record of an earlier version)."""

    sources: list[list | None]  # of photograph, label map and instance map
    files: list[str]
    sums: list[list[int]] | None = None


def file_sums(content: bytes) -> list[int]:
    """Size and checksum: enough to notice a file that was cut or overwritten."""
    return [len(content), zlib.crc32(content)]


def unharmed(cache_dir: str, record: Record) -> bool:
    """Whether an item's cached files are there as they were written."""
    try:
        return record.sums == [file_sums(read_bytes(os.path.join(cache_dir, name))) for name in record.files]
    except OSError:
        return False


def source_state(path: str | None) -> list | None:
    """Size and time of change of a source file; a file that was edited or replaced has others."""
    if path is None:
        return None
    try:
        if is_remote(path):
            found = blobfile.stat(path)
            return [found.size, found.mtime, found.version]
        found = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is gone since the folder was listed; run this again") from error
    return [found.st_size, found.st_mtime_ns]


def cache_item(job: CacheJob, task: tuple[Item, Record | None]) -> tuple[bool, Record]:
    """Writes one item's files into the cache, unless they are there and their sources are as recorded.

    Returns whether it wrote, and the record.
    """
    item, before = task
    sources = [source_state(path) for path in (item.image, item.label, item.instance)]  # before anything is read
    if before is not None and before.sources == sources and unharmed(job.cache_dir, before):
        return False, before
    files, sums = [], []

    def write(path: str, content: bytes, as_png: bool = False) -> None:
        files.append(cached_names(job.data_dir, path)[as_png])
        sums.append(file_sums(content))
        write_bytes(os.path.join(job.cache_dir, files[-1]), content)

    photograph = read_image(item.image, job.spec)
    read_label(item.label, job.spec)  # a wrong id is found here, not in the middle of a training run
    if item.instance is not None:
        read_instances(item.instance, max_pixels=job.spec.max_pixels)
    shrunk = cached_image(photograph, job.image_size, job.spec.crop, job.training, job.scale_jitter)
    maps = [path for path in (item.label, item.instance) if path is not None]
    for path in maps:
        if job.fixed:
            write(path, shrunk_map(path, shrunk.size, job.spec.max_pixels), as_png=True)
        else:  # crops of several sizes need the map as it is; maps are quick to read
            write(path, read_bytes(path))
    if shrunk.size == photograph.size:
        write(item.image, read_bytes(item.image))
    else:
        write(item.image, encode_png(shrunk), as_png=True)
    return True, Record(sources, files, sums)


def cached_names(data_dir: str, path: str) -> tuple[str, str]:
    """A source file's name below the cache folder, copied as it is and stored as PNG."""
    name = path[len(data_dir) :].lstrip("/")
    return name, os.path.splitext(name)[0] + ".png"


def read_records(cache_dir: str) -> dict[tuple[str, str], Record]:
    """(split, item's name) -> the last record of it; damaged lines, or of files elsewhere, are passed over."""
    records = {}
    for line in _lines(cache_dir):
        if len(line) in (4, 5) and isinstance(line[0], str) and isinstance(line[1], str) and _are_cached(line[3]):
            records[line[0], line[1]] = Record(*line[2:])
    return records


def read_claims(cache_dir: str) -> set[str]:
    """The files below the cache folder that this script wrote or was about to write, and that it may remove."""
    lines = list(_lines(cache_dir))
    claims = [line[1] for line in lines if len(line) == 2 and line[0] == _CLAIM and _are_cached(line[1])]
    return {name for names in [*claims, *(r.files for r in read_records(cache_dir).values())] for name in names}


_CLAIM, _DESCRIPTION = "files", "dataset.json"


def _lines(cache_dir: str) -> Iterator[list]:
    path = os.path.join(cache_dir, SOURCES_FILE)
    if os.path.exists(path):
        with open(path, "rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):  # what a killed run left unfinished
                    continue
                if isinstance(line, list):
                    yield line


def _are_cached(names: object) -> bool:
    """Whether these can be files of a cache: pictures, by their path below its folder."""
    return isinstance(names, list) and all(
        isinstance(name, str)
        and _is_possible(name)
        and not {"", ".", ".."} & set(name.split("/"))
        and os.path.splitext(name)[1].lower() in (*IMAGE_EXTENSIONS, *MAP_EXTENSIONS)
        for name in names
    )


def _is_possible(name: str) -> bool:
    """Whether a file can have this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def record_line(split: str, name: str, record: Record) -> str:
    return json.dumps([split, name, record.sources, record.files, record.sums]) + "\n"


def claim_line(names: Iterable[str]) -> str:
    return json.dumps([_CLAIM, sorted(names)]) + "\n"


def claim(cache_dir: str, targets: set[str]) -> set[str]:
    """Notes the files that are about to be written; all that the record names then.

    Raises DataError where one of them is there already and not of this script, or would be written through a link.
    """
    before = read_claims(cache_dir)
    for folder in {os.path.dirname(name) for name in targets | before}:
        for place in [folder, *map(str, Path(folder).parents)]:
            if os.path.islink(os.path.join(cache_dir, place)) and place not in ("", "."):
                raise DataError(f"{os.path.join(cache_dir, place)} is a link: files are only written into real folders")
    for name in sorted(targets - before):
        if os.path.lexists(os.path.join(cache_dir, name)):
            raise DataError(
                f"{os.path.join(cache_dir, name)} is in the way: {SOURCES_FILE} does not name it as a file of this"
                " cache; move it away, or choose another cache_dir"
            )
    with open(os.path.join(cache_dir, SOURCES_FILE), "a", encoding="utf-8") as file:
        file.write("\n" + claim_line(targets - before))  # the first ends a line that a killed run left unfinished
    return targets | before


def remove_others(cache_dir: str, keep: set[str], claimed: set[str]) -> tuple[int, list[str]]:
    """Removes the claimed files that are none of `keep`, whose sources are gone or have another format now.

    Returns how many, and the other pictures in their folders, which are not ours and stay.
    """
    removed, strangers = 0, []
    for folder in sorted({os.path.dirname(name) for name in claimed}):
        place = Path(cache_dir, folder)
        unfinished = {_short(os.path.basename(name)) for name in claimed if os.path.dirname(name) == folder}
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            name = os.path.join(folder, path.name)
            half = re.fullmatch(r"\.([0-9a-f]{8})\.part\d+", path.name)
            if name in keep or path.is_dir():
                continue
            if path.is_file() and not path.is_symlink() and (name in claimed or (half and half[1] in unfinished)):
                path.unlink()
                removed += 1
            elif path.suffix.lower() in (*IMAGE_EXTENSIONS, *MAP_EXTENSIONS):
                strangers.append(name)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()  # empty folders would pass for a split without photographs
    return removed, strangers


def cache_settings(options: argparse.Namespace, spec: DatasetSpec) -> dict:
    """What a cache is made for: the flags, and what `dataset.json` and the mode come to, as JSON gives it back."""
    meaning = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Mapping):
            value = {str(key): value[key] for key in sorted(value)}
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        if field.name not in _APPEARANCE:
            meaning[field.name] = value
    flags = {key: getattr(options, key) for key in ("dataset_mode", "image_size", "scale_jitter")}
    return {**flags, "spec": json.loads(json.dumps(meaning))}


def check_settings(options: argparse.Namespace, settings: dict, made: dict) -> None:
    """Raises DataError where the cache folder's `made` is not for these settings."""
    remedy = "delete that folder or choose another cache_dir"
    if not isinstance(made.get("spec"), dict):
        raise DataError(
            f"{options.cache_dir} is a cache of an earlier version, which did not record its sources: training can"
            f" go on using it, but changes of {options.data_dir} would not be noticed; {remedy}"
        )
    old, new = ({**part, **part["spec"], "spec": None, "complete": None} for part in (made, settings))
    # What an earlier version of this program did not know, it does not contradict.
    changed = [f"{key} was {old[key]!r}, is {new.get(key)!r}" for key in old if old[key] != new.get(key)]
    if changed:
        raise DataError(
            f"{options.cache_dir} is a cache for other settings (of the command or of dataset.json):"
            f" {'; '.join(changed)}; {remedy}"
        )


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
    except (DataError, OSError) as error:  # a full disk, say
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_cache(options: argparse.Namespace) -> None:
    """Fills the cache folder split by split, and marks it as complete at the end."""
    if options.image_size < 1 or not 0 <= options.scale_jitter < math.inf:
        raise DataError(
            f"image_size ({options.image_size}) must be at least 1, scale_jitter ({options.scale_jitter}) at least 0"
        )
    data_dir = options.data_dir.rstrip("/")
    check_address(data_dir)
    if is_remote(options.cache_dir) or (os.path.lexists(options.cache_dir) and not os.path.isdir(options.cache_dir)):
        raise DataError(f"cache_dir {options.cache_dir} must be a local folder")
    if not is_remote(data_dir):
        source, target = Path(data_dir).resolve(), Path(options.cache_dir).resolve()
        if source == target or source in target.parents or target in source.parents:
            raise DataError(
                f"cache_dir {options.cache_dir} must be a folder apart from {data_dir}: not it, nor in it or around it"
            )
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
    settings = cache_settings(options, spec)
    note = os.path.join(options.cache_dir, CACHE_FILE)
    if os.path.exists(note):
        check_settings(options, settings, read_cache_note(note))
    elif os.path.isdir(options.cache_dir) and os.listdir(options.cache_dir):
        raise DataError(f"cache_dir {options.cache_dir} is not empty and no cache; choose another")
    write_bytes(note, json.dumps({**settings, "complete": False}).encode())
    described = copy_descriptions(options.dataset_mode, data_dir, options.cache_dir)
    paths = [path for items in splits.values() for item in items for path in (item.image, item.label, item.instance)]
    claimed = claim(options.cache_dir, {name for path in paths if path for name in cached_names(data_dir, path)})
    before, now = read_records(options.cache_dir), {}
    for split, items in splits.items():
        now.update(cache_split(options, spec, split, items, before))
    keep = {name for record in now.values() for name in record.files}
    removed, strangers = remove_others(options.cache_dir, keep, claimed)
    if removed:
        print(f"{removed} files removed, whose originals are gone or changed")
    if strangers:
        print(
            f"note: {len(strangers)} pictures in {options.cache_dir} are not of this cache and stay, but training may"
            f" refuse them ({printable(some_names(strangers))}); move them away"
        )
    lines = described + claim_line(keep) + "".join(record_line(*key, record) for key, record in now.items())
    write_bytes(os.path.join(options.cache_dir, SOURCES_FILE), lines.encode())
    write_bytes(note, json.dumps({**settings, "complete": True}).encode())
    print(f"done: use --data_dir {options.cache_dir} with --image_size {options.image_size}")


def copy_descriptions(dataset_mode: str, data_dir: str, cache_dir: str) -> str:
    """The cache's dataset.json, and the files that it names, become the original's, which may have changed.

    Returns the lines of the record that tell them from somebody's own files. Raises DataError where there is one.
    """
    own = dataset_mode == "custom" and blobfile.exists(join(data_dir, _DESCRIPTION))
    named = read_dataset_json(data_dir).get("segments_info", []) if own else []
    contents = {name: read_bytes(join(data_dir, name)) if own else None for name in (_DESCRIPTION, *named)}
    lines = [[name, _hash(content)] for name, content in contents.items() if content is not None]
    record = "".join(json.dumps(line) + "\n" for line in lines)
    for name, content in contents.items():
        copy = os.path.join(cache_dir, name)
        if not os.path.lexists(copy):
            continue
        there = None if os.path.islink(copy) or not os.path.isfile(copy) else read_bytes(copy)
        if there is None or (there != content and [name, _hash(there)] not in list(_lines(cache_dir))):
            raise DataError(
                f"{copy} is in the way: it is not as this script wrote it; move it away, or choose another cache_dir"
            )
    if record:
        with open(os.path.join(cache_dir, SOURCES_FILE), "a", encoding="utf-8") as file:
            file.write("\n" + record)  # the first ends a line that a killed run left unfinished
    for name, content in contents.items():
        copy = os.path.join(cache_dir, name)
        if content is not None:
            write_bytes(copy, content)
        elif os.path.lexists(copy):
            os.remove(copy)
    return record


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cache_split(
    options: argparse.Namespace, spec: DatasetSpec, split: str, items: list[Item], before: dict[tuple[str, str], Record]
) -> dict[tuple[str, str], Record]:
    """Caches the items of a split, noting each as it is done, so that an interrupted run can go on; their records."""
    data_dir = options.data_dir.rstrip("/")
    job = CacheJob(spec, data_dir, options.cache_dir, options.image_size, options.scale_jitter, split == "train")
    tasks = [(item, before.get((split, item.name))) for item in items]
    done = map_in_processes(partial(cache_item, job), tasks, f"{split} -> {options.cache_dir}", options.workers)
    records, written = {}, 0
    with open(os.path.join(options.cache_dir, SOURCES_FILE), "a", encoding="utf-8", buffering=1) as file:
        for item, (wrote, record) in zip(items, done, strict=True):
            records[split, item.name] = record
            written += wrote
            if wrote:
                file.write(record_line(split, item.name, record))
    print(f"{split}: {written} of {len(items)} written, {len(items) - written} were there")
    return records


if __name__ == "__main__":
    raise SystemExit(main())
