"""Class names and colours beside a checkpoint: recorded by every training, offered by the pipeline."""

import json
import sys

import numpy as np
import pytest
from data_helpers import write_benchmark, write_custom
from sampling_helpers import MODEL, SETTINGS, save_checkpoint
from training_helpers import flags

import image_train
from guided_diffusion.data.class_lists import (
    changed_meaning,
    check_same_meaning,
    class_record,
    moved_classes,
    recorded_classes,
)
from guided_diffusion.data.specs import DataError, get_spec, read_classes
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.splits import open_splits
from guided_diffusion.settings import DataConfig, ModelConfig, TrainConfig

TWO_NAMED = {"classes": ["sky", {"name": "road", "color": [1, 2, 3]}, "car"], "ignore_id": 255}


def trained(tmp_path, monkeypatch, data, **settings):
    """The config.json of a training of one step, and the pipeline of its checkpoint."""
    settings = {"max_steps": 1, "val_images": 0, "batch_size": 1, **settings}
    monkeypatch.setattr(sys, "argv", flags(data, tmp_path / "run", **settings))
    image_train.main()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    return config, SDMPipeline.from_checkpoint(tmp_path / "run" / "model.pt")


def test_a_benchmarks_classes_are_recorded_and_offered(tmp_path, monkeypatch):
    data = write_benchmark(tmp_path / "data", "ade20k")
    config, pipeline = trained(tmp_path, monkeypatch, data, dataset_mode="ade20k", num_classes=152)
    assert len(config["classes"]) == 152 and "dataset_json" not in config
    assert config["classes"][0] == {"name": "wall", "color": [120, 120, 120]}
    assert pipeline.class_names[12].startswith("person") and pipeline.class_names[151] == "class 151"
    assert pipeline.palette.dtype == np.uint8 and pipeline.palette.shape == (152, 3)
    assert np.array_equal(pipeline.palette[:151], read_classes("ade20k")[1])


def test_custom_classes_are_recorded_beside_dataset_json(tmp_path, monkeypatch):
    data = write_custom(tmp_path / "data", classes=3, settings=TWO_NAMED)
    config, pipeline = trained(tmp_path, monkeypatch, data)
    assert config["dataset_json"] == TWO_NAMED
    assert pipeline.class_names == ("sky", "road", "car", "unlabelled")
    assert pipeline.palette[1].tolist() == [1, 2, 3] and len({tuple(c) for c in pipeline.palette.tolist()}) == 4


@pytest.mark.parametrize("mode", ["cityscapes", "custom"])
def test_what_is_recorded_is_what_is_read(mode):
    spec = get_spec(mode, num_classes=40)
    config = json.loads(json.dumps({"classes": class_record(spec)}))
    names, palette = recorded_classes(config, 40, "config.json")
    assert names == spec.class_names and np.array_equal(palette, spec.palette) and palette.dtype == np.uint8


def test_records_of_older_trainings():
    names, palette = recorded_classes({"data": {"dataset_mode": "celeba"}}, 19, "config.json")
    assert names[13] == "hair" and palette[13].tolist() == [0, 0, 204]
    config = {"data": {"dataset_mode": "custom"}, "dataset_json": TWO_NAMED}
    names, palette = recorded_classes(config, 4, "config.json")
    assert names == ("sky", "road", "car", "unlabelled") and palette[1].tolist() == [1, 2, 3]
    names, palette = recorded_classes({**config, "dataset_json": {}}, 4, "config.json")
    assert names == get_spec("custom", num_classes=4).class_names and len(palette) == 4
    for unknown in (None, {}, {"data": {"dataset_mode": "custom"}}, {"data": {"dataset_mode": "of a later version"}}):
        assert recorded_classes(unknown, 4, "config.json") is None


RED = {"name": "red", "color": [255, 0, 0]}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([RED] * 3, "3 classes, 3 of them with a color, for a network of 4"),
        ([RED] * 3 + ["green"], "4 classes, 3 of them with a color"),
        ([RED] * 3 + [{"name": "green", "color": [0, 256, 0]}], "the color of class 3"),
        ({"names": []}, "class 0 is {'names'"),
        ("red", "1 classes, 0 of them"),
    ],
)
def test_recorded_classes_that_cannot_be_are_named(tmp_path, classes, message):
    path = save_checkpoint(tmp_path, tmp_path, classes=classes)
    with pytest.raises(DataError, match=f"classes in config.json beside .*ema_0.9_best.pt: .*{message}"):
        SDMPipeline.from_checkpoint(path)


def test_a_published_checkpoint_knows_no_names(tmp_path):
    path = save_checkpoint(tmp_path, tmp_path)
    (tmp_path / "config.json").unlink()
    pipeline = SDMPipeline.from_checkpoint(path, **SETTINGS)
    assert pipeline.class_names is None and pipeline.palette is None and pipeline.model_config == MODEL


def meanings(before: dict, now: dict, num_classes: int = 4) -> list[str]:
    return changed_meaning(*(get_spec("custom", None, num_classes, content) for content in (before, now)))


@pytest.mark.parametrize(
    "before,now,differences",
    [
        ({"remap": {"0": 3, "3": 0}}, {"remap": {"3": 0, "0": 3}}, 0),
        ({"remap": {"7": 1}}, {"remap": {"7": 2}}, 1),
        ({"remap": {"7": 1}}, {}, 0),  # 7 is an error now where it occurs
        ({}, {"remap": {"7": 1}}, 0),  # 7 was one
        ({}, {"remap": {"0": 1, "1": 0}}, 2),
        ({}, {"crop": "keep_aspect", "exif": "apply", "instances": False, "label_scale": True}, 0),
        ({"classes": ["a", "b", "c"]}, {"classes": ["A", "b", "c", "d"]}, 0),
        ({"classes": ["a", "b", "c"]}, {"classes": ["a", "c", "b"]}, 2),
        ({"classes": ["a", "b", "c"], "ignore_id": 255}, {"classes": ["a", "b", "c"], "ignore_id": 254}, 0),
        ({"classes": ["a", "b", "c"], "ignore_id": 255}, {"classes": ["a", "b"], "ignore_id": 255}, 3),
        ({"grey": True}, {"grey": False}, 1),
        ({"grey": False}, {}, 0),
    ],
)
def test_what_changes_the_meaning_of_ids(before, now, differences):
    assert len(meanings(before, now)) == differences
    if differences:
        with pytest.raises(DataError, match=r"^here contradicts the training"):
            check_same_meaning(before, now, 4, "here")
    else:
        check_same_meaning(before, now, 4, "here")


def test_colours_that_changed_places():
    def colored(names, encoding="colors", first=10):
        classes = [{"name": name, "color": [first * (ord(name) - 96), 0, 0]} for name in names]
        return {"classes": classes, "label_encoding": encoding}

    assert meanings(colored("abcd"), colored("abcd")) == []
    told = meanings(colored("abcd"), colored("bacd"))
    assert "color (10, 0, 0) meant class 0, now 1" in told and "classes: 'a' was class 0, now 1" in told
    assert meanings(colored("abcd", "ids"), colored("abcd", "ids", 11)) == []  # for display alone
    assert meanings(colored("abcd", "ids"), colored("abcd")) == ["label_encoding: ids then, colors now"]


def test_going_on_with_ids_of_another_meaning_is_refused(tmp_path):
    """As in sampling: a run that goes on, and a fine-tuning, read the meaning that their weights were trained with."""
    described = {"classes": ["a", "b", "c", "d"]}
    write_custom(tmp_path, classes=4, settings=described)
    data = DataConfig(data_dir=str(tmp_path), dataset_mode="custom")
    settings = TrainConfig(), ModelConfig(image_size=16, num_classes=4, no_instance=True)
    renamed = described | {"classes": [f"renamed {i}" for i in range(4)]}
    for recorded in (None, {}, {"dataset_json": described}, {"dataset_json": renamed}):
        train, _ = open_splits(data, *settings, recorded)
        assert len(train) > 0
    moved = described | {"remap": {"0": 1, "1": 0}}
    message = r"dataset\.json contradicts the training .*the stored id 0 meant class 1, now 0"
    with pytest.raises(DataError, match=message):
        open_splits(data, *settings, {"dataset_json": moved})


def test_a_name_that_has_moved_is_known_in_another_spelling():
    assert moved_classes(["sky", "traffic light", "car"], ["Street", "CAR", "Traffic-Light"]) == [
        "classes: 'Traffic-Light' was class 1, now 2", "classes: 'CAR' was class 2, now 1",
    ]  # fmt: skip
    twice = ["screen", "sky", "screen"]  # ADE20K has such a pair: which one is meant is not known
    assert moved_classes(twice, twice) == moved_classes(twice, ["sky", "a", "screen"])[1:] == []
