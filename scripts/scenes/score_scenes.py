"""Scores how well sampled scenes follow their layouts, by colour.

    python scripts/scenes/score_scenes.py RESULTS_DIR --data data/scenes --json RESULTS_DIR/adherence.json

A pixel follows its layout when its colour is nearest to a colour of its own class; each class has a few colours, the
k-means centres of its pixels in the training images. Reported beside it: the same share for the real images (what a
perfect sampler would reach) and for samples scored against the layouts of other samples (no adherence at all).
Reads `samples/NAME.png`, `labels/NAME.png` and `images/NAME.png` under RESULTS_DIR.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from preparation import PreparationError, clear_errors, write_json
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from guided_diffusion.data.specs import DataError, get_spec

PIXELS_PER_CLASS = 20_000  # enough for centres that differ by under one grey level from run to run


@dataclass(frozen=True)
class Palette:
    """The colours of every class."""

    colours: np.ndarray  # [K, 3] float
    class_ids: np.ndarray  # [K] the class of each colour

    def nearest_class(self, image: np.ndarray) -> np.ndarray:
        """image [H, W, 3] -> ids [H, W] of the classes whose colours are nearest (Euclidean, RGB)."""
        return self.class_ids[cKDTree(self.colours).query(image.reshape(-1, 3))[1]].reshape(image.shape[:2])


def read_folder(folder: Path, mode: str) -> dict[str, np.ndarray]:
    """The PNG files of a folder by stem, converted to a Pillow mode ("RGB"; "L": ids, taken as they are)."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise PreparationError(f"{folder} holds no PNG files: expected what sampling or make_scenes.py writes there")
    arrays = {}
    for file in files:
        try:
            with Image.open(file) as image:
                arrays[file.stem] = np.asarray(image.convert("RGB") if mode == "RGB" else image)
        except OSError as error:
            raise PreparationError(f"{file} cannot be read as an image ({error}): write it again") from error
        if mode == "L" and arrays[file.stem].ndim != 2:
            raise PreparationError(f"{file} has {arrays[file.stem].shape} values: a label map has one channel of ids")
    return arrays


def read_pairs(images: Path, labels: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, image [H, W, 3], label map [H, W]) for all names; raises PreparationError where they do not match."""
    pixels, ids = read_folder(images, "RGB"), read_folder(labels, "L")
    unpaired = sorted(set(pixels) ^ set(ids))
    if unpaired:
        raise PreparationError(
            f"{unpaired[0]}.png is in only one of {images} and {labels}: every image needs its layout"
        )
    for name, image in pixels.items():
        if image.shape[:2] != ids[name].shape:
            raise PreparationError(f"{name}.png: {images} has {image.shape[:2]}, {labels} has {ids[name].shape}")
    return [(name, pixels[name], ids[name]) for name in sorted(pixels)]


def fit_palette(pairs: list[tuple[str, np.ndarray, np.ndarray]], centres: int, seed: int) -> Palette:
    """k-means centres of each class's pixels, from at most PIXELS_PER_CLASS of them."""
    pixels = np.concatenate([image.reshape(-1, 3) for _, image, _ in pairs]).astype(np.float64)
    ids = np.concatenate([labels.ravel() for *_, labels in pairs])
    colours, class_ids = [], []
    for class_id in np.unique(ids):
        rng = np.random.default_rng([seed, int(class_id)])
        own = pixels[ids == class_id]
        own = rng.permutation(own)[:PIXELS_PER_CLASS]
        found, _ = kmeans2(
            own, min(centres, len(np.unique(own, axis=0))), iter=25, minit="++", seed=rng, missing="warn"
        )
        colours.append(found)
        class_ids.append(np.full(len(found), class_id))
    return Palette(np.concatenate(colours), np.concatenate(class_ids))


def derangement(count: int, seed: int) -> np.ndarray:
    """A random cycle through `count` >= 2 positions, so that none stays in its place."""
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty(count, int)
    partner[order] = np.roll(order, 1)
    return partner


def score(results: Path, data: Path, centres: int, seed: int) -> dict:
    """The figures as a dictionary; see the module's docstring. Raises PreparationError on missing or unusable input."""
    palette = fit_palette(read_pairs(data / "train" / "images", data / "train" / "labels"), centres, seed)
    samples = read_pairs(results / "samples", results / "labels")
    real = read_pairs(results / "images", results / "labels")
    if len(samples) < 2:
        raise PreparationError(f"{results} holds one sample: at least 2 are needed to shuffle the layouts")
    layouts = np.stack([labels for *_, labels in samples])
    predicted = np.stack([palette.nearest_class(image) for _, image, _ in samples])
    predicted_real = np.stack([palette.nearest_class(image) for _, image, _ in real])
    unknown = np.setdiff1d(layouts, palette.class_ids)
    if unknown.size:
        raise PreparationError(
            f"{results / 'labels'} has class ids {unknown.tolist()} that {data} has not: wrong --data?"
        )
    try:
        classes = get_spec("custom", data).class_names
    except DataError as error:
        raise PreparationError(str(error)) from None
    shuffled = layouts[derangement(len(layouts), seed)]
    return {
        "adherence": float((predicted == layouts).mean()),
        "real": float((predicted_real == layouts).mean()),
        "shuffled": float((predicted == shuffled).mean()),
        "per_class": {
            classes[class_id]: {
                "pixels": float((layouts == class_id).mean()),
                "adherence": float((predicted == class_id)[layouts == class_id].mean()),
                "real": float((predicted_real == class_id)[layouts == class_id].mean()),
            }
            for class_id in np.unique(layouts).tolist()
        },
        "samples": len(samples),
        "colours_per_class": centres,
        "seed": seed,
    }


def print_table(figures: dict) -> None:
    print("share of pixels whose colour is nearest to their own class's colours")
    print(f"{'class':<12}{'of pixels':>10}{'samples':>10}{'real':>10}")
    for name, row in figures["per_class"].items():
        print(f"{name:<12}{row['pixels']:>10.1%}{row['adherence']:>10.1%}{row['real']:>10.1%}")
    print(f"{'all':<12}{'':>10}{figures['adherence']:>10.1%}{figures['real']:>10.1%}")
    print(f"{'against shuffled layouts':<22}{figures['shuffled']:>8.1%}   ({figures['samples']} samples)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS_DIR", help="what image_sample.py wrote")
    parser.add_argument(
        "--data", type=Path, required=True, help="the data set of make_scenes.py: its train split gives the colours"
    )
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--centres", type=int, default=8, help="colours per class")
    parser.add_argument("--seed", type=int, default=0, help="of the k-means centres and of the shuffling")
    args = parser.parse_args()
    with clear_errors("score_scenes"):
        figures = score(args.results, args.data, args.centres, args.seed)
    print_table(figures)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(figures, args.json)
    print(f"figures: {args.json}")


if __name__ == "__main__":
    main()
