import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import REPOSITORY, draw, run_script, save, shared_or_skip, write_benchmark, write_custom
from PIL import Image

from guided_diffusion.data.pictures import bar_chart
from guided_diffusion.data.specs import get_spec
from guided_diffusion.image_datasets import open_dataset


def verify(root, report, *more, mode="custom"):
    return run_script(
        "scripts/data/verify_data.py",
        "--data_dir",
        root,
        "--dataset_mode",
        mode,
        "--report_dir",
        report,
        "--workers",
        1,
        *more,
    )


def test_a_good_data_set(tmp_path):
    settings = {"classes": ["sky", "hill", "tree", "road", "boat"]}
    write_custom(tmp_path / "data", {"train": 5, "val": 2}, size=(40, 30), instances=True, settings=settings)
    result = verify(tmp_path / "data", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    assert "train: 5 scenes; photographs 40 x 30 (5)" in result.stdout and "val: 2 scenes" in result.stdout
    assert "instance maps: 16 bits or more (5); 20.0 ids a scene, the largest 26019" in result.stdout
    assert "classes in no label map: boat" in result.stdout
    assert (tmp_path / "report/problems.txt").read_text() == ""
    rows = list(csv.DictReader((tmp_path / "report/classes.csv").open()))
    ids = np.stack([draw(i, (40, 30), 4)[1] for i in range(5)])
    for i, row in enumerate(rows):
        assert row["name"] == settings["classes"][i]
        assert float(row["train_pixels"]) == pytest.approx((ids == i).mean(), rel=1e-5)  # six digits are written
        assert float(row["train_images"]) == pytest.approx((ids == i).any(axis=(1, 2)).mean(), rel=1e-5)
    page = np.asarray(Image.open(tmp_path / "report/overview_train.png"))
    for color in get_spec("custom", tmp_path / "data").palette[:4]:
        assert (page == color).all(-1).sum() > 100  # the layouts are drawn in the palette's colours
    assert Image.open(tmp_path / "report/classes_val.png").width > 200


@pytest.mark.parametrize("size", [0, -8])
def test_an_image_size_that_is_none(tmp_path, size):
    write_custom(tmp_path / "data", {"train": 1, "val": 1})
    result = verify(tmp_path / "data", tmp_path / "report", "--num_classes", 4, "--image_size", size)
    assert result.returncode == 1 and f"image_size is {size}; it must be at least 1" in result.stderr


def test_a_cache_is_as_good_as_its_source(tmp_path):
    """Its photographs are shrunk and its label maps are not, which the loader knows, too."""
    settings = {"classes": ["a", "b", "c", "d"]}
    root, cache = write_custom(tmp_path / "data", {"train": 2, "val": 1}, (100, 80), settings=settings), tmp_path / "c"
    flags = ["--data_dir", root, "--dataset_mode", "custom", "--image_size", 16, "--workers", 1]
    assert run_script("scripts/data/cache_dataset.py", *flags, "--cache_dir", cache).returncode == 0
    assert Image.open(cache / "train/images/scene0.png").size != (100, 80)
    result = verify(cache, tmp_path / "report")
    assert result.returncode == 0, result.stderr


def test_everything_wrong_is_listed_at_once(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 8, "val": 1}, instances=True)
    images, labels, instances = (root / "train" / name for name in ("images", "labels", "instances"))
    whole = (images / "scene0.png").read_bytes()
    (images / "scene0.png").write_bytes(whole[: len(whole) // 2])  # the header is whole, the pixels are not
    (images / "scene1.png").write_bytes(b"")
    save(labels / "scene2.png", np.full((30, 40), 9, np.uint8))
    save(labels / "scene3.png", np.zeros((30, 44), np.uint8))
    (labels / "scene4.png").unlink()
    save(labels / "alone.png", np.zeros((30, 40), np.uint8))
    (instances / "scene5.png").unlink()
    Image.new("CMYK", (40, 30)).save(instances / "scene5.tif")
    result = verify(root, tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 1
    problems = (tmp_path / "report/problems.txt").read_text().splitlines()
    expected = [
        "1 photograph in",
        "with no photograph in",
        "1 instance map in",
        "with no instance map in",
        "scene0.png cannot be read",
        "scene1.png cannot be read",
        "scene2.png has ids that do not fit num_classes 4: 9",
        "scene3.png is 40 x 30 but",
        "scene5.tif is a picture of mode CMYK",
    ]
    for text in expected:
        assert sum(text in problem for problem in problems) == 1, text
    assert all(problem in result.stderr for problem in problems) and all(p.startswith("train: ") for p in problems)
    assert "val: 1 scenes" in result.stdout


def test_it_agrees_with_the_loader(tmp_path):
    """What verification passes, the loader reads; each kind of fault that the loader names, verification finds."""
    for kind, pixels in (("images", np.zeros((30, 40), np.uint16)), ("labels", draw(0, (40, 30), 4)[0])):
        root = write_custom(tmp_path / kind, {"train": 1, "val": 1})
        save(root / "train" / kind / "scene0.png", pixels)
        with pytest.raises(ValueError) as error:
            open_dataset(data_dir=root, dataset_mode="custom", split="train", image_size=8, num_classes=4)[0]
        assert verify(root, tmp_path / "report", "--num_classes", 4).returncode == 1
        assert (tmp_path / "report/problems.txt").read_text().strip() == f"train: {error.value}"


def test_structure_and_settings(tmp_path):
    result = verify(tmp_path / "nowhere", tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 1 and "nowhere does not exist; the layout of dataset_mode custom" in result.stderr
    assert verify(tmp_path, tmp_path / "report").returncode == 1  # no number of classes
    root = write_custom(tmp_path / "data", {"train": 1})
    assert "there is no evaluation split" in verify(root, tmp_path / "report", "--num_classes", 4).stdout
    save(root / "train/images/wide.png", np.zeros((30, 80, 3), np.uint8))
    save(root / "train/labels/wide.png", np.zeros((30, 80), np.uint8))
    (root / "dataset.json").write_text('{"crop": "keep_aspect"}')
    result = verify(root, tmp_path / "report", "--num_classes", 4, "--image_size", 15)
    assert result.returncode == 1 and "(wide, ...) become 40 x 15" in result.stderr


def test_cityscapes_instances_cut_to_8_bits(tmp_path):
    write_benchmark(tmp_path / "data", "cityscapes")
    assert verify(tmp_path / "data", tmp_path / "report", mode="cityscapes").returncode == 0
    for path in (tmp_path / "data").rglob("*_instanceIds.png"):
        save(path, np.asarray(Image.open(path)).clip(max=255).astype(np.uint8))
    result = verify(tmp_path / "data", tmp_path / "report", mode="cityscapes")
    assert result.returncode == 1 and "the largest instance id is 255" in result.stderr


def test_maps_from_cityscapes_polygons(tmp_path):
    pytest.importorskip("cityscapesscripts")
    write_benchmark(tmp_path, "cityscapes")
    for path in sorted((tmp_path / "gtFine").rglob("*_labelIds.png")):
        whole = [[0, 0], [63, 0], [63, 31], [0, 31]]
        square = [[8, 4], [23, 4], [23, 19], [8, 19]]
        objects = [{"label": "sky", "polygon": whole}, {"label": "car", "polygon": square}]
        scene = {"imgWidth": 64, "imgHeight": 32, "objects": objects}
        path.with_name(path.name.replace("_labelIds.png", "_polygons.json")).write_text(json.dumps(scene))
    for path in [*tmp_path.rglob("city_0*Ids.png"), *tmp_path.rglob("city_2*labelIds.png")]:
        path.unlink()
    result = verify(tmp_path, tmp_path / "report", mode="cityscapes")
    assert result.returncode == 1 and "scripts/data/prepare_cityscapes.py makes labelIds" in result.stderr
    result = run_script("scripts/data/prepare_cityscapes.py", "--data_dir", tmp_path, "--workers", 1)
    assert result.returncode == 0 and "4 scenes: 3 maps drawn, 5 were there" in result.stdout, result.stderr
    sample = open_dataset(
        data_dir=tmp_path, dataset_mode="cityscapes", split="train", image_size=32, random_flip=False
    )[0]
    expected = np.full((32, 64), 23)  # sky
    expected[4:20, 8:24] = 26  # car, both ends of the polygon included
    assert np.array_equal(sample["label"][0], expected)
    assert np.array_equal(sample["instance"][0], np.where(expected == 26, 26000, 23))
    assert verify(tmp_path, tmp_path / "report", mode="cityscapes").returncode == 0
    assert run_script("scripts/data/prepare_cityscapes.py", "--data_dir", tmp_path / "report").returncode == 1


@pytest.mark.parametrize(
    ("mode", "folder", "classes"),
    [
        ("coco", "coco_sample", 183),
        ("celeba", "celeba_sample", 19),
    ],
)
def test_real_photographs(tmp_path, mode, folder, classes):
    data = shared_or_skip("data", folder)
    command = ["scripts/data/verify_data.py", "--data_dir", data, "--dataset_mode", mode, "--num_classes", str(classes)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, *command, "--report_dir", tmp_path], cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr


def test_bars_are_ordered_and_logarithmic():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (1, 2, 3)]
    chart = np.asarray(bar_chart(["a", "b", "c", "d"], [0.01, 0.1, 0.89, 0.0], colors, "Shares"))
    widths, tops = [], []
    for color in colors[:3]:
        rows, columns = np.where((chart == color).all(-1))
        widths.append(columns.max() - columns.min() + 1)
        tops.append(rows.min())
    assert tops == sorted(tops, reverse=True)
    assert abs(widths[1] - 2 * widths[0]) <= 4  # from 0.001 on: one decade to 0.01, two decades to 0.1; frames are 1 px
    assert not (chart == colors[3]).all(-1).any()
    with pytest.raises(ValueError, match="above zero"):
        bar_chart(["a"], [0.0], colors, "none")


def test_pictures_in_sub_folders_are_noted(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 2, "val": 1})
    for kind in ("images", "labels"):
        (root / "train" / kind / "more").mkdir()
        (root / "train" / kind / "scene1.png").rename(root / "train" / kind / "more" / "scene1.png")
    result = verify(root, tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 0 and "train: 1 scenes" in result.stdout
    for kind in ("images", "labels"):
        note = f"note: 1 picture file in sub-folders of {root / 'train' / kind} not read (more/scene1.png)"
        assert note in result.stdout
    assert result.stdout.count("not read") == 2


def test_turned_tiff_photographs_are_found_and_measured_as_stored(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 1, "val": 1})
    (root / "train/images/scene0.png").unlink()
    Image.fromarray(draw(0, (40, 30), 4)[0]).save(root / "train/images/scene0.tif", tiffinfo={0x0112: 6})
    result = verify(root, tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 1 and "scene0.tif has an EXIF orientation tag" in result.stderr
    (root / "dataset.json").write_text('{"exif": "ignore"}')
    result = verify(root, tmp_path / "report", "--num_classes", 4)
    assert result.returncode == 0 and "train: 1 scenes; photographs 40 x 30" in result.stdout
    assert "1 photographs have an EXIF orientation tag, which is ignored" in result.stdout
    save(root / "train/labels/scene0.png", np.zeros((40, 30), np.uint8))
    assert verify(root, tmp_path / "report", "--num_classes", 4).returncode == 1
    (root / "dataset.json").write_text('{"exif": "apply"}')
    assert verify(root, tmp_path / "report", "--num_classes", 4).returncode == 0
