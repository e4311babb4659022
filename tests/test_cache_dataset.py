import pytest
import torch
from data_helpers import run_script, write_benchmark, write_custom
from PIL import Image

from guided_diffusion.image_datasets import DataError, open_dataset


def run(data, mode, cache, image_size, *more):
    options = ("--data_dir", data, "--dataset_mode", mode, "--cache_dir", cache, "--image_size", image_size, *more)
    return run_script("scripts/cache_dataset.py", *options)


def assert_same_pixels(first, second):
    assert first.names == second.names
    for i in range(len(first)):
        for position in range(8):
            a, b = first[i, position], second[i, position]
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a if key != "name")


@pytest.mark.parametrize("mode", ["cityscapes", "celeba", "ade20k", "coco"])
def test_the_cache_gives_the_loader_the_same_pixels(tmp_path, mode):
    write_benchmark(tmp_path / "data", mode, size=(202, 101))  # odd sides, so that halvings round
    result = run(tmp_path / "data", mode, tmp_path / "cache", 16)
    assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        options = {"dataset_mode": mode, "split": split, "image_size": 16}
        assert_same_pixels(*(open_dataset(data_dir=tmp_path / name, **options) for name in ("data", "cache")))
    largest = max(max(Image.open(f).size) for f in (tmp_path / "cache").rglob("*.png"))
    assert largest < 202 if mode == "cityscapes" else largest <= 202


def test_custom_with_jitter_colors_and_instances(tmp_path):
    colors = [[0, 0, 0], [9, 9, 9], [99, 0, 0], [0, 99, 0]]
    settings = {"label_encoding": "colors", "classes": [{"name": str(i), "color": c} for i, c in enumerate(colors)]}
    root = write_custom(tmp_path / "data", {"train": 2, "test": 1}, size=(150, 120), instances=True, settings=settings)
    for path in root.glob("*/labels/*.png"):
        picture = Image.open(path)
        picture.putpalette([value for color in colors for value in color])
        picture.convert("RGB").save(path)
    assert run(root, "custom", tmp_path / "cache", 16, "--scale_jitter", 0.5).returncode == 0
    for split in ("train", "test"):
        options = {"dataset_mode": "custom", "split": split, "image_size": 16, "scale_jitter": 0.5}
        assert_same_pixels(*(open_dataset(data_dir=folder, **options) for folder in (root, tmp_path / "cache")))
    with pytest.raises(DataError, match=r"made for dataset_mode custom, image_size 16, scale_jitter 0\.5, not for"):
        open_dataset(data_dir=tmp_path / "cache", **{**options, "image_size": 32})
    with pytest.raises(DataError, match=r"made for"):
        open_dataset(data_dir=tmp_path / "cache", **{**options, "scale_jitter": 0.6})


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    write_custom(tmp_path / "data", {"train": 5}, size=(100, 80))
    bad = tmp_path / "data/train/images/scene3.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    options = ("--num_classes", 4, "--workers", 1)
    result = run(tmp_path / "data", "custom", tmp_path / "cache", 16, *options)
    assert result.returncode == 1 and "scene3.png cannot be read" in result.stderr
    with pytest.raises(DataError, match="is unfinished"):
        open_dataset(data_dir=tmp_path / "cache", dataset_mode="custom", split="train", image_size=16, num_classes=4)
    bad.write_bytes(whole)
    done = tmp_path / "cache/train/images/scene0.png"
    before = done.stat().st_mtime_ns
    result = run(tmp_path / "data", "custom", tmp_path / "cache", 16, *options)
    assert result.returncode == 0 and "2 of 5 written, 3 were there" in result.stdout
    assert done.stat().st_mtime_ns == before and not list((tmp_path / "cache").rglob("*.part*"))
    assert "other settings" in run(tmp_path / "data", "custom", tmp_path / "cache", 32, *options).stderr
    assert "not empty and no cache" in run(tmp_path / "data", "custom", tmp_path, 16, *options).stderr
    assert "is a cache itself" in run(tmp_path / "cache", "custom", tmp_path / "b", 16, *options).stderr
