"""Where a stored label or instance map becomes ids, whatever mode its file has, or is refused with the remedy."""

import numpy as np
from PIL import Image

from .notes import Notes
from .picture_files import SCALED, TURNS, Header, lossy_format, open_picture
from .proposals import remedy_for_ids
from .specs import DataError, DatasetSpec

_IDS = 65536  # ids of label maps are below
_ALPHA = {"LA": "L", "RGBA": "RGB", "PA": "P"}  # mode with a last band of transparency -> without it
_SHOWN = 5  # values named in a message


class UnknownIds(DataError):
    """Ids that are no classes. `counts`: pixels by stored id of the whole map, for what only all maps together show."""

    def __init__(self, message: str, counts: dict[int, int] | None = None):
        super().__init__(message)
        self.counts = counts or {}


def open_map(
    path: str, kind: str, of_ids: bool = True, notes: Notes | None = None, max_pixels: int | None = None
) -> Image.Image:
    """A decoded label or instance map: with `of_ids` of mode L, P, 1 or I (and its kin), else as it is stored.

    Raises DataError where its format, its ids or its orientation are not to be trusted.
    """
    image, header, orientation = open_picture(path, kind, max_pixels=max_pixels)
    if (lossy := lossy_format(header)) is not None:
        raise DataError(
            f"the {kind} {path} is stored as {lossy}, which may change ids; save the original as PNG (converting this"
            " file does not bring them back)"
        )
    if of_ids and header.mode == "L" and header.raw_mode.startswith(SCALED):
        raise DataError(
            f"the {kind} {path} is grey with {header.raw_mode[2]} bits per pixel, which readers scale to brightness, so"
            " that its ids are lost; save it with 8 bits, or as a palette PNG"
        )
    if orientation in TURNS:
        raise DataError(
            f"the {kind} {path} has an orientation tag ({orientation}), so that its pixels are ambiguous; save"
            " it without the tag, as PNG"
        )
    if of_ids and image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        image = _other_modes(image, header, path, kind, notes if notes is not None else Notes())
    return image


def _other_modes(image: Image.Image, header: Header, path: str, kind: str, notes: Notes) -> Image.Image:
    """The ids of a map that is stored as colours with equal channels, or with transparency that is nowhere used."""
    what = f"{kind}s are stored as {image.mode}"
    if ";16" in header.raw_mode:
        raise DataError(
            f"the {kind} {path} has {len(image.getbands())} channels of 16 bits, of which readers keep the high byte,"
            " so that its ids are lost; save it with one channel"
        )
    if image.mode in _ALPHA:
        if image.getextrema()[-1][0] < 255:
            raise DataError(
                f"the {kind} {path} is partly transparent (mode {image.mode}), and a transparent pixel has no sure id;"
                " save it without transparency, and give such pixels an id of their own"
            )
        if image.mode != "RGBA":
            notes.add(f"{what}, nowhere transparent: read as ids", path)
            return image.getchannel(0)
    if image.mode in ("RGB", "RGBA", "RGBX"):
        red, green, blue = image.split()[:3]
        if red.tobytes() == green.tobytes() == blue.tobytes():
            notes.add(f"{what} with equal channels: read as ids", path)
            return red
    raise DataError(
        f"the {kind} {path} is a picture of mode {image.mode}, not of one id per pixel; store ids (mode L or P)"
        + (
            ', or in dataset_mode custom describe its colours in dataset.json with "label_encoding": "colors"'
            if kind == "label map"
            else ", 8 or 16 bits"
        )
    )


def read_label(path: str, spec: DatasetSpec, notes: Notes | None = None) -> tuple[Image.Image, np.ndarray | None]:
    """A label map with ids that are known to fit, and the table (int32) that turns them into the network's ids.

    The ids are checked on the whole map, so that a wrong one is found even where shrinking would lose it. `notes`
    collects what was read otherwise than it is stored. Raises DataError for ids outside the classes, colours without a
    class, and pictures that are no map of ids.
    """
    image = open_map(path, "label map", spec.label_colors is None, notes, spec.max_pixels)
    if spec.label_colors is not None:
        image = _ids_from_colors(image, path, spec)
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


def _ids_from_colors(image: Image.Image, path: str, spec: DatasetSpec) -> Image.Image:
    """The ids of an RGB map in the classes' colours."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    packed = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]  # [H, W]
    colors = spec.label_colors.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    order = np.argsort(colors)
    place = np.searchsorted(colors[order], packed).clip(max=len(colors) - 1)
    wrong = colors[order][place] != packed
    if wrong.any():
        unknown = np.unique(packed[wrong])
        shown = ", ".join(str((int(c) >> 16, int(c) >> 8 & 255, int(c) & 255)) for c in unknown[:_SHOWN])
        more = f", ... ({len(unknown)} in all; was it saved with smoothing?)" if len(unknown) > _SHOWN else ""
        raise DataError(
            f"the label map {path} has colours that belong to no class: {shown}{more}; add them to dataset.json"
        )
    return Image.fromarray(order[place].astype(np.uint8 if len(colors) <= 256 else np.int32))


def read_instances(path: str, notes: Notes | None = None, max_pixels: int | None = None) -> Image.Image:
    """An instance map at its full depth, mode I (int32)."""
    return Image.fromarray(
        np.asarray(open_map(path, "instance map", notes=notes, max_pixels=max_pixels)).astype(np.int32)
    )
