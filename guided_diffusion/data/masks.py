"""Where a stored label or instance map becomes ids, whatever mode its file has, or is refused with the remedy."""

import os

import numpy as np
from PIL import Image

from .label_colors import ids_from_colors
from .notes import Notes
from .picture_files import COLORS, SCALED, TURNS, Header, lossy_format, open_picture, read_header
from .proposals import remedy_for_ids
from .segments import ids_of_segments, packed_ids
from .specs import DataError, DatasetSpec

_IDS = 65536  # ids of label maps are below
_SHOWN = 5  # values named in a message


class UnknownIds(DataError):
    """Ids that are no classes. `counts`: pixels by stored id of the whole map, for what only all maps together show."""

    def __init__(self, message: str, counts: dict[int, int] | None = None):
        super().__init__(message)
        self.counts = counts or {}


def read_ids(source: str | os.PathLike | Image.Image | np.ndarray, kind: str) -> np.ndarray:
    """Ids int64 [H, W] of a file, picture or array; `kind` is what a message calls it.

    Raises DataError for a file whose ids are not to be trusted (see `open_map`), ValueError for anything else that is
    no map of whole ids.
    """
    if isinstance(source, (str, os.PathLike)):
        source = open_map(os.fspath(source), kind)
    elif isinstance(source, Image.Image) and source.format and (lossy := lossy_format(read_header(source))):
        raise ValueError(f"the {kind} was opened from a file stored as {lossy}, which may change ids; use a PNG")
    ids = np.asarray(source)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iub":
        raise ValueError(
            f"the {kind} must be whole ids [H, W], one per pixel; got {ids.dtype} of shape {list(ids.shape)}"
        )
    return ids.astype(np.int64)


def open_map(
    path: str, kind: str, content: str = "ids", notes: Notes | None = None, max_pixels: int | None = None
) -> Image.Image:
    """A decoded label or instance map: of `content` "ids", in mode L, P, 1 or I (and its kin); of others (see
    `DatasetSpec.label_content`), as it is stored.

    Raises DataError where its format, its ids or its orientation are not to be trusted.
    """
    image, header, orientation = open_picture(path, kind, max_pixels=max_pixels)
    if content != "nearby colors" and (lossy := lossy_format(header)) is not None:
        raise DataError(
            f"the {kind} {path} is stored as {lossy}, which may change ids; save the original as PNG (converting this"
            " file does not bring them back)"
        )
    if content in ("ids", "ids or colors", "segments") and header.mode == "L" and header.raw_mode.startswith(SCALED):
        raise DataError(
            f"the {kind} {path} is grey with {header.raw_mode[2]} bits per pixel, which readers scale to brightness, so"
            " that its ids are lost; save it with 8 bits, or as a palette PNG"
        )
    if orientation in TURNS:
        raise DataError(
            f"the {kind} {path} has an orientation tag ({orientation}), so that its pixels are ambiguous; save"
            " it without the tag, as PNG"
        )
    if content in ("ids", "ids or colors") and image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        image = _other_modes(image, header, path, kind, content, notes if notes is not None else Notes())
    elif content == "segments":
        _check_channels(image, header, path, kind)
    return image


def _other_modes(image: Image.Image, header: Header, path: str, kind: str, content: str, notes: Notes) -> Image.Image:
    """The ids of a map that is stored as colours with equal channels, with transparency that is nowhere used, as
    floating-point numbers, or (an instance map) as segments' ids in three channels."""
    what = f"{kind}s are stored as {image.mode}"
    if image.mode == "F":
        ids = _whole_numbers(np.asarray(image), path, kind)
        notes.add(f"{kind}s are stored as floating-point numbers: whole numbers are read as ids", path)
        return ids
    _check_channels(image, header, path, kind)
    if image.mode in ("LA", "PA"):
        notes.add(f"{what}, nowhere transparent: read as ids", path)
        return image.getchannel(0)
    if image.mode in COLORS:
        red, green, blue = image.split()[:3]
        if red.tobytes() == green.tobytes() == blue.tobytes():
            notes.add(f"{what} with equal channels: read as ids", path)
            return red
        if content == "ids or colors":
            return image
        if kind == "instance map":
            notes.add(f"{what}: read as R + 256 G + 65536 B", path)
            return Image.fromarray(packed_ids(image, path))
    raise DataError(
        f"the {kind} {path} is a picture of mode {image.mode}, not of one id per pixel; store ids (mode L or P)"
        + (
            ', or in dataset_mode custom describe its colours in dataset.json with "label_encoding": "colors"'
            if kind == "label map"
            else ", 8 or 16 bits"
        )
    )


def _check_channels(image: Image.Image, header: Header, path: str, kind: str) -> None:
    """Raises DataError where the channels of a map are not what the file holds, or where some pixels have no id."""
    if ";16" in header.raw_mode and len(image.getbands()) > 1:
        raise DataError(
            f"the {kind} {path} has {len(image.getbands())} channels of 16 bits, of which readers keep the high byte,"
            " so that its ids are lost; save it with one channel"
        )
    if image.mode in ("LA", "PA", "RGBA") and image.getextrema()[-1][0] < 255:
        raise DataError(
            f"the {kind} {path} is partly transparent (mode {image.mode}), and a transparent pixel has no sure id;"
            " save it without transparency, and give such pixels an id of their own"
        )


def _whole_numbers(values: np.ndarray, path: str, kind: str) -> Image.Image:
    """Mode I. Raises DataError where a value is no whole number of 32 bits with a sign."""
    whole = (np.rint(values) == values) & (np.abs(values) < 2**31)
    if not whole.all():
        odd, counts = np.unique(values[~whole], return_counts=True)
        shown = ", ".join(f"{value:.6g}" for value in odd[np.argsort(-counts, kind="stable")][:_SHOWN])
        off = np.abs(odd - np.rint(odd)).max()
        if 0 < off < 0.01:
            remedy = f"they are within {off:.1g} of whole numbers: round the mask, and save it with 8 or 16 bits"
        elif odd.min() >= 0 and odd.max() < 1:
            remedy = "are they probabilities? Save the id of the most probable class, with 8 or 16 bits"
        else:
            remedy = "save one id per pixel, with 8 or 16 bits"
        raise DataError(
            f"the {kind} {path} holds numbers that are no ids, on {100 * (~whole).mean():.2g} % of its pixels: {shown}"
            + (f", ... ({len(odd)} in all)" if len(odd) > _SHOWN else "")
            + f"; {remedy}"
        )
    return Image.fromarray(values.astype(np.int32))


def storable_map(image: Image.Image) -> Image.Image:
    """A map in a mode that PNG stores: numbers of 32 bits with 16 bits where they fit, else as a panoptic map (which
    instance maps may be)."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    ids = np.asarray(image).astype(np.int32)
    if ids.min() >= 0 and ids.max() < _IDS:
        return Image.fromarray(ids.astype(np.uint16))
    return Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8))


def read_label(path: str, spec: DatasetSpec, notes: Notes | None = None) -> tuple[Image.Image, np.ndarray | None]:
    """A label map with ids that are known to fit, and the table (int32) that turns them into the network's ids.

    The ids are checked on the whole map, so that a wrong one is found even where shrinking would lose it. `notes`
    collects what was read otherwise than it is stored. Raises DataError for ids outside the classes, colours without a
    class, and pictures that are no map of ids.
    """
    image = open_map(path, "label map", spec.label_content, notes, spec.max_pixels)
    if spec.palette_layouts and image.mode in COLORS:
        return _ids_by_palette(image, path, spec, notes), np.arange(max(256, spec.num_classes), dtype=np.int32)
    if spec.segments_files:
        image = ids_of_segments(image, path, spec.segments_files)
    if spec.label_colors is not None:
        image = ids_from_colors(image, path, spec.label_colors, spec.color_tolerance, notes)
        table = spec.lookup_table(max(256, len(spec.label_colors)))
        present = np.unique(np.asarray(image))
    elif image.mode in ("L", "P", "1"):
        if image.mode != "L":
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        present = np.flatnonzero(image.histogram())
        table = spec.lookup_table(256)
    else:
        ids = np.asarray(image).astype(np.int32)
        present = np.unique(ids)
        table = spec.lookup_table(_IDS)
        image = Image.fromarray(ids)
    allowed = (present >= 0) & (present < len(table))
    allowed[allowed] = table[present[allowed]] >= 0
    if not allowed.all():
        _refuse_ids(path, spec, image, present[~allowed])
    return image, table


def _ids_by_palette(image: Image.Image, path: str, spec: DatasetSpec, notes: Notes | None) -> Image.Image:
    """The network's ids of a layout in a data set's customary colours."""
    table = f"the colours of dataset_mode {spec.name}; store ids, or these colours exactly"
    ids = ids_from_colors(image, path, spec.palette, 0, table=table)
    if notes is not None:
        notes.add(f"label maps are pictures in the colours of {spec.name}: read by its palette", path)
    return ids


def _refuse_ids(path: str, spec: DatasetSpec, image: Image.Image, ids: np.ndarray) -> None:
    if spec.label_colors is not None:
        shown = ", ".join(str(tuple(color)) for color in spec.label_colors[ids].tolist()[:_SHOWN])
        raise DataError(
            f"the label map {path} has colours of classes beyond num_classes {spec.num_classes}: {shown}; "
            f"dataset.json names {len(spec.label_colors)} classes: raise --num_classes, or remove those from the map"
        )
    known = f"the classes are 0 ({spec.class_names[0]}) to {spec.num_classes - 1} ({spec.class_names[-1]})"
    values, pixels = np.unique(np.asarray(image), return_counts=True)
    counts = dict(zip(values.tolist(), pixels.tolist(), strict=True))
    raise UnknownIds(
        f"the label map {path} has ids that do not fit num_classes {spec.num_classes}: {spec.describe_ids(ids)};"
        f" {known}; {remedy_for_ids(counts, spec)}",
        counts,
    )


def read_instances(path: str, notes: Notes | None = None, max_pixels: int | None = None) -> Image.Image:
    """An instance map at its full depth, mode I (int32)."""
    return Image.fromarray(
        np.asarray(open_map(path, "instance map", notes=notes, max_pixels=max_pixels)).astype(np.int32)
    )
