"""A network with instance edges, and layouts without instance maps: the edges between classes take their place."""

import dataclasses

import numpy as np
import pytest
from data_helpers import write_benchmark, write_custom
from PIL import Image
from sampling_helpers import MODEL, run_here, save_checkpoint

from guided_diffusion.data.specs import DataError
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.splits import open_splits
from guided_diffusion.settings import ConfigError, DataConfig, TrainConfig

WITH_EDGES = dataclasses.replace(MODEL, no_instance=False)
FAST = {"sampler": "ddim", "num_steps": 2, "s": 1.0}


@pytest.fixture
def data(tmp_path):
    return write_custom(tmp_path / "data", {"train": 2, "val": 2}, size=(20, 20))


def splits(root, instances="", recorded=None, mode="custom", model=WITH_EDGES):
    data = DataConfig(data_dir=str(root), dataset_mode=mode, instances=instances)
    data.check()
    return open_splits(data, TrainConfig(), model, recorded)


def test_training(data, tmp_path):
    with pytest.raises(ConfigError, match=r"no instance maps.*give --instances from_labels \(edges between classes"):
        splits(data)
    for dataset in (*splits(data, "from_labels"), *splits(data, recorded={"data": {"instances": "from_labels"}})):
        sample = dataset[0]
        assert (sample["instance"] == sample["label"]).all()
    with pytest.raises(ConfigError, match=r"instances must be from_labels, or be left out; got 'labels'"):
        splits(data, "labels")
    write_benchmark(tmp_path / "city", "cityscapes")
    for path in (tmp_path / "city").rglob("*instanceIds.png"):
        path.unlink()
    model = dataclasses.replace(WITH_EDGES, num_classes=35)
    with pytest.raises(DataError, match="use --instances from_labels"):
        splits(tmp_path / "city", mode="cityscapes", model=model)
    assert splits(tmp_path / "city", "from_labels", mode="cityscapes", model=model)[0].has_instances


def test_sampling_and_the_pipeline(data, tmp_path):
    path = save_checkpoint(tmp_path / "run", data, WITH_EDGES)
    flags = ["image_sample.py", "--model_path", path, "--results_path", str(tmp_path / "results")]
    flags += ["--sampler", "ddim", "--num_steps", "2", "--s", "1", "--batch_size", "2"]
    result = run_here(*flags)
    assert result.returncode == 1 and "give --instances from_labels (edges between classes" in result.stdout
    result = run_here(*flags, "--instances", "from_labels")
    assert result.returncode == 0, result.stdout
    pipeline = SDMPipeline.from_checkpoint(path)
    layout = tmp_path / "results/labels/scene0.png"
    with pytest.raises(ValueError, match=r'needs an instance_map \(or instance_map="from_labels"'):
        pipeline(layout, **FAST)
    image = np.asarray(pipeline(layout, instance_map="from_labels", name="scene0", **FAST)[0])
    assert np.array_equal(image, pipeline(layout, instance_map=layout, name="scene0", **FAST)[0])
    assert not np.array_equal(image, pipeline(layout, instance_map=np.zeros((16, 16), int), name="scene0", **FAST)[0])
    sampled = np.asarray(Image.open(tmp_path / "results/samples/scene0.png")).astype(int)
    assert np.abs(sampled - image).max() <= 1  # batches of two and of one
