"""Finding the photographs, label maps and instance maps of a split, and pairing them by name.

Local folders are read with `os.scandir` (100,000 files in a fraction of a second), others (gs://, az://, https://)
through blobfile.
"""

import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import blobfile

from .json_text import parse_json
from .proposals import suffixes_for
from .specs import SPLITS, DataError, DatasetSpec, MissingSplitError, check_address

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAP_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")  # lossless: an id must come back as it was stored
_LOSSY = (".jpg", ".jpeg", ".webp")
CACHE_FILE = "cache.json"
_NAMED = 5  # files named in a message


@dataclass(frozen=True)
class Item:
    """One sample's files: its name (unique in the split) and the paths of what it has."""

    name: str
    image: str | None
    label: str
    instance: str | None


def is_remote(path: str) -> bool:
    return "://" in path


def read_bytes(path: str) -> bytes:
    """The whole file; `path` is local or anything that blobfile opens."""
    if is_remote(path):
        with blobfile.BlobFile(path, "rb") as file:
            return file.read()
    with open(path, "rb") as file:
        return file.read()


def open_stream(path: str) -> io.BufferedIOBase | str:
    """What Pillow opens: a local path as it is, a remote file's bytes as a stream."""
    return io.BytesIO(read_bytes(path)) if is_remote(path) else path


def list_items(spec: DatasetSpec, data_dir: str | os.PathLike, split: str, use_instances: bool = True) -> list[Item]:
    """The items of a split, sorted by name.

    Raises MissingSplitError where the split's folder is not there, DataError where it is empty, where two files share a
    stem, or where a photograph, label map or instance map lacks its partner.
    """
    items, problems = pair_files(spec, data_dir, split, use_instances)
    if problems:
        raise DataError(". ".join(problems))
    return items


def pair_files(
    spec: DatasetSpec, data_dir: str | os.PathLike, split: str, use_instances: bool = True
) -> tuple[list[Item], list[str]]:
    """The complete items of a split, sorted by name, and what is wrong with its other files; raises as `list_items`."""
    root = os.fspath(data_dir)
    folder = _split_folder(spec, root, split)
    layout = spec.layout
    image_dir, label_dir = (join(root, part.format(split=folder)) for part in (layout.images, layout.labels))
    images = list_files(image_dir, layout.image_suffix, layout.nested, IMAGE_EXTENSIONS)
    labels = list_files(label_dir, layout.label_suffix, layout.nested, label_extensions(spec))
    remedy = spec.preparation
    if images.keys() != labels.keys():
        remedy += suffixes_for(spec, "image", images, "label", labels)
    problems = _unpaired("photograph", image_dir, images, "label map", label_dir, labels, remedy)
    if not images:
        raise DataError(
            f"{image_dir} holds no photographs ({', '.join(IMAGE_EXTENSIONS)}"
            + (f", with names that end in {layout.image_suffix}" if layout.image_suffix else "")
            + f"); {'; '.join([*unread_files(spec, data_dir, split), expected_layout(spec)])}"
        )
    complete, instances = images.keys() & labels.keys(), {}
    if use_instances and spec.instances in ("files", "optional"):
        instance_dir = join(root, layout.instances.format(split=folder))
        if _is_dir(instance_dir):
            instances = list_files(instance_dir, layout.instance_suffix, layout.nested, MAP_EXTENSIONS)
        if instances or spec.instances == "files":
            remedy = (
                "" if instances.keys() == labels.keys() else suffixes_for(spec, "label", labels, "instance", instances)
            )
            remedy += f"{spec.preparation}; to do without instance maps, use --instances from_labels"
            remedy += " (edges between classes) or --no_instance True"
            problems += _unpaired("label map", label_dir, labels, "instance map", instance_dir, instances, remedy)
            complete &= instances.keys()
    items = [Item(key + layout.image_suffix, images[key], labels[key], instances.get(key)) for key in sorted(complete)]
    return items, problems


def has_instance_maps(spec: DatasetSpec, data_dir: str | os.PathLike, split: str) -> bool:
    """Whether the data offers instances, as far as its folders say: they are not paired. Raises MissingSplitError where
    the split's folder is not there."""
    if spec.instances != "optional":
        return spec.instances != "none"
    root, layout = os.fspath(data_dir), spec.layout
    folder = join(root, layout.instances.format(split=_split_folder(spec, root, split)))
    return _is_dir(folder) and bool(list_files(folder, layout.instance_suffix, layout.nested, MAP_EXTENSIONS))


def unread_files(spec: DatasetSpec, data_dir: str | os.PathLike, split: str) -> list[str]:
    """What is passed over because it lies in sub-folders that the layout does not read: one note per folder."""
    root, layout, notes = os.fspath(data_dir), spec.layout, []
    folder = _split_folder(spec, root, split)
    parts = [layout.images, layout.labels]
    if spec.instances in ("files", "optional"):
        parts.append(layout.instances)
    for place in dict.fromkeys(join(root, part.format(split=folder)) for part in parts):
        deep = list(_below(place, 1 if layout.nested else 0))
        if deep:
            count = f"{len(deep)} picture file" + ("s" if len(deep) > 1 else "")
            named = some_names(sorted(deep))
            notes.append(f"{count} in sub-folders of {place} not read ({named}); move them up to use them")
    return notes


def _below(folder: str, levels: int) -> Iterator[str]:
    """Paths, relative to `folder`, of the picture files more than `levels` folders below it; hidden ones left out."""
    for inside, names in _walk_remote(folder) if is_remote(folder) else _walk_local(folder):
        if len(inside) > levels:
            for name in names:
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in (*IMAGE_EXTENSIONS, ".gif"):
                    yield "/".join((*inside, name))


def _walk_local(folder: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(folders below `folder`, names of files) of the whole tree; a folder that links lead to again is left out."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        yield () if inside == os.curdir else tuple(inside.split(os.sep)), files


def _walk_remote(folder: str, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    entries = list(_scan_remote(folder)) if inside or _is_dir(folder) else []
    yield inside, [name for _, name, is_file, _ in entries if is_file]
    for path, name, _, is_folder in entries:
        if is_folder:
            yield from _walk_remote(path, (*inside, name))


def list_label_items(spec: DatasetSpec, labels_dir: str | os.PathLike, use_instances: bool = True) -> list[Item]:
    """Items of label maps alone, sorted by name; instance maps lie in a folder beside, where there is one.

    That folder is called like the label folder with `instances` for `labels` or `inst` for `label`; in Cityscapes'
    layout it is the label folder itself.
    """
    check_address(labels_dir)
    folder, suffix = os.fspath(labels_dir).rstrip("/"), spec.layout.label_suffix
    if not _is_dir(folder):
        raise MissingSplitError(f"there is no folder of label maps {folder}")
    nested = spec.layout.nested
    extensions = label_extensions(spec)
    labels = list_files(folder, suffix, nested, extensions)
    if not labels:  # label maps drawn by hand have no data set's suffix
        suffix, labels = "", list_files(folder, "", nested, extensions)
    if not labels:
        raise DataError(f"{folder} holds no label maps ({', '.join(MAP_EXTENSIONS)})")
    instances: dict[str, str] = {}
    if use_instances and spec.instances in ("files", "optional"):
        parent, name = os.path.split(folder)
        beside = join(
            parent, name.replace("labels", "instances") if "labels" in name else name.replace("label", "inst")
        )
        if suffix:
            instances = list_files(folder, spec.layout.instance_suffix, nested, MAP_EXTENSIONS)
        elif beside != folder and _is_dir(beside):
            instances = list_files(beside, "", nested, MAP_EXTENSIONS)
        if instances:
            problems = _unpaired("label map", folder, labels, "instance map", beside, instances)
            if problems:
                raise DataError(". ".join(problems))
    ending = spec.layout.image_suffix if suffix else ""
    return [Item(key + ending, None, labels[key], instances.get(key)) for key in sorted(labels)]


def label_extensions(spec: DatasetSpec) -> tuple[str, ...]:
    """Those of label maps: lossless formats, unless the nearest colour counts."""
    return (*MAP_EXTENSIONS, *_LOSSY) if spec.color_tolerance else MAP_EXTENSIONS


def list_files(folder: str, suffix: str, nested: bool, extensions: tuple[str, ...]) -> dict[str, str]:
    """Stem without `suffix` -> path, for the files of a folder (and of its folders, where `nested`).

    Hidden files and other extensions are passed over. Stems are compared in Unicode's composed form, because macOS
    stores accents decomposed. Raises DataError for two files of one stem, broken links, and label maps stored as JPEG.
    """
    found: dict[str, str] = {}
    lossy = extensions is MAP_EXTENSIONS
    for path, name in _walk(folder, nested):
        stem, extension = os.path.splitext(name)
        extension = extension.lower()
        if lossy and extension in _LOSSY and stem.endswith(suffix):
            raise DataError(f"{path} is a label or instance map in a lossy format, which changes ids; store it as PNG")
        if extension not in extensions or not stem.endswith(suffix):
            continue
        key = unicodedata.normalize("NFC", stem[: len(stem) - len(suffix)] if suffix else stem)
        if key in found:
            raise DataError(f"two files share the stem {stem!r}: {found[key]} and {path}; rename or remove one")
        found[key] = path
    return found


def _walk(folder: str, nested: bool) -> Iterator[tuple[str, str]]:
    """(path, name) of the files in a folder, and with `nested` of those one level below it."""
    for path, name, is_file, is_folder in _scan_remote(folder) if is_remote(folder) else _scan_local(folder):
        if is_file:
            yield path, name
        elif is_folder and nested:
            yield from _walk(path, False)


def _scan_remote(folder: str) -> Iterator[tuple[str, str, bool, bool]]:
    for entry in blobfile.scandir(folder):
        if not entry.name.startswith("."):
            yield entry.path, entry.name, entry.is_file, entry.is_dir


def _scan_local(folder: str) -> Iterator[tuple[str, str, bool, bool]]:
    """(path, name, is a file, is a folder) of what is not hidden; links that lead nowhere are errors."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_file, is_folder = entry.is_file(), entry.is_dir()
            except OSError as error:
                raise DataError(
                    f"{entry.path} cannot be followed ({error.strerror}); is it a link to itself?"
                ) from error
            if entry.is_symlink() and not (is_file or is_folder):
                raise DataError(f"{entry.path} is a link to nothing; remove it or restore what it points to")
            yield entry.path, entry.name, is_file, is_folder


def join(*parts: str) -> str:
    """A path below a local folder or a bucket."""
    return blobfile.join(*parts) if is_remote(parts[0]) else os.path.join(*parts)


def _is_dir(folder: str) -> bool:
    return blobfile.isdir(folder) if is_remote(folder) else os.path.isdir(folder)


def expected_layout(spec: DatasetSpec) -> str:
    """The layout a mode expects, in one line for messages."""
    layout = spec.layout
    folders = [f"{layout.images}/*{layout.image_suffix}.jpg or .png", f"{layout.labels}/*{layout.label_suffix}.png"]
    if spec.instances in ("files", "optional"):
        note = "" if spec.instances == "files" else " (optional)"
        folders.append(f"{layout.instances}/*{layout.instance_suffix}.png{note}")
    return f"the layout of dataset_mode {spec.name} is " + ", ".join(folders) + spec.preparation


def read_cache_settings(data_dir: str | os.PathLike) -> dict | None:
    """What `scripts/data/cache_dataset.py` noted in `cache.json` of a folder that it made; None for other folders."""
    check_address(data_dir)
    path = join(os.fspath(data_dir), CACHE_FILE)
    if not (blobfile.exists(path) if is_remote(path) else os.path.exists(path)):
        return None
    settings = read_cache_note(path)
    if not settings["complete"]:
        raise DataError(f"the cache {data_dir} is unfinished; run scripts/data/cache_dataset.py again to go on")
    return settings


_CACHE_KEYS = {"dataset_mode": str, "image_size": int, "scale_jitter": (int, float), "complete": bool}


def read_cache_note(path: str) -> dict:
    """The content of a `cache.json`. Raises DataError where it is none."""
    try:
        note = parse_json(read_bytes(path))
        wrong = [key for key, kind in _CACHE_KEYS.items() if not isinstance(note[key], kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {note[wrong[0]]!r}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path} is not the note of a cache ({type(error).__name__}: {error}); delete that folder and run "
            "scripts/data/cache_dataset.py again"
        ) from error
    return note


def _split_folder(spec: DatasetSpec, root: str, split: str) -> str:
    """The name of the split's folder: the first of the spec's candidates whose photographs or labels are there."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    if not _is_dir(root):
        raise MissingSplitError(f"the data folder {root} does not exist; {expected_layout(spec)}")
    names = spec.layout.splits[split]
    for name in names:
        folders = [join(root, part.format(split=name)) for part in (spec.layout.images, spec.layout.labels)]
        present = [_is_dir(folder) for folder in folders]
        if all(present):
            return name
        if any(present):
            missing, there = folders[present.index(False)], folders[present.index(True)]
            raise DataError(f"{there} exists, but {missing} does not; {expected_layout(spec)}")
    tried = ", ".join(join(root, spec.layout.images.format(split=name)) for name in names)
    raise MissingSplitError(f"{root} has no {split} split (looked for {tried}); {expected_layout(spec)}")


def _unpaired(kind: str, folder: str, files: dict, other: str, other_folder: str, others: dict, remedy="") -> list[str]:
    """What is wrong where a file of one kind has no partner of the other, or the reverse; [] where nothing is."""
    lonely = sorted(files.keys() - others.keys())
    extra = sorted(others.keys() - files.keys())
    problems = []
    if lonely:
        problems.append(f"{_count(lonely, kind)} in {folder} with no {other} in {other_folder}: {_some(files, lonely)}")
    if extra:
        problems.append(f"{_count(extra, other)} in {other_folder} with no {kind} in {folder}: {_some(others, extra)}")
    advice = f" (files pair by name; add the missing ones or remove the extra{remedy})"
    return [problem + advice for problem in problems]


def _count(keys: list, kind: str) -> str:
    return f"{len(keys)} {kind}" + ("s" if len(keys) > 1 else "")


def _some(files: dict[str, str], keys: list[str]) -> str:
    return some_names([os.path.basename(files[key]) for key in keys])


def printable(text: str) -> str:
    """Text for a page, a terminal or a list: what is not (bytes of a file name, line breaks) becomes an escape."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") else ascii(c)[1:-1] for c in text)


def some_names(names: Sequence[str]) -> str:
    """The first few, for a message."""
    return ", ".join(map(printable, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
