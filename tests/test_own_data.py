"""The page about one's own data and the script it uses: what it shows exists and works."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from data_helpers import REPOSITORY, run_script
from PIL import Image

from guided_diffusion import settings
from guided_diffusion.data.specs import DataError, get_spec
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.script_util import build_config, create_model
from guided_diffusion.unet import AttentionBlock

PAGE = (REPOSITORY / "docs" / "your-own-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M)  # (language, text), taken from the top
MODEL_FLAGS = {field.name for field in dataclasses.fields(settings.ModelConfig)}


@pytest.mark.parametrize(("example", "classes"), list(enumerate([12, 4, 18])))
def test_the_examples_of_dataset_json_are_valid(tmp_path, example, classes):
    blocks = [text for language, text in BLOCKS if language == "json"]
    assert len(blocks) == 3
    (tmp_path / "dataset.json").write_text(blocks[example])
    spec = get_spec("custom", tmp_path)
    assert spec.num_classes == classes
    if example == 2:  # the merged classes, by hand
        table = spec.lookup_table(256)
        assert [spec.class_names[table[i]] for i in (0, 11, 12, 13, 17, 18, 255)] == [
            "road",
            "person",
            "person",
            "car",
            "motorcycle",
            "person",
            "unlabelled",
        ]


def test_every_key_of_dataset_json_is_in_the_table(tmp_path):
    (tmp_path / "dataset.json").write_text('{"no such key": 1}')
    with pytest.raises(ValueError) as error:
        get_spec("custom", tmp_path)
    known = str(error.value).split("known keys are ")[1].split(", ")
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == set(known)


def test_what_you_write_is_taken(tmp_path):
    section = PAGE.split("## You have, you write")[1].split("\n## ")[0]
    lines = [code for code in re.findall(r"`([^`]+)`", section) if re.match(r'"\w+": ', code)]
    assert len(lines) > 9
    for line in lines:
        line = line.replace(", ...]", ', {"name": "sky", "color": [1, 2, 3]}]')
        rest = '"classes": ["a", "b", "c", "d"]' if "ignore_id" in line else ""
        if "tolerance" in line or line == '"label_encoding": "colors"':
            rest = '"label_encoding": "colors", "classes": [{"name": "a", "color": [0, 0, 0]}]'
        keys = {**json.loads("{" + rest + "}"), **json.loads("{" + line + "}")}
        (tmp_path / "dataset.json").write_text(json.dumps(keys))
        get_spec("custom", tmp_path, None if "classes" in keys else 4)


def test_the_camvid_commands_fit_what_is_prepared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "data")
    image = np.zeros((360, 480, 3), np.uint8)
    for split in ("train", "val", "test"):
        for folder, pixels in (("images", image), ("labels", image[..., 0])):
            (tmp_path / "source" / split / folder).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "source" / split / folder / "a.png")
    run_script("scripts/data/prepare_camvid.py", "--source", tmp_path / "source", "--out", tmp_path / "data")
    shown = next(json.loads(text) for language, text in BLOCKS if language == "json")
    assert json.loads((tmp_path / "data" / "dataset.json").read_text()) == shown
    command = next(text for _, text in BLOCKS if "image_train.py" in text).replace("\\\n", " ")
    flags = dict(re.findall(r"--(\w+) (\S+)", command.split("image_train.py")[1]))
    config = build_config(settings.ModelConfig, {key: flags[key] for key in flags if key in MODEL_FLAGS})
    data = open_dataset(data_dir=tmp_path / "data", dataset_mode="custom", split="train", image_size=config.image_size)
    with torch.device("meta"):
        network = create_model(config, learn_sigma=True)
    network.check_size(*data.shape)
    placed = [block for block in network.input_blocks if any(isinstance(part, AttentionBlock) for part in block)]
    assert len(placed) == 6  # two at each of the three heights


def test_the_medical_example(tmp_path):
    script = ("scripts/scenes/make_medical_example.py", "--size", 64, "--data_dir")
    run_script(*script, tmp_path, "--train", 30, "--val", 3)
    assert json.loads((tmp_path / "dataset.json").read_text())["grey"] is True
    train, val = (
        open_dataset(data_dir=tmp_path, dataset_mode="custom", split=split, image_size=64, random_crop=False)
        for split in ("train", "val")
    )
    assert len(train) == 30 and len(val) == 3 and train.spec.class_names == ("background", "tissue", "organ", "lesion")
    light, shares, scenes = np.zeros(4), np.zeros(4), np.zeros(4)
    for i in range(30):
        image, ids = train[i]["image"].numpy(), train[i]["label"][0].numpy()
        assert (image[0] == image[1]).all() and (image[0] == image[2]).all()
        for c in range(4):
            light[c] += image[0][ids == c].sum()
            shares[c] += (ids == c).sum()
            scenes[c] += (ids == c).any()
    light /= shares
    assert (np.diff(light) > 10).all()  # the classes differ in brightness, so that a sample can be judged by it
    assert scenes[:3].tolist() == [30, 30, 30] and 10 < scenes[3] < 30 and shares[3] < 0.02 * shares.sum()
    assert not np.array_equal(train[0]["image"], val[0]["image"])
    first = (tmp_path / "train/images/slice_000.png").read_bytes()
    run_script(*script, tmp_path / "again", "--train", 1, "--val", 0)
    assert (tmp_path / "again/train/images/slice_000.png").read_bytes() == first  # the same seed draws the same slices


def test_the_loader_benchmark_runs(tmp_path):
    report = tmp_path / "new" / "loader.json"
    few = ("--sizes", "camvid", "--scenes", 2, "--batches", 1, "--rounds", 1)
    result = run_script("benchmarks/loader.py", *few, "--results_path", report)
    results = json.loads(report.read_text())["results"]
    assert set(results) == {"camvid"}
    row = results["camvid"]
    assert set(row["samples_per_second"]) == {"loader", "plain", "cached"} and "| camvid | 480 x 360" in result.stdout
    assert all(value > 0 for part in ("stages_ms", "samples_per_second") for value in row[part].values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore_id": -1}, r"dataset\.json: ignore_id is -1; it must be an id in the label maps, 0 to 65535"),
        ({"ignore_id": 65536}, "ignore_id is 65536"),
        ({"ignore_id": 7, "remap": {"7": 1}}, r"dataset\.json: remap and ignore_id both name the id 7; remove it"),
    ],
)
def test_an_ignore_id_that_cannot_be_meant_is_refused(tmp_path, settings, message):
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["a", "b"], **settings}))
    with pytest.raises(DataError, match=message):
        get_spec("custom", tmp_path)
