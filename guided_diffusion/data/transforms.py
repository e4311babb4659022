"""Reading photographs and maps, and the geometry that they share: resize, crop, flip.

Photographs shrink by halving with a box filter while they are twice too large, then with one bicubic step; maps of ids
take the nearest pixel. Exact to guided-diffusion's and SDM's loaders (`tests/test_image_datasets.py`).
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from .color_profiles import to_srgb
from .masks import open_map, read_instances, read_label
from .notes import Notes
from .picture_files import TURNS, Header, lossy_format, open_picture, read_header, read_orientation
from .specs import DataError, DatasetSpec

__all__ = [
    "Geometry",
    "Header",
    "cached_image",
    "check_sizes",
    "lossy_format",
    "open_map",
    "read_header",
    "read_image",
    "read_instances",
    "read_label",
    "read_orientation",
    "sampling_geometry",
    "training_geometry",
    "whole_picture",
]

_MIN_CROP = 0.8  # the smallest part of the short side that a random crop keeps, as in guided-diffusion


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


def read_image(path: str, spec: DatasetSpec, notes: Notes | None = None) -> Image.Image:
    """A photograph as RGB.

    Grey, palette and CMYK pictures are converted, an opaque alpha channel is dropped, and colours of another profile
    become sRGB unless `spec.icc` is "ignore"; `notes` collects that. Raises DataError for unreadable
    files, real transparency, more than 8 bits per channel, and an orientation tag that `spec.exif` refuses.
    """
    image, header, orientation = open_picture(path, "photograph", spec.exif != "ignore", spec.max_pixels)
    if spec.exif != "ignore" and orientation != 1:
        if spec.exif == "refuse":
            raise DataError(
                f"the photograph {path} has an EXIF orientation tag: viewers turn it, and its label map may or may not"
                ' be turned with it; set "exif" in dataset.json to "apply" (labels match the turned picture) or to'
                ' "ignore" (labels match the stored pixels)'
            )
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
    if header.mode.startswith(("I", "F")) or ";16" in header.raw_mode:  # of 16-bit RGB, Pillow keeps the high byte
        raise DataError(
            f"the photograph {path} has more than 8 bits per channel (mode {header.raw_mode}); convert it to 8 bits"
            " with a window that suits its values"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise DataError(f"the photograph {path} is partly transparent; flatten it onto a background")
    if spec.icc == "convert":
        image = to_srgb(image, path, notes if notes is not None else Notes())
    if spec.grey:
        image = image.convert("L")
    return image.convert("RGB")


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
