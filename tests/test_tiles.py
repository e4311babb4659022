"""Large pictures cut into tiles: nothing is lost, everything stays at its place."""

import json
import sys

import numpy as np
import pytest
from data_helpers import REPOSITORY, draw, load_script, save, write_custom
from PIL import Image

from guided_diffusion.data.specs import get_spec
from guided_diffusion.data.transforms import read_label
from guided_diffusion.image_datasets import open_dataset


def cut(root, out, *flags):
    """Runs the script in this process, with its folder among the places of modules."""
    folder = str(REPOSITORY / "scripts" / "data")
    if folder not in sys.path:
        sys.path.append(folder)
    load_script("scripts/data/tile_dataset.py").main(["--data_dir", str(root), "--out", str(out), *map(str, flags)])


@pytest.fixture
def large(tmp_path):
    settings = {"classes": ["a", "b", "c", "d"], "max_pixels": 100, "label_suffix": "_mask"}
    root = write_custom(tmp_path / "data", {"train": 2, "val": 1}, (100, 70), instances=True, settings=settings)
    for kind in ("labels", "instances"):
        for path in sorted(root.rglob(f"{kind}/*.png")):
            if kind == "labels":
                path.rename(path.with_name(f"{path.stem}_mask.png"))
    path = root / "train/instances/scene1.png"  # ids beyond 16 bits
    numbers = np.asarray(Image.open(path)).astype(np.int32) + 100_000
    path.unlink()
    Image.fromarray(numbers).save(path.with_suffix(".tif"))
    return root


def test_tiles_cover_the_picture_and_carry_its_pixels(large, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # the script is for pictures that Pillow would not open
    cut(large, tmp_path / "tiles", "--tile", 40, "--overlap", 10)
    monkeypatch.undo()
    data = open_dataset(
        data_dir=tmp_path / "tiles", dataset_mode="custom", split="train", image_size=40, training=False
    )
    assert len(data) == 2 * 3 * 2  # 0, 30, 60 to the right; 0, 30 downwards
    for i in range(2):
        photograph, ids, numbers = draw(i, (100, 70), 4)
        covered = np.zeros(ids.shape, int)
        for top in (0, 30):
            for left in (0, 30, 60):
                sample = data[data.names.index(f"scene{i}_y{top:06d}_x{left:06d}")]
                window = np.s_[top : top + 40, left : left + 40]
                assert np.array_equal(sample["image"].permute(1, 2, 0), photograph[window])
                assert np.array_equal(sample["label"][0], ids[window])
                assert np.array_equal(sample["instance"][0], numbers[window].astype(int) + 100_000 * i)
                covered[window] += 1
        assert covered.min() == 1 and covered.max() == 4
    assert json.loads((tmp_path / "tiles/dataset.json").read_text()) == {"classes": ["a", "b", "c", "d"]}


def test_the_last_tile_ends_with_the_picture_and_small_ones_stay_whole(tmp_path, capsys):
    root = write_custom(tmp_path / "data", {"train": 1, "val": 1}, (45, 30))
    save(root / "val/images/scene0.png", draw(0, (20, 10), 4)[0])
    save(root / "val/labels/scene0.png", draw(0, (20, 10), 4)[1])
    cut(root, tmp_path / "tiles", "--tile", 30, "--num_classes", 4)
    names = sorted(path.name for path in (tmp_path / "tiles").rglob("images/*.png"))
    assert names == ["scene0_y000000_x000000.png"] * 2 + ["scene0_y000000_x000015.png"]
    assert Image.open(tmp_path / "tiles/val/images/scene0_y000000_x000000.png").size == (20, 10)
    assert "made tiles of 1 other sizes" in capsys.readouterr().out


def test_a_second_run_goes_on_and_faults_are_named(large, tmp_path):
    flags = ["--tile", 40]
    cut(large, tmp_path / "tiles", *flags)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiles").rglob("*.png")}
    gone = sorted(files)[3]
    gone.unlink()
    cut(large, tmp_path / "tiles", *flags)
    assert {p for p in files if p.stat().st_mtime_ns != files[p]} == {gone}
    save(large / "val/labels/scene0_mask.png", np.full((70, 100), 77, np.uint8))
    with pytest.raises(SystemExit, match=r"scene0_mask\.png has ids that do not fit num_classes 4: 77"):
        cut(large, tmp_path / "others", *flags)
    with pytest.raises(SystemExit, match="shares fewer than all"):
        cut(large, tmp_path / "others", "--tile", 40, "--overlap", 40)


def test_colors_stay_colors(tmp_path):
    classes = [{"name": n, "color": [i, 9, 200]} for i, n in enumerate("abcd")]
    settings = {"classes": classes, "label_encoding": "colors"}
    root = write_custom(tmp_path / "data", {"train": 1}, (40, 30), settings=settings)
    ids = draw(0, (40, 30), 4)[1]
    save(root / "train/labels/scene0.png", np.array([c["color"] for c in classes], np.uint8)[ids])
    cut(root, tmp_path / "tiles", "--tile", 30)
    path = str(tmp_path / "tiles/train/labels/scene0_y000000_x000010.png")
    assert np.array_equal(read_label(path, get_spec("custom", tmp_path / "tiles"))[0], ids[:, 10:])
