"""Photographs that are there twice, as they are or saved again, within a split and across splits."""

import csv
import io

import numpy as np
import pytest
from data_helpers import run_script
from PIL import Image

from guided_diffusion.data.duplicates import find_duplicates, fingerprint

OTHERS = {
    "JPEG": lambda picture: saved_again(picture, 60),
    "smaller": lambda picture: saved_again(picture.resize((128, 96), Image.Resampling.LANCZOS), 85),
    "square": lambda picture: picture.resize((100, 100), Image.Resampling.BICUBIC),
    "larger": lambda picture: picture.resize((500, 371), Image.Resampling.BICUBIC),
}


def picture(seed: int, size=(200, 150)) -> Image.Image:
    """Smooth colour with grain."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 256, (rng.integers(3, 12), rng.integers(3, 16), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(parts).resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def saved_again(picture: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def test_different_pictures_do_not_match():
    assert find_duplicates([fingerprint(picture(seed)) for seed in range(200)]) == []
    assert find_duplicates([]) == []


@pytest.mark.parametrize("change", OTHERS)
def test_what_was_saved_again_matches_its_original_alone(change):
    pictures = [picture(seed) for seed in range(40)]
    prints = [fingerprint(p) for p in pictures + [OTHERS[change](p) for p in pictures]]
    assert find_duplicates(prints) == [(i, i + 40, False) for i in range(40)]


def test_equal_pixels_are_exact_and_blank_pictures_only_then():
    step = np.indices((64, 64, 3))[0] // 40  # of one level, so that the two below have one spectrum
    blank, other = (Image.fromarray((step + base).astype(np.uint8)) for base in (3, 4))
    prints = [fingerprint(p) for p in (picture(0), blank, other, picture(0), blank)]
    assert sorted(find_duplicates(prints)) == [(0, 3, True), (1, 4, True)]
    assert len(find_duplicates([fingerprint(blank)] * 50, most=7)) == 7


def test_verify_data_lists_them_within_and_across_splits(tmp_path):
    contents = {
        "train": {"a": picture(1), "b": picture(2), "c": picture(3), "a_again": saved_again(picture(1), 70)},
        "val": {"v": picture(2), "w": saved_again(picture(3), 80), "x": picture(9)},
    }
    for split, pictures in contents.items():
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for name, content in pictures.items():
            content.save(tmp_path / "data" / split / "images" / f"{name}.png")
            Image.new("L", content.size).save(tmp_path / "data" / split / "labels" / f"{name}.png")
    flags = ["--data_dir", tmp_path / "data", "--dataset_mode", "custom", "--num_classes", 1, "--workers", 1]
    result = run_script("scripts/data/verify_data.py", *flags, "--report_dir", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    assert "1 exact duplicate in both train and val" in result.stdout and "(b and v" in result.stdout
    assert (
        "1 near duplicate in both train and val" in result.stdout and "1 near duplicate within train" in result.stdout
    )
    with open(tmp_path / "report/duplicates.csv") as file:
        rows = {tuple(row) for row in csv.reader(file)}
    assert rows == {
        ("kind", "split", "name", "other_split", "other_name"),
        ("near", "train", "a", "train", "a_again"),
        ("exact", "train", "b", "val", "v"),
        ("near", "train", "c", "val", "w"),
    }
