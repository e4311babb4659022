"""benchmarks/transfer.py without its trainings: the data of both sides, and what becomes of the figures."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks")]

import transfer  # noqa: E402

from guided_diffusion.image_datasets import open_dataset  # noqa: E402


@pytest.fixture
def args(tmp_path):
    """A made-up CamVid, prepared: 62 photographs at dusk and 3 by day, whose label maps hold all of its classes."""
    names = {"train": [f"0001TP_{i:06d}" for i in range(62)] + [f"0006R0_{i}" for i in range(3)], "val": ["0016E5_0"]}
    labels = np.arange(64 * 48, dtype=np.uint8).reshape(48, 64) % len(transfer.CLASSES)
    for split, stems in names.items():
        for kind in ("images", "labels"):
            (tmp_path / "camvid" / split / kind).mkdir(parents=True)
        for number, stem in enumerate(stems):
            photograph = np.full((48, 64, 3), (number, 2 * number, 255 - number), dtype=np.uint8)
            Image.fromarray(photograph).save(tmp_path / "camvid" / split / "images" / f"{stem}.png")
            Image.fromarray(labels).save(tmp_path / "camvid" / split / "labels" / f"{stem}.png")
    args = argparse.Namespace(camvid=tmp_path / "camvid", out=tmp_path / "out", steps=8)
    transfer.prepare(args)
    transfer.prepare(args)  # again: nothing changes
    return args


def names_of(folder: Path, split: str) -> list[str]:
    return sorted(file.stem for file in (folder / split / "images").iterdir())


def test_nobody_trains_on_what_the_validation_shows(args):
    held_out = names_of(args.out / "colour", "val")
    assert len(held_out) == 32 and held_out == names_of(args.out / "grey", "val")
    assert len(names_of(args.out / "colour", "train")) == 24
    for folder in ("colour", "grey", "colour_scored", "grey_scored"):
        assert not set(names_of(args.out / folder, "train")) & set(held_out), folder
    assert not [name for name in names_of(args.out / "day", "train") if name.startswith(transfer.DUSK)]


def test_the_merged_classes_are_those_of_the_class_map(args):
    old = open_dataset(data_dir=args.out / "day", dataset_mode="custom", split="train", image_size=48)
    new = open_dataset(data_dir=args.out / "colour", dataset_mode="custom", split="train", image_size=48)
    grey = open_dataset(data_dir=args.out / "grey", dataset_mode="custom", split="train", image_size=48)
    before, after = (np.unique(np.asarray(data[0]["label"])) for data in (old, new))
    assert len(before) == 12 and after.tolist() == [0, 1, 2, 3, 4, 5] and grey.spec.grey
    class_map = json.loads((args.out / "right.json").read_text())
    assert list(class_map) == list(new.spec.class_names[:-1])
    assert sorted(name for names in class_map.values() for name in names) == sorted(old.spec.class_names[:-1])
    shuffled = json.loads((args.out / "shuffled.json").read_text())
    assert all(shuffled[name] != class_map[name] for name in class_map)


def rows() -> list[dict]:
    made = []
    for start, first in (("new weights", 0.8), ("right class map", 0.4)):
        for seed in transfer.SEEDS:
            loss = {step: first - step / 2000 - seed / 100 for step in range(50, 601, 50)}
            scores = {step: {"miou": 50.0 + seed, "feature_distance": 9.0} for step in transfer.LOOKED_AT}
            made.append({"data": "colour", "start": start, "seed": seed, "loss": loss, "scores": scores})
    return made


def test_the_table_says_how_many_steps_are_saved(tmp_path):
    assert transfer.steps_to(rows()[0], 0.65) == 300 and transfer.steps_to(rows()[0], 0.1) is None
    text = transfer.table(rows(), {"colour": {"miou": 60.0}})
    assert "| colour | new weights | 0 | 0.7750, 50.0, 9.00 |" in text and text.count("| 600 |\n") == 2
    assert text.count("| at most 50 |\n") == 2 and "Photographs, colour: mIoU 60.0." in text
    transfer.plot(rows(), tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 400


def test_the_page_shows_both_starts_beside_layout_and_photograph(args):
    names = names_of(args.out / "colour", "val")
    for row in rows():
        results = args.out / "adapted" / f"colour_{row['start'].replace(' ', '_')}_seed{row['seed']}" / "samples_000100"
        for kind, shape in (("labels", (48, 64)), ("images", (48, 64, 3)), ("samples", (48, 64, 3))):
            (results / kind).mkdir(parents=True)
            for name in names:
                Image.fromarray(np.full(shape, row["seed"], dtype=np.uint8)).save(results / kind / f"{name}.png")
    transfer.draw(args, rows())
    page = Image.open(args.out / "samples.png")
    assert page.height > 6 * 96 and page.width > 8 * 128
