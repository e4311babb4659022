"""The embedded data set and its score."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path[:0] = [str(SCRIPTS / room) for room in ("data", "scenes")]

from make_scenes import draw, make_scenes  # noqa: E402
from preparation import PreparationError  # noqa: E402
from scene_painting import CLASSES, TIMES  # noqa: E402
from score_scenes import Palette, derangement, score  # noqa: E402


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "data"
    make_scenes(out, size=32, counts={"train": 80, "val": 32}, seed=0, workers=2)
    return out


@pytest.fixture
def results(scenes, tmp_path):
    """What a perfect sampler would write."""
    for kind, source in {"images": "images", "samples": "images", "labels": "labels"}.items():
        shutil.copytree(scenes / "val" / source, tmp_path / kind)
    return tmp_path


def read(path):
    return np.asarray(Image.open(path))


def test_layout_of_the_data_set(scenes):
    classes = json.loads((scenes / "dataset.json").read_text())["classes"]
    assert [c["name"] for c in classes] == [name for name, _ in CLASSES]
    seen = set()
    for split, count in (("train", 80), ("val", 32)):
        images, labels = (sorted(p.name for p in (scenes / split / kind).iterdir()) for kind in ("images", "labels"))
        assert images == labels and len(images) == count
        for name in images:
            image, ids = (read(scenes / split / kind / name) for kind in ("images", "labels"))
            assert image.shape == (32, 32, 3) and ids.shape == (32, 32) and ids.dtype == np.uint8
            seen |= set(np.unique(ids).tolist())
    assert seen == set(range(len(classes)))  # every class occurs and no id is out of range


def test_scene_depends_on_seed_split_and_index_only(scenes):
    image, ids = draw(0, "val", 7, 32)  # drawn in this process, alone; the files came from two others
    np.testing.assert_array_equal(image, read(scenes / "val" / "images" / "00007.png"))
    np.testing.assert_array_equal(ids, read(scenes / "val" / "labels" / "00007.png"))
    for other in (draw(1, "val", 7, 32), draw(0, "train", 7, 32), draw(0, "val", 8, 32)):
        assert (other[0] != image).any(-1).mean() > 0.5


def test_same_composition_at_any_size():
    for index in range(8):
        small, large = draw(0, "train", index, 24)[1], draw(0, "train", index, 72)[1]
        # The centre of each 3x3 block of the large map; only pixels on an edge (up to a tenth here) may differ.
        assert (small == large[1::3, 1::3]).mean() > 0.9


def test_command_makes_the_same_files_again_and_refuses_others(scenes, tmp_path):
    script = SCRIPTS / "scenes" / "make_scenes.py"
    command = [sys.executable, script, "--out", tmp_path / "a", "--train", "5", "--val", "3"]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "5 train and 3 val scenes" in run.stdout
    assert sorted(p.name for p in (tmp_path / "a/train/images").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert (tmp_path / "a/val/images/00002.png").read_bytes() == (scenes / "val/images/00002.png").read_bytes()
    fewer = subprocess.run([*command[:-3], "4", *command[-2:]], capture_output=True, text=True)
    assert fewer.returncode and "00004.png does not belong there" in fewer.stderr and "Traceback" not in fewer.stderr


def test_times_of_day_change_the_colours_and_not_the_composition():
    for index in range(4):
        scenes = {time: draw(0, "train", index, 32, [time]) for time in TIMES}
        assert all((labels == scenes["day"][1]).all() for _, labels in scenes.values())
        brightness = {time: image[labels == 0].mean() for time, (image, labels) in scenes.items()}  # of the sky
        assert brightness["night"] < 110 < 150 < min(brightness["day"], brightness["sunset"])
    mixed = [draw(0, "train", index, 32, list(TIMES))[0] for index in range(12)]
    assert min(m[:8].mean() for m in mixed) < 110 and max(m[:8].mean() for m in mixed) > 150


@pytest.mark.parametrize(
    "change", [{"size": 4}, {"counts": {"train": 0, "val": 1}}, {"times": ["dusk"]}, {"times": []}], ids=str
)
def test_impossible_data_sets_are_refused_before_anything_is_written(tmp_path, change):
    settings = {"size": 32, "counts": {"train": 1, "val": 1}, "seed": 0, "workers": 1}
    with pytest.raises(PreparationError):
        make_scenes(tmp_path / "data", **settings | change)
    assert not (tmp_path / "data").exists()


def test_nearest_class_against_brute_force():
    rng = np.random.default_rng(0)
    palette = Palette(rng.uniform(0, 255, (30, 3)), rng.integers(0, 9, 30))
    image = rng.integers(0, 256, (5, 7, 3))
    distance = np.square(image[:, :, None].astype(float) - palette.colours).sum(-1)
    np.testing.assert_array_equal(palette.nearest_class(image), palette.class_ids[distance.argmin(-1)])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_derangement_leaves_nothing_in_place(count):
    for seed in range(20):
        partner = derangement(count, seed)
        assert sorted(partner) == list(range(count)) and (partner != np.arange(count)).all()


def test_real_images_follow_their_layouts_and_not_those_of_others(results, scenes):
    figures = score(results, scenes, centres=8, seed=0)
    assert figures == score(results, scenes, centres=8, seed=0)
    assert figures["adherence"] == figures["real"] > 0.97  # measured 0.99: pixels on an edge mix two classes
    assert figures["shuffled"] < 0.65  # measured 0.52: what another layout shares by chance
    assert all(row["real"] > 0.75 for row in figures["per_class"].values())
    assert sum(row["pixels"] for row in figures["per_class"].values()) == pytest.approx(1)


def test_samples_of_other_layouts_and_wrong_colours_score_low(results, scenes):
    files = sorted((results / "samples").iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    figures = score(results, scenes, centres=8, seed=0)
    assert figures["adherence"] < 0.65 < figures["real"]
    for file in files:
        Image.fromarray(255 - read(file)).save(file)
    assert score(results, scenes, centres=8, seed=0)["adherence"] < 0.45


def test_score_command_prints_a_table_and_writes_the_figures(results, scenes):
    file = results / "new" / "figures.json"
    command = [sys.executable, SCRIPTS / "scenes" / "score_scenes.py", results, "--data", scenes, "--json", file]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "mountain" in run.stdout and str(file) in run.stdout
    assert json.loads(file.read_text()) == score(results, scenes, centres=8, seed=0)
    assert [p.name for p in file.parent.iterdir()] == ["figures.json"]


def break_folder(results, scenes):
    shutil.rmtree(results / "samples")


def break_partner(results, scenes):
    (results / "samples" / "00003.png").unlink()


def break_size(results, scenes):
    Image.new("RGB", (16, 16)).save(results / "samples" / "00003.png")


def break_file(results, scenes):
    (results / "samples" / "00003.png").write_bytes(b"not a picture")


def break_channels(results, scenes):
    Image.new("RGB", (32, 32)).save(results / "labels" / "00003.png")


def break_ids(results, scenes):
    Image.new("L", (32, 32), 77).save(results / "labels" / "00003.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_folder, "samples holds no PNG files"),
        (break_partner, "00003.png is in only one of"),
        (break_size, "00003.png: .* has \\(16, 16\\)"),
        (break_file, "00003.png cannot be read"),
        (break_channels, "00003.png has .* one channel"),
        (break_ids, "class ids \\[77\\]"),
    ],
)
def test_unusable_results_are_named(results, scenes, damage, message):
    damage(results, scenes)
    with pytest.raises(PreparationError, match=message):
        score(results, scenes, centres=8, seed=0)


def test_classes_may_be_plain_names_and_what_is_wrong_with_them_is_named(results, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    file = tmp_path / "scenes" / "dataset.json"
    content = json.loads(file.read_text())
    names = [f"plain {entry['name']}" for entry in content["classes"]]
    file.write_text(json.dumps({**content, "classes": names}))
    assert set(score(results, tmp_path / "scenes", centres=1, seed=0)["per_class"]) <= set(names)
    file.write_text(json.dumps({**content, "classes": [*names, names[0]]}))
    with pytest.raises(PreparationError, match=r"dataset\.json: the classes 0 and 9 are both named"):
        score(results, tmp_path / "scenes", centres=1, seed=0)


def test_missing_data_set_is_named(results, tmp_path):
    with pytest.raises(PreparationError, match="nowhere"):
        score(results, tmp_path / "nowhere", centres=8, seed=0)
