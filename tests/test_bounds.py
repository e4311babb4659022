"""Values out of range, and sizes that no machine can hold, are refused by name, before memory is taken; planning takes
none."""

import tracemalloc

import pytest
import torch

from guided_diffusion import script_util
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.settings import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    PlanConfig,
    SampleConfig,
    TrainConfig,
)

TINY = dict(image_size=16, num_classes=4, num_channels=32, channel_mult="1,2", attention_resolutions="8")


def make_network(**settings):
    return create_model(ModelConfig(**TINY | settings), True)


def check(cls, **settings):
    config = cls(**settings)
    if hasattr(config, "check"):
        config.check()


@pytest.mark.parametrize(
    "name,value,make",
    [
        ("num_res_blocks", 10**6, make_network),
        ("num_channels", 10**9, make_network),
        ("num_classes", 10**8, make_network),
        ("image_size", 2**40, make_network),
        ("num_heads", 2**40, make_network),
        ("channel_mult", "1,1e8", make_network),
        ("channel_mult", ",".join(["1"] * 10**5), make_network),
        ("diffusion_steps", 10**9, lambda **given: create_gaussian_diffusion(DiffusionConfig(**given))),
        ("batch_size", 10**9, lambda **given: check(TrainConfig, **given)),
        ("batch_size", 10**9, lambda **given: check(SampleConfig, model_path="x", **given)),
        ("samples_per_layout", 10**9, lambda **given: check(SampleConfig, model_path="x", **given)),
        ("scale_jitter", 1e9, lambda **given: check(TrainConfig, **given)),
        ("num_workers", 10**6, lambda **given: check(DataConfig, **given)),
        ("plan_ranks", 10**12, lambda **given: check(PlanConfig, **given)),
    ],
)
def test_absurd_sizes_are_refused_by_name(name, value, make):
    tracemalloc.start()
    with pytest.raises(ConfigError, match=name):
        make(**{name: value})
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 64 * 2**20


@pytest.mark.parametrize(
    "cls,name,value",
    [
        (TrainConfig, "seed", 2**64),
        (TrainConfig, "seed", -1),
        (TrainConfig, "max_steps", 2**64),
        (TrainConfig, "lr", float("inf")),
        (TrainConfig, "logdir", "s3://bucket/run"),
        (TrainConfig, "resume_checkpoint", "a\0b"),
        (DataConfig, "num_workers", -1),
        (DataConfig, "data_dir", "s3://bucket/set"),
        (ModelConfig, "num_channels", 0),
        (ModelConfig, "dropout", float("nan")),
        (ModelConfig, "channel_mult", "0.01,1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(cls, name, value):
    with pytest.raises(ConfigError, match=name):
        check(cls, **(TINY if cls is ModelConfig else {}) | {name: value})


def test_a_network_that_exceeds_the_memory_is_refused_before_it_is_made(monkeypatch):
    count = sum(parameter.numel() for parameter in make_network().parameters())
    monkeypatch.setattr(script_util, "available_memory", lambda: 4 * count - 1)
    made, network = [], torch.nn.Linear(count - 1, 1, device="meta")  # as many parameters
    monkeypatch.setattr(script_util, "UNetModel", lambda **_: made.append(torch.empty(0).is_meta) or network)
    with pytest.raises(ConfigError, match=rf"a network of {count / 1e6:,.0f} M parameters, .*lower num_channels"):
        make_network()
    assert made == [True]  # on the meta device alone
    monkeypatch.setattr(script_util, "available_memory", lambda: 4 * count)
    assert make_network() is network and made == [True, True, False]


def test_a_network_larger_than_the_memory_can_be_planned(monkeypatch):
    monkeypatch.setattr(script_util, "available_memory", lambda: 0)
    with torch.device("meta"):
        network = make_network(num_channels=4096)
    assert sum(parameter.numel() for parameter in network.parameters()) > 10**9
