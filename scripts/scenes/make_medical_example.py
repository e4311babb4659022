"""Draws a small medical-style data set: grey slices with four classes, in the layout of dataset_mode custom.

    python scripts/scenes/make_medical_example.py --data_dir ./data/slices

Procedural, so nobody's health data: a body with a rim of fat, two organs with textures of their own, and in two
slices of three a bright lesion, under the speckle of an ultrasound picture. `docs/your-own-data.md` walks through it.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from preparation import PreparationError, clear_errors, open_output, write_json, write_png

CLASSES = [
    {"name": "background", "color": [20, 24, 32]},
    {"name": "tissue", "color": [150, 128, 110]},
    {"name": "organ", "color": [200, 74, 68]},
    {"name": "lesion", "color": [246, 208, 76]},
]
BACKGROUND, TISSUE, ORGAN, LESION = range(4)
BRIGHTNESS = (6, 92, 138, 214)


def ellipse(size: int, center: tuple[float, float], radii: tuple[float, float], angle: float) -> np.ndarray:
    """Distance from an ellipse's centre in units of its radius, [size, size]; below 1 inside. Lengths are shares."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    dx, dy = x - center[0], y - center[1]
    along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    return np.hypot(along / radii[0], across / radii[1])


def smooth_noise(rng: np.random.Generator, size: int, radius: float) -> np.ndarray:
    """Noise of mean 0 and deviation 1 whose grains are about `radius` pixels, [size, size]."""
    noise = Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    values = np.asarray(noise, dtype=np.float64)
    return (values - values.mean()) / values.std()


def draw_slice(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One slice: grey uint8 [size, size] and its ids uint8 [size, size]."""
    ids = np.zeros((size, size), dtype=np.uint8)
    center = 0.5 + rng.uniform(-0.03, 0.03, 2)
    wobble = 0.04 * smooth_noise(rng, size, size / 16)
    body = (
        ellipse(size, tuple(center), tuple(rng.uniform((0.38, 0.28), (0.46, 0.38))), rng.uniform(-0.15, 0.15)) + wobble
    )
    ids[body < 1] = TISSUE
    for side in (-1, 1):
        place = (center[0] + side * rng.uniform(0.14, 0.2), center[1] + rng.uniform(-0.06, 0.06))
        radii = tuple(rng.uniform((0.07, 0.1), (0.12, 0.17)))
        ids[(ellipse(size, place, radii, side * rng.uniform(0, 0.6)) + wobble < 1) & (body < 0.92)] = ORGAN
    if rng.random() < 2 / 3:
        place = tuple(center + rng.uniform((-0.25, -0.15), (0.25, 0.15)))
        ids[
            (ellipse(size, place, tuple(rng.uniform(0.02, 0.06, 2)), rng.uniform(0, 3)) + wobble < 1) & (body < 0.9)
        ] = LESION
    light = np.array(BRIGHTNESS, dtype=np.float64)[ids]
    light += (ids == ORGAN) * 16 * smooth_noise(rng, size, size / 64) + (ids == TISSUE) * 9 * smooth_noise(
        rng, size, size / 24
    )
    light += 70 * np.exp(-(((body - 0.97) / 0.03) ** 2))  # the rim
    light *= 1 - 0.25 * (np.arange(size)[:, None] / size)  # echoes weaken with depth
    light *= 1 + 0.14 * smooth_noise(rng, size, 0.8)  # speckle
    picture = Image.fromarray(light.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return np.asarray(picture), ids


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--train", type=int, default=48, help="slices to train on")
    parser.add_argument("--val", type=int, default=12, help="slices to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with clear_errors("make_medical_example"):
        make_slices(options.data_dir, options.size, {"train": options.train, "val": options.val}, options.seed)
    print(f"{options.train} + {options.val} slices in {options.data_dir}")


def make_slices(out: Path, size: int, counts: dict[str, int], seed: int) -> None:
    """Writes the data set. Raises PreparationError for sizes and counts that are none, and where `out` holds files that
    this script did not write."""
    if size < 16 or min(counts.values()) < 0 or seed < 0:
        raise PreparationError(
            f"--size {size} must be at least 16, --train {counts['train']}, --val {counts['val']} and --seed {seed} 0"
        )
    names = {split: [f"slice_{i:03d}.png" for i in range(count)] for split, count in counts.items()}
    expected = {f"{split}/{kind}": set(names[split]) for split in counts for kind in ("images", "labels")}
    description = {"classes": CLASSES, "grey": True, "instances": False}
    open_output(out, "make_medical_example.py", expected, description=description)
    for split in counts:
        for i, name in enumerate(names[split]):
            picture, ids = draw_slice(np.random.default_rng([seed, i, split == "val"]), size)
            write_png(Image.fromarray(picture), out / split / "images" / name)
            write_png(Image.fromarray(ids), out / split / "labels" / name)
    write_json(description, out / "dataset.json")


if __name__ == "__main__":
    main()
