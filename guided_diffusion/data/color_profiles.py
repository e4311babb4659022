"""Colour profiles of photographs: what is not sRGB already becomes sRGB, which networks and viewers take pixels for."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from .notes import Notes

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space -> the mode of pictures it is for
_ROUNDING = 2  # levels by which two sRGB profiles may differ: no conversion


@dataclass(frozen=True)
class _Profile:
    """mode: of the pictures that it is for. transform: to sRGB; None where that changes nothing."""

    name: str
    mode: str
    transform: ImageCms.ImageCmsTransform | None


def to_srgb(image: Image.Image, path: str, notes: Notes) -> Image.Image:
    """The photograph with its embedded profile applied, in RGB; as it is where there is none, where it means sRGB, or
    where it cannot be used, which `notes` says. The profile is not part of the result."""
    content = image.info.get("icc_profile")
    if not content:
        return image
    profile = _read(content)
    without_alpha = {"RGBA": "RGB", "LA": "L", "P": "RGB", "1": "L"}.get(image.mode, image.mode)
    if profile is None or (without_alpha != profile.mode and (without_alpha, profile.mode) != ("L", "RGB")):
        notes.add("photographs have a colour profile that is damaged or of another kind: it is ignored", path)
    elif profile.transform is not None:
        notes.add(f"photographs have the colour profile {profile.name!r}: converted to sRGB", path)
        image = ImageCms.applyTransform(image.convert(profile.mode), profile.transform)
    image.info.pop("icc_profile", None)
    return image


@lru_cache(maxsize=64)  # a data set has few different profiles
def _read(content: bytes) -> _Profile | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = ImageCms.getProfileDescription(profile).strip() or "of no name"
        mode = _MODES.get(profile.profile.xcolor_space.strip())
        if mode is None:
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return _Profile(name, mode, None if _changes_nothing(transform, mode) else transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether sRGB comes out as it went in, which a profile's name does not tell."""
    if mode == "CMYK":
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        colors = Image.fromarray(steps[None])
    else:
        colors = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3))
    after = np.asarray(ImageCms.applyTransform(colors, transform)).astype(int)
    return bool(np.abs(after - np.asarray(colors.convert("RGB"))).max() <= _ROUNDING)
