"""The chain of scripts/camvid.sh, but for the training: preparation, the segmentation network, tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_custom
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts" / "data"), str(ROOT / "benchmarks")]

import camvid  # noqa: E402
import segmenter  # noqa: E402
from preparation import PreparationError  # noqa: E402
from prepare_camvid import CLASSES, prepare  # noqa: E402

from guided_diffusion.image_datasets import open_dataset  # noqa: E402


def write_camvid(root: Path, layout: str) -> Path:
    """Two scenes per split, in this project's layout ("folders") or SegNet's ("annot")."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        images, labels = ("images", "labels") if layout == "folders" else ("", "")
        images, labels = root / split / images, root / (split + ("annot" if layout == "annot" else "")) / labels
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(images / f"{split}{i}.png")
            Image.fromarray(rng.integers(0, len(CLASSES), (36, 48), dtype=np.uint8)).save(labels / f"{split}{i}.png")
    return root


@pytest.mark.parametrize("layout", ["folders", "annot"])
def test_camvid_becomes_a_custom_data_set(tmp_path, layout):
    out = tmp_path / "out"
    for _ in range(2):  # again: nothing changes
        assert prepare(write_camvid(tmp_path / layout, layout) if not out.exists() else tmp_path / layout, out) == {
            "train": 2, "val": 2, "test": 2,
        }  # fmt: skip
    assert prepare(tmp_path / layout, tmp_path / "small", every=2) == {"train": 1, "val": 1, "test": 1}
    data = open_dataset(data_dir=out, dataset_mode="custom", split="test", image_size=24)
    assert data.shape == (24, 32)  # the aspect is kept
    assert data.spec.class_names[3] == "road" and data.spec.palette[3].tolist() == [128, 64, 128]


def test_a_split_or_partner_that_is_missing_is_named(tmp_path):
    source = write_camvid(tmp_path / "source", "annot")
    (source / "valannot" / "val1.png").unlink()
    with pytest.raises(PreparationError, match="val1 is in only one of"):
        prepare(source, tmp_path / "out")
    with pytest.raises(PreparationError, match="no train split"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(PreparationError, match="--every is 0; it must be at least 1"):
        prepare(source, tmp_path / "out", every=0)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A segmentation network of 60 steps on scenes of coloured blocks, and the folder of the scenes."""
    folder = tmp_path_factory.mktemp("segmenter")
    names = {"classes": ["a", "b", "c", "d"]}
    data = write_custom(folder / "data", {"train": 8, "val": 4}, size=(48, 32), settings=names)
    command = ["segmenter.py", "train", "--data_dir", data, "--image_size", 32, "--out", folder / "segmenter.pt"]
    command += ["--steps", 60, "--batch_size", 4, "--num_workers", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(part) for part in command])
        segmenter.main()
    return folder


def results_of(folder: Path, samples: dict[str, list[np.ndarray]]) -> Path:
    """A results folder of these pictures, uint8 [H, W, 3], by sub-folder."""
    for sub, pictures in samples.items():
        (folder / sub).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / sub / f"{i}.png")
    return folder


def score(trained: Path, results: Path, monkeypatch) -> dict:
    command = ["segmenter.py", "score", results, "--segmenter", trained / "segmenter.pt", "--json", results / "s.json"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    segmenter.main()
    return json.loads((results / "s.json").read_text())


def photographs(trained: Path) -> list[np.ndarray]:
    data = open_dataset(data_dir=trained / "data", dataset_mode="custom", split="val", image_size=32)
    return [data[i]["image"].permute(1, 2, 0).numpy() for i in range(len(data))]


def test_the_segmenter_learns_and_its_file_needs_no_code(trained):
    network = torch.jit.load(str(trained / "segmenter.pt"))
    data = open_dataset(data_dir=trained / "data", dataset_mode="custom", split="val", image_size=32)
    right = []
    for i in range(len(data)):
        scores = network(segmenter.normalise(data[i]["image"][None]))
        assert scores.shape == (1, 4, 32, 32)
        right.append((scores.argmax(1) == data[i]["label"]).float().mean())
    assert np.mean(right) > 0.5  # four classes: chance is 0.25


def test_feature_scores_at_their_ends(trained, tmp_path, monkeypatch):
    """Equal pictures have distance and diversity 0 and all the detail; noise is farther than a slight change."""
    real = photographs(trained)
    rng = np.random.default_rng(0)
    bright = [255 - (255 - picture) // 2 for picture in real]  # half the contrast
    dark = [(picture * 0.9).astype(np.uint8) for picture in real]
    noise = [rng.integers(0, 256, picture.shape, dtype=np.uint8) for picture in real]
    same = results_of(tmp_path / "same", {"images": real, "samples_00": real, "samples_01": real})
    scores = score(trained, same, monkeypatch)
    assert scores["feature_distance"] == pytest.approx(0, abs=1e-6)
    assert scores["feature_diversity"] == pytest.approx(0, abs=1e-9)
    assert scores["detail"] == 1
    near, far = (
        score(trained, results_of(tmp_path / name, {"images": real, "samples": other}), monkeypatch)
        for name, other in (("dark", dark), ("noise", noise))
    )
    assert 0 < near["feature_distance"] < far["feature_distance"]
    assert far["detail"] > 1.5
    half = score(trained, results_of(tmp_path / "half", {"images": real, "samples": bright}), monkeypatch)
    assert half["detail"] == pytest.approx(0.5, abs=0.01)  # but for rounding
    two = results_of(tmp_path / "two", {"images": real, "samples_00": real, "samples_01": noise})
    assert score(trained, two, monkeypatch)["feature_diversity"] > 0.1


def test_rows_and_tables():
    rows = camvid.compared("0.99", 1200)
    assert {row.s for row in rows if row.group == "guidance scale"} == {1.0, 1.5, 2.0, 3.0}
    assert {(row.sampler, row.steps) for row in rows} >= {("ddpm", 1000), ("ddim", 50), ("dpmsolver++", 20)}
    assert {row.checkpoint for row in rows} >= {"train/ema_0.99_000300.pt", "min_snr/ema_0.99_000300.pt"}
    folders = {row.folder: (row.checkpoint, row.s, row.sampler, row.steps, row.subset) for row in rows}
    assert len(folders) == len(set(folders.values()))  # a folder for each setting, and one setting for each
    real = {"miou": 50.0, "pixel_accuracy": 80.0}
    of_split = {**real, "layouts": 2, "feature_distance": 1.0, "detail": 0.9, "fid": None, "photographs": real}
    figures = {
        "device": "cpu",
        "scores": {
            "val": of_split,
            "test": {**of_split, "fid": 12.34},
            "several": {"feature_diversity": 0.1, "feature_diversity_of_other_scenes": 0.2, "lpips": None},
            "photographs_val_and_test": {"feature_distance": 0.5},
        },
        "rows": [{"group": r.group, "name": r.name, **of_split, "seconds_per_image": r.steps / 20} for r in rows],
    }
    text = camvid.tables(figures)
    assert "| samples, test | 2 | 50.0 | 80.0 | 1.000 | 0.90 | 12.3 |" in text
    assert "|  | ddpm, 1000 | 50.0 | 80.0 | 1.000 | 0.90 | 50.00 |" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 6 + 2 + len(rows)
