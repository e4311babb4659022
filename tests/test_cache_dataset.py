import json
import shutil

import numpy as np
import pytest
import torch
from data_helpers import draw, run_script, save, write_benchmark, write_custom
from PIL import Image

from guided_diffusion.image_datasets import DataError, MissingSplitError, open_dataset


def run(data, mode, cache, image_size, *more):
    options = ("--data_dir", data, "--dataset_mode", mode, "--cache_dir", cache, "--image_size", image_size, *more)
    return run_script("scripts/data/cache_dataset.py", *options)


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
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("not ours")
    assert "not empty and no cache" in run(tmp_path / "data", "custom", tmp_path / "other", 16, *options).stderr
    assert "is a cache itself" in run(tmp_path / "cache", "custom", tmp_path / "b", 16, *options).stderr


def small_cache(tmp_path, settings=None, **more):
    """A data set of three training scenes and one to evaluate on, its cache, and a function that makes it again."""
    settings = {"classes": ["a", "b", "c", "d"], **(settings or {})}
    root = write_custom(tmp_path / "data", {"train": 3, "val": 1}, size=(100, 80), settings=settings, **more)

    def cache(*options):
        return run(root, "custom", tmp_path / "cache", 16, "--workers", 1, *options)

    assert cache().returncode == 0
    return root, tmp_path / "cache", cache


@pytest.mark.parametrize("size,jitter", [(0, 0), (-1, 0), (16, -1), (16, "nan")])
def test_sizes_that_are_none(tmp_path, size, jitter):
    root = write_custom(tmp_path / "data", {"train": 1, "val": 1})
    done = run(root, "custom", tmp_path / "cache", size, "--num_classes", 4, "--scale_jitter", jitter)
    assert done.returncode == 1 and f"image_size ({size}) must be at least 1" in done.stderr
    assert not (tmp_path / "cache").exists()


def assert_cache_is_good(root, cache):
    for split in ("train", "val"):
        options = {"dataset_mode": "custom", "split": split, "image_size": 16}
        assert_same_pixels(*(open_dataset(data_dir=folder, **options) for folder in (root, cache)))


@pytest.mark.parametrize("kind", ["images", "labels", "instances"])
def test_a_changed_source_is_cached_again(tmp_path, kind):
    root, cache, make = small_cache(tmp_path, instances=True)
    other = draw(9, (100, 80), 4)[("images", "labels", "instances").index(kind)]
    save(root / "train" / kind / "scene1.png", other)
    result = make()
    assert "train: 1 of 3 written, 2 were there" in result.stdout and "val: 0 of 1 written" in result.stdout
    assert_cache_is_good(root, cache)
    assert "train: 0 of 3 written" in make().stdout  # the new state is recorded


def test_what_is_gone_from_the_source_leaves_the_cache(tmp_path):
    root, cache, make = small_cache(tmp_path, instances=True)
    for kind in ("images", "labels", "instances"):
        (root / "train" / kind / "scene1.png").unlink()
    save(cache / "train/labels/drawn_by_hand.png", np.zeros((8, 8), np.uint8))
    (cache / "notes.txt").write_text("not ours")
    result = make()
    assert "train: 0 of 2 written" in result.stdout and "3 files removed" in result.stdout
    assert "1 pictures in" in result.stdout and "labels/drawn_by_hand.png" in result.stdout  # not ours: it stays
    (cache / "train/labels/drawn_by_hand.png").unlink()
    assert_cache_is_good(root, cache)
    assert sorted(path.name for path in cache.glob("train/*/*")) == ["scene0.png"] * 3 + ["scene2.png"] * 3
    assert (cache / "notes.txt").exists()
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train/instances")
    assert make().returncode == 0
    assert not open_dataset(data_dir=cache, dataset_mode="custom", split="train", image_size=16).has_instances
    with pytest.raises(MissingSplitError):
        open_dataset(data_dir=cache, dataset_mode="custom", split="val", image_size=16)


def test_a_photograph_that_no_longer_shrinks_takes_the_place_of_the_old_one(tmp_path):
    root, cache, make = small_cache(tmp_path)
    (root / "train/images/scene0.png").unlink()
    save(root / "train/images/scene0.jpg", draw(5, (24, 20), 4)[0])
    save(root / "train/labels/scene0.png", draw(5, (24, 20), 4)[1])
    assert "1 files removed" in make().stdout
    assert not (cache / "train/images/scene0.png").exists()
    assert_cache_is_good(root, cache)


def test_another_meaning_of_dataset_json_needs_another_cache(tmp_path):
    classes = ["a", "b", "c", "d"]
    root, cache, make = small_cache(tmp_path, {"crop": "keep_aspect"})
    before = (cache / "dataset.json").read_bytes()
    for settings, found in (
        ({"classes": classes, "crop": "square"}, "crop was 'keep_aspect', is 'square'"),
        ({"classes": classes, "crop": "keep_aspect", "exif": "apply"}, "exif was 'refuse', is 'apply'"),
        ({"classes": [*classes, "e"], "crop": "keep_aspect"}, "num_classes was 4, is 5"),
        ({"classes": classes, "crop": "keep_aspect", "remap": {"7": 1}}, "remap was {}, is {'7': 1}"),
    ):
        (root / "dataset.json").write_text(json.dumps(settings))
        result = make()
        assert result.returncode == 1 and f"cache for other settings (of the command or of dataset.json): {found};" in (
            result.stderr
        )
        assert "delete that folder or choose another cache_dir" in result.stderr
        assert (cache / "dataset.json").read_bytes() == before
    new_names = {
        "classes": [{"name": name, "color": [i, 0, 0]} for i, name in enumerate("wxyz")],
        "crop": "keep_aspect",
    }
    (root / "dataset.json").write_text(json.dumps(new_names))  # no pixel depends on them
    assert "train: 0 of 3 written" in make().stdout
    assert json.loads((cache / "dataset.json").read_text()) == new_names
    assert_cache_is_good(root, cache)


def test_num_classes_belongs_to_the_settings(tmp_path):
    write_custom(tmp_path / "data", {"train": 1}, size=(100, 80))
    assert run(tmp_path / "data", "custom", tmp_path / "cache", 16, "--num_classes", 4).returncode == 0
    result = run(tmp_path / "data", "custom", tmp_path / "cache", 16, "--num_classes", 6)
    assert result.returncode == 1 and "num_classes was 4, is 6" in result.stderr


def test_a_cache_of_an_earlier_version_still_trains_but_is_not_continued(tmp_path):
    root, cache, make = small_cache(tmp_path)
    (cache / "cache_sources.jsonl").unlink()
    old = {"dataset_mode": "custom", "image_size": 16, "scale_jitter": 0.0, "complete": True}
    (cache / "cache.json").write_text(json.dumps(old))
    assert_cache_is_good(root, cache)
    result = make()
    assert result.returncode == 1 and "is a cache of an earlier version" in result.stderr
    assert json.loads((cache / "cache.json").read_text()) == old


def test_an_unfinished_line_of_the_record_costs_one_item(tmp_path):
    root, cache, make = small_cache(tmp_path)
    record = cache / "cache_sources.jsonl"
    record.write_bytes(record.read_bytes()[:-20])  # the last is that of val
    assert "val: 1 of 1 written" in make().stdout and "val: 0 of 1 written" in make().stdout
    assert_cache_is_good(root, cache)


def test_a_wrong_instance_map_is_found_when_the_cache_is_made(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 1}, size=(100, 80), instances=True)
    (root / "train/instances/scene0.png").unlink()
    Image.new("CMYK", (100, 80)).save(root / "train/instances/scene0.tif")
    result = run(root, "custom", tmp_path / "cache", 16, "--num_classes", 4)
    assert result.returncode == 1 and "instance map" in result.stderr
