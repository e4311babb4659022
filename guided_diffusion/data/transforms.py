"""Reading photographs and maps, and the geometry that they share: resize, crop, flip.

Photographs shrink by halving with a box filter while they are twice too large, then with one bicubic step; maps of ids
take the nearest pixel. Exact to guided-diffusion's and SDM's loaders (`tests/test_image_datasets.py`).
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from .listing import open_stream
from .specs import DataError, DatasetSpec

_MIN_CROP = 0.8  # the smallest part of the short side that a random crop keeps, as in guided-diffusion
_ORIENTATION = 0x0112
_TURNS = {  # what an orientation tag asks a viewer to do with the stored pixels
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**_TURNS, 6: _TURNS[8], 8: _TURNS[6]}  # all others are their own inverse
# What gives a map's ids back as they were stored, by the decoder's word: a file's name may say anything.
_LOSSLESS = ("PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "PCX", "SGI")
_LOSSLESS_TIFF = (
    "raw",
    "packbits",
    "group3",
    "group4",
    "lzma",
    "zstd",
    "tiff_raw",
    "tiff_lzw",
    "tiff_adobe_deflate",
    "tiff_deflate",
    "tiff_ccitt",
)  # fmt: skip  (beginnings of a compression's name)
_SCALED = ("L;2", "L;4")  # raw modes of grey that Pillow spreads over 0 to 255


@dataclass(frozen=True)
class Geometry:
    """A joint transform: resize to `size` (width, height), crop `box` out of that, mirror where `flip`."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    flip: bool = False

    def apply_to_image(self, image: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3]."""
        width, height = self.size
        while min(image.size) >= 2 * min(width, height):
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        return self._finish(image.resize(self.size, Image.Resampling.BICUBIC))

    def apply_to_map(self, ids: Image.Image) -> np.ndarray:
        """The ids in the picture's own depth, [H, W]."""
        return self._finish(ids.resize(self.size, Image.Resampling.NEAREST))

    def _finish(self, image: Image.Image) -> np.ndarray:
        if self.box != (0, 0, *self.size):
            image = image.crop(self.box)
        return np.array(ImageOps.mirror(image) if self.flip else image)


def _short_side(size: tuple[int, int], target: int) -> tuple[int, int]:
    """(width, height) scaled until the short side is `target`; what halvings leave is scaled, as the original does."""
    width, height = size
    while min(width, height) >= 2 * target:
        width, height = width // 2, height // 2
    scale = target / min(width, height)
    return round(width * scale), round(height * scale)


def sampling_geometry(size: tuple[int, int], image_size: int, crop: str) -> Geometry:
    """The whole picture, squeezed into a square (`crop` "square") or with its aspect kept ("keep_aspect")."""
    target = _short_side(size, image_size) if crop == "keep_aspect" else (image_size, image_size)
    return Geometry(target, (0, 0, *target))


def training_geometry(
    size: tuple[int, int],
    image_size: int,
    crop: str,
    rng: np.random.Generator,
    *,
    random_crop: bool,
    random_flip: bool,
    scale_jitter: float = 0.0,
) -> Geometry:
    """A crop of the training transform for a photograph of `size` (width, height).

    "square": a square whose side is between 0.8 and 1 of the resized short side (`random_crop`), else the central one.
    "keep_aspect": the whole picture. `scale_jitter` J enlarges the picture by a further factor, log-uniform in
    [1, 1 + J], before the crop. The same number of random values is drawn whatever is switched on.
    """
    draw_side, draw_zoom, draw_x, draw_y, draw_flip = rng.random(5)
    zoom = math.exp(draw_zoom * math.log1p(scale_jitter))
    side = image_size
    if random_crop and crop == "square":
        side += int(draw_side * (math.ceil(image_size / _MIN_CROP) - image_size + 1))
    resized = _short_side(size, round(side * zoom))
    width, height = _short_side(size, image_size) if crop == "keep_aspect" else (image_size, image_size)
    resized = max(resized[0], width), max(resized[1], height)  # halvings of odd sides may round a pixel away
    free_x, free_y = resized[0] - width, resized[1] - height
    if random_crop:
        left, top = int(draw_x * (free_x + 1)), int(draw_y * (free_y + 1))
    else:
        left, top = free_x // 2, free_y // 2
    return Geometry(resized, (left, top, left + width, top + height), bool(random_flip and draw_flip < 0.5))


def whole_picture(training: bool, crop: str, scale_jitter: float) -> bool:
    """Whether the transform resizes the whole picture, in the same way each time."""
    return not training or (crop == "keep_aspect" and scale_jitter == 0)


def cached_image(image: Image.Image, image_size: int, crop: str, training: bool, scale_jitter: float) -> Image.Image:
    """The part of a photograph's resizing that every later use at `image_size` begins with, done once.

    The whole resizing where it is the same each time (sampling; training with the aspect kept and no jitter), else the
    halvings that even the largest crop's side asks for. Either is a prefix of the same steps, hence exact.
    """
    if whole_picture(training, crop, scale_jitter):
        return Image.fromarray(sampling_geometry(image.size, image_size, crop).apply_to_image(image))
    side = image_size if crop == "keep_aspect" else math.ceil(image_size / _MIN_CROP)
    largest = round(side * (1 + scale_jitter))
    while min(image.size) >= 2 * largest:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


@dataclass(frozen=True)
class Header:
    """What a file says of its pixels: (width, height) as stored, Pillow's mode, and the raw mode (`L;4`, `RGB;16B`; the
    mode again where the format has none); of a TIFF also the compression."""

    format: str
    size: tuple[int, int]
    mode: str
    raw_mode: str
    compression: str = ""


def lossy_format(header: Header) -> str | None:
    """The name of the format where it may change ids; None where it gives them back as they were stored."""
    if header.format not in _LOSSLESS:
        return header.format or "an unknown format"
    if header.format == "TIFF" and not header.compression.startswith(_LOSSLESS_TIFF):
        return f"TIFF with compression {header.compression or 'unknown'}"
    return None


def read_header(picture: Image.Image) -> Header:
    """Of a picture that was opened and not decoded: decoding forgets the raw mode."""
    size, raw_mode = picture.size, picture.mode
    if picture.format in ("PNG", "TIFF") and picture.tile:
        arguments = picture.tile[0][3]
        raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    if picture.format == "TIFF":  # newer versions of Pillow give the turned size
        size = picture.tag_v2[256], picture.tag_v2[257]
    compression = str(picture.info.get("compression", "")) if picture.format == "TIFF" else ""
    return Header(picture.format, size, picture.mode, raw_mode, compression)


def read_orientation(picture: Image.Image) -> int:
    """The orientation tag, 1 where there is none. Decoding a TIFF turns it and removes the tag; this decodes a PNG."""
    return picture.getexif().get(_ORIENTATION, 1)


def _open(path: str, kind: str, turnable: bool = False) -> tuple[Image.Image, Header, int]:
    """The decoded picture as stored, its header and orientation tag; errors become DataErrors that name the file.

    The tag is read from TIFFs, which Pillow turns, and where the caller wants to know it (`turnable`), else given as 1:
    a damaged EXIF block does no harm where it is not used.
    """
    try:
        image = Image.open(open_stream(path))
        header = read_header(image)
        orientation = read_orientation(image) if turnable or header.format == "TIFF" else 1
        image.load()
        if header.format == "TIFF" and orientation in _BACK and read_orientation(image) == 1:
            image = image.transpose(_BACK[orientation])  # Pillow turned it
        return image, header, orientation
    except FileNotFoundError as error:
        raise DataError(f"the {kind} {path} does not exist, or not any more") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise DataError(
            f"the {kind} {path} cannot be read ({error}); replace it or remove it with its partners"
        ) from error


def open_map(path: str, kind: str, of_ids: bool = True) -> Image.Image:
    """A decoded label or instance map; DataError where its format, its ids (`of_ids`) or its orientation are not to
    be trusted."""
    image, header, orientation = _open(path, kind)
    if (lossy := lossy_format(header)) is not None:
        raise DataError(
            f"the {kind} {path} is stored as {lossy}, which may change ids; save the original as PNG (converting this"
            " file does not bring them back)"
        )
    if of_ids and header.mode == "L" and header.raw_mode.startswith(_SCALED):
        raise DataError(
            f"the {kind} {path} is grey with {header.raw_mode[2]} bits per pixel, which readers scale to brightness, so"
            " that its ids are lost; save it with 8 bits, or as a palette PNG"
        )
    if orientation in _TURNS:
        raise DataError(
            f"the {kind} {path} has an orientation tag ({orientation}), so that its pixels are ambiguous; save"
            " it without the tag, as PNG"
        )
    return image


def read_image(path: str, spec: DatasetSpec) -> Image.Image:
    """A photograph as RGB.

    Grey, palette and CMYK pictures are converted, an opaque alpha channel is dropped. Raises DataError for unreadable
    files, real transparency, more than 8 bits per channel, and an orientation tag that `spec.exif` refuses.
    """
    image, header, orientation = _open(path, "photograph", turnable=spec.exif != "ignore")
    if spec.exif != "ignore" and orientation != 1:
        if spec.exif == "refuse":
            raise DataError(
                f"the photograph {path} has an EXIF orientation tag: viewers turn it, and its label map may or may not"
                ' be turned with it; set "exif" in dataset.json to "apply" (labels match the turned picture) or to'
                ' "ignore" (labels match the stored pixels)'
            )
        if orientation in _TURNS:
            image = image.transpose(_TURNS[orientation])
    if header.mode.startswith(("I", "F")) or ";16" in header.raw_mode:  # of 16-bit RGB, Pillow keeps the high byte
        raise DataError(
            f"the photograph {path} has more than 8 bits per channel (mode {header.raw_mode}); convert it to 8 bits"
            " with a window that suits its values"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise DataError(f"the photograph {path} is partly transparent; flatten it onto a background")
    if spec.grey:
        image = image.convert("L")
    return image.convert("RGB")


def read_label(path: str, spec: DatasetSpec) -> tuple[Image.Image, np.ndarray | None]:
    """A label map with ids that are known to fit, and the table (int32) that turns them into the network's ids.

    The ids are checked on the whole map, so that a wrong one is found even where shrinking would lose it.
    Raises DataError for ids outside the classes, colours without a class, and pictures that are no map of ids.
    """
    image = open_map(path, "label map", of_ids=spec.label_colors is None)
    if spec.label_colors is not None:
        image = _ids_from_colors(image, path, spec)
        table = spec.lookup_table(max(256, len(spec.label_colors)))
        present = np.unique(np.asarray(image))
    elif image.mode in ("L", "P", "1"):
        if image.mode != "L":
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        present = np.flatnonzero(image.histogram())
        table = spec.lookup_table(256)
    elif image.mode.startswith("I"):
        ids = np.asarray(image).astype(np.int32)
        present = np.unique(ids)
        table = spec.lookup_table(65536)
        image = Image.fromarray(ids)
    else:
        raise DataError(
            f"the label map {path} is a picture of mode {image.mode}, not of one id per pixel; store ids (mode L or P),"
            ' or in dataset_mode custom describe its colours in dataset.json with "label_encoding": "colors"'
        )
    allowed = (present >= 0) & (present < len(table))
    allowed[allowed] = table[present[allowed]] >= 0
    if not allowed.all():
        _refuse_ids(path, spec, present[~allowed])
    return image, table


def check_sizes(
    spec: DatasetSpec, path: str, size: tuple[int, int], other_path: str, other: tuple[int, int], scale: bool = False
) -> None:
    """Raises DataError where two files of an item differ in size (width, height), or with `scale` in aspect."""
    same_aspect = abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)  # to a pixel's rounding
    if size == other or (scale and same_aspect):
        return
    hint = ' (or, for label maps of the same aspect, set "label_scale": true in dataset.json)'
    raise DataError(
        f"{path} is {size[0]} x {size[1]} but {other_path} is {other[0]} x {other[1]}; they must have one size"
        + (hint if spec.name == "custom" and same_aspect else "")
    )


def _refuse_ids(path: str, spec: DatasetSpec, ids: np.ndarray) -> None:
    if spec.label_colors is not None:
        shown = ", ".join(str(tuple(color)) for color in spec.label_colors[ids].tolist()[:5])
        raise DataError(
            f"the label map {path} has colours of classes beyond num_classes {spec.num_classes}: {shown}; "
            f"dataset.json names {len(spec.label_colors)} classes: raise --num_classes, or remove those from the map"
        )
    known = f"the classes are 0 ({spec.class_names[0]}) to {spec.num_classes - 1} ({spec.class_names[-1]})"
    if spec.name == "custom":
        remedy = 'raise --num_classes, or in dataset.json name an "ignore_id" or a "remap"'
    else:
        remedy = f"check --num_classes and that this is data for dataset_mode {spec.name}"
    raise DataError(
        f"the label map {path} has ids that do not fit num_classes {spec.num_classes}: {spec.describe_ids(ids)};"
        f" {known}; {remedy}"
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
        shown = ", ".join(str((int(c) >> 16, int(c) >> 8 & 255, int(c) & 255)) for c in unknown[:5])
        more = f", ... ({len(unknown)} in all; was it saved with smoothing?)" if len(unknown) > 5 else ""
        raise DataError(
            f"the label map {path} has colours that belong to no class: {shown}{more}; add them to dataset.json"
        )
    return Image.fromarray(order[place].astype(np.uint8 if len(colors) <= 256 else np.int32))


def read_instances(path: str) -> Image.Image:
    """An instance map at its full depth, mode I (int32)."""
    image = open_map(path, "instance map")
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise DataError(
            f"the instance map {path} is a picture of mode {image.mode}; store one id per pixel, 8 or 16 bits"
        )
    return Image.fromarray(np.asarray(image).astype(np.int32))
