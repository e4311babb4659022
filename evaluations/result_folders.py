"""Folders of images: what is in them, whether it can be read, and reading it in several processes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import EvaluationError, Report
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
DEEP_MODES = ("I", "F")  # I, I;16, I;16B, F: more than 8 bits per channel, which Pillow would clip rather than scale
END_OF_JPEG = b"\xff\xd9"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on damaged files
NAMES_SHOWN = 3


def list_images(folder: Path) -> list[Path]:
    """The images of a folder (no hidden files, no sub-folders) by name. Raises EvaluationError if there are none."""
    if not folder.exists():
        raise EvaluationError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: not a folder of images")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    # a broken link counts as an image, to be named as unreadable rather than passed over
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]
    if not images:
        inside = [entry.name for entry in entries if entry.is_dir()]
        hint = f"it holds the folders {shown(inside)}: name one of them" if inside else "is it the right folder?"
        raise EvaluationError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder; {hint}")
    return images


def by_name(images: Iterable[Path]) -> dict[str, Path]:
    """Images by their name without suffix, by which files are paired. Raises EvaluationError if two share one."""
    named: dict[str, Path] = {}
    for path in images:
        if path.stem in named:
            raise EvaluationError(f"{path} and {named[path.stem].name} have the same name; remove one of them")
        named[path.stem] = path
    return named


def sample_folders(results: Path, warn: Callable[[str], None]) -> list[Path]:
    """The sub-folders of a results folder whose names begin with `samples`, each holding a sample of every layout.

    `samples` beside `samples_00` is left out with a warning: sampling makes the first sample twice, under either name.
    Raises EvaluationError for samples_00 beside samples_000, of runs with different numbers of samples.
    """
    folders = sorted(entry for entry in results.iterdir() if entry.is_dir() and entry.name.startswith("samples"))
    numbered = [entry.name for entry in folders if re.fullmatch(r"samples_0\d+", entry.name)]
    first = [name for name in numbered if not int(name.removeprefix("samples_"))]
    if len(first) > 1:
        raise EvaluationError(
            f"{results}: {shown(first)} are of different runs and hold the same samples; move one run's folders away"
        )
    if first and results / "samples" in folders:
        warn(f"{results}: samples/ is left out, since {first[0]}/ holds the same samples")
        folders.remove(results / "samples")
    return folders


def read_names(file: Path) -> list[str]:
    """Names listed in a text file, one a line, with or without suffix. Raises EvaluationError if there are none."""
    if not file.is_file():
        raise EvaluationError(f"{file}: no such file; it should list one name a line")
    try:
        names = [Path(line.strip()) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{file}: not a text file; it should list one name a line") from error
    if not names:
        raise EvaluationError(f"{file}: lists no names; it should list one a line")
    return [name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name for name in names]


def shown(names: Sequence[object]) -> str:
    """The first few of a list of names, and how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(map(str, names[:NAMES_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


@dataclass
class CheckedImages:
    """Images found readable, with size (width, height) and Pillow mode, and the others, with the reason."""

    good: dict[Path, tuple[tuple[int, int], str]] = field(default_factory=dict)
    bad: dict[Path, str] = field(default_factory=dict)

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many images have which size."""
        return Counter(size for size, _ in self.good.values())

    @property
    def modes(self) -> Counter[str]:
        """How many images have which Pillow mode."""
        return Counter(mode for _, mode in self.good.values())

    def set_aside(self, path: Path, reason: str, skip_bad: bool, report: Report) -> None:
        """Moves an image found unreadable while decoding to the bad ones. Raises EvaluationError unless `skip_bad`."""
        if not skip_bad:
            raise EvaluationError(f"{path}: {reason}; replace it, or go on without it: --skip_bad True")
        del self.good[path]
        self.bad[path] = reason
        report.warn(f"{path} is left out: {reason}")

    def describe(self) -> dict[str, Any]:
        """The record of these images for a report."""
        return {
            "count": len(self.good),
            "sizes": {f"{width}x{height}": count for (width, height), count in sorted(self.sizes.items())},
            "modes": dict(sorted(self.modes.items())),
            "skipped": {str(path): reason for path, reason in sorted(self.bad.items())},
        }


def check_images(images: Sequence[Path], skip_bad: bool, report: Report, maps: bool = False) -> CheckedImages:
    """Looks at every image before any long work: header, checksums or end marker.

    Raises EvaluationError naming the unusable ones, or warns of them if `skip_bad`. Damage that shows only in decoding
    is met while reading (see `read_images`). maps: they are label maps, which may have 16 bits.
    """
    checked, look = CheckedImages(), partial(_look_at, deep=True) if maps else _look_at
    with ThreadPoolExecutor() as pool:
        for path, found in tqdm(
            zip(images, pool.map(look, images), strict=True), "checking images", len(images), leave=False
        ):
            if isinstance(found, str):
                checked.bad[path] = found
            else:
                checked.good[path] = found
    if checked.bad:
        listed = shown([f"{path} ({reason})" for path, reason in checked.bad.items()])
        if not skip_bad:
            raise EvaluationError(f"unusable images: {listed}; replace them, or go on without them: --skip_bad True")
        if not checked.good:
            raise EvaluationError(f"no usable image is left: {listed}")
        report.warn(f"{len(checked.bad)} unusable images are left out: {listed}")
    if not maps:
        warn_about_modes(checked, report)
    return checked


def warn_about_modes(checked: CheckedImages, report: Report) -> None:
    """Says which images are not RGB and what happens to them."""
    for what, kind, remedy in (
        ("grey", ("1", "L", "LA"), "their channel is repeated"),
        ("transparent", ("LA", "PA", "RGBA"), "the transparency is dropped"),
    ):
        found = [path for path, (_, mode) in checked.good.items() if mode in kind]
        if found:
            report.warn(f"{len(found)} {what} images: {remedy} ({shown(found)})")


def _look_at(path: Path, deep: bool = False) -> tuple[tuple[int, int], str] | str:
    """The size and mode of an image file, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            size, mode = image.size, image.mode
            stored = raw_mode(image)
            if not deep and (
                mode.startswith(DEEP_MODES) or ";16" in stored
            ):  # of 16-bit RGB, Pillow keeps the high byte
                return f"more than 8 bits per channel, mode {stored}; save it with 8 bits"
            if image.format == "PNG":
                image.verify()  # the checksums, without decoding
            elif image.format != "JPEG" or END_OF_JPEG not in _tail(path):
                image.load()
    except UNREADABLE as error:
        return f"unreadable: {error}"
    return size, mode


def raw_mode(image: Image.Image) -> str:
    """How an image that was opened and not decoded is stored: Pillow's raw mode (RGB;16B) for PNG and TIFF."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return image.mode
    arguments = image.tile[0][3]
    return arguments if isinstance(arguments, str) else arguments[0]


def _tail(path: Path, length: int = 4096) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        return file.read()


def load_rgb(path: Path, sizes: Sequence[tuple[int, int]] = (), filter_name: str | None = None) -> torch.Tensor:
    """An image as bytes [H, W, 3]; grey is repeated, transparency dropped.

    Resized to these `sizes` (height, width) in turn, with antialiasing and rounding to 8 bits, as saved images are.
    """
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    for height, width in sizes:
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), FILTERS[filter_name])
    return torch.from_numpy(np.array(rgb))


class Items(Dataset):
    """Items to read with `load`; an item that cannot be read comes back as the message of its error."""

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Any]) -> None:
        self.items, self.load = items, load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.load(self.items[index])
        except UNREADABLE as error:
            return index, f"unreadable: {error}"


def read_images(
    items: Sequence[Any], load: Callable[[Any], Any], batch_size: int, num_workers: int
) -> Iterable[list[tuple[int, Any]]]:
    """Reads items in other processes, in order: lists of (index, what `load` made of it, or an error's message)."""
    return DataLoader(
        Items(items, load),
        batch_size=batch_size,
        num_workers=min(num_workers, len(items)),
        collate_fn=list,
    )
