"""Settings that names and shapes of weights show, and those that they do not (weights/from_shapes.py)."""

import dataclasses
import gzip
import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from data_helpers import write_custom
from golden_helpers import GOLDEN
from sampling_helpers import MODEL, SETTINGS, run_here, save_checkpoint
from training_helpers import make_loop

from guided_diffusion.dist_util import World
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.recorded import recorded_settings
from guided_diffusion.script_util import build_config, create_model, network_settings
from guided_diffusion.settings import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TrainConfig,
    binding_settings,
)
from guided_diffusion.weights.from_shapes import describe, read_settings
from guided_diffusion.weights.store import CheckpointError

# As in the published scripts (scripts/run_benchmark.sh), which a published file comes without.
PUBLISHED = dict(
    image_size=256, num_head_channels=64, attention_resolutions="32,16,8", resblock_updown=True, num_res_blocks=2,
    use_scale_shift_norm=True, channel_mult="", diffusion_steps=1000, noise_schedule="linear", learn_sigma=True,
)  # fmt: skip
DATA_SETS = {"ade20k": (151, True), "celeba": (19, False), "cityscapes": (35, False), "coco": (183, False)}


def network(settings):
    with torch.device("meta"):
        return create_model(build_config(ModelConfig, settings), settings["learn_sigma"])


def names_and_shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_four_published_layouts_on_the_meta_device(data_set):
    with gzip.open(GOLDEN / "state_dict_layouts.json.gz", "rt") as file:
        names = json.load(file)[data_set]["state_dict"]
    state = {name: torch.empty(shape, device="meta") for name, shape in names}
    said = []
    config, source = describe(state, {}, "ema_0.9999_best.pt", said.append)
    model, diffusion, _ = network_settings({}, config, source)
    num_classes, no_instance = DATA_SETS[data_set]
    expected = PUBLISHED | dict(num_channels=256, num_classes=num_classes, no_instance=no_instance)
    # The published flags repeat what was read: none of them contradicts it, and nothing else differs.
    again = network_settings(expected, config, source)
    for ours, flagged in zip((model, diffusion), again, strict=False):
        ours, flagged = dataclasses.asdict(ours), dataclasses.asdict(flagged)
        ours.pop("channel_mult", None), flagged.pop("channel_mult", None)  # spelled out, and by size
        assert ours == flagged
    assert names_and_shapes(network(dataclasses.asdict(model) | {"learn_sigma": True}).state_dict()) == {
        name: tuple(shape) for name, shape in names
    }
    for unverified in ("image_size 256", "num_head_channels 64", "diffusion_steps 1000", f"num_classes {num_classes}"):
        assert unverified in said[0].split("unverified")[1]


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_a_published_layout_at_small_width_needs_no_settings(tmp_path, data_set):
    num_classes, no_instance = DATA_SETS[data_set]
    settings = PUBLISHED | dict(num_channels=32, num_classes=num_classes, no_instance=no_instance)
    shapes = names_and_shapes(network(settings).state_dict())
    torch.manual_seed(0)
    state = {name: torch.empty(shape).uniform_(-0.02, 0.02) for name, shape in shapes.items()}
    path = tmp_path / "ema_0.9999_best.pt"
    torch.save(state, path)
    said = []
    pipeline = SDMPipeline.from_checkpoint(path, note=said.append)
    path.unlink()  # 120 MB
    expected = build_config(ModelConfig, settings)
    assert dataclasses.replace(pipeline.model_config, channel_mult="", attention_resolutions="32,16,8") == expected
    assert pipeline.diffusion_config == build_config(DiffusionConfig, settings)
    assert all(torch.equal(value, state[name]) for name, value in pipeline.model.state_dict().items())
    assert len(said) == 1 and "unverified" in said[0]
    if data_set == "ade20k":
        picture = pipeline(np.arange(1024).reshape(32, 32) % 151, sampler="ddim", num_steps=1)[0]
        assert picture.size == (32, 32)


def test_every_shape_of_network_is_read_back():
    """Against the network itself: what is read builds the same names and shapes, and places attention the same."""
    choices = dict(
        channel_mult=("1", "1,2", "0.5,1,1.5"), num_res_blocks=(1, 2), resblock_updown=(True, False),
        attention_resolutions=("128", "64,16,8"), switches=((True, False), (False, True)),
    )  # fmt: skip
    for combination in list(itertools.product(*choices.values()))[::3]:  # 16 of them, with every choice
        given = dict(zip(choices, combination, strict=True))
        given["use_scale_shift_norm"], given["learn_sigma"] = given.pop("switches")
        theirs = network(given | dict(num_channels=64, num_classes=3, no_instance=True, num_heads=2)).state_dict()
        settings, unseen = read_settings(theirs, {"image_size": 64, "num_classes": 3, "num_heads": 2})
        assert names_and_shapes(network(settings).state_dict()) == names_and_shapes(theirs), given
        levels = len(given["channel_mult"].split(","))
        for name in ("num_res_blocks", "use_scale_shift_norm", "learn_sigma"):
            assert settings[name] == given[name]
        assert levels == 1 or settings["resblock_updown"] == given["resblock_updown"]
        assert (levels == 1) == ("resblock_updown" in unseen)
        factors = [
            {64 // int(height) for height in part.split(",")} & {2**level for level in range(levels)}
            for part in (settings["attention_resolutions"], given["attention_resolutions"])
        ]
        assert factors[0] == factors[1]


def test_every_binding_setting_is_read_or_listed():
    settings, _ = read_settings(network(SETTINGS).state_dict())
    assert settings.keys() == binding_settings(ModelConfig()).keys() | binding_settings(DiffusionConfig()).keys()


def test_the_split_of_the_layout_channels():
    state = network(SETTINGS | {"num_classes": 7}).state_dict()  # 7 channels, of no published network
    for given, split in (
        ({}, (6, False)),
        ({"num_classes": 7}, (7, True)),
        ({"num_classes": "6"}, (6, False)),
        ({"no_instance": "True"}, (7, True)),
        ({"num_classes": 7, "no_instance": True}, (7, True)),
    ):
        settings, unseen = read_settings(state, given)
        assert (settings["num_classes"], settings["no_instance"]) == split
        assert {"num_classes", "no_instance"} <= set(unseen)
    for num_classes, more in ((8, {}), (6, {"no_instance": True}), (7, {"no_instance": False})):
        with pytest.raises(ConfigError, match=rf"num_classes {num_classes}.* contradicts a\.pt.*7 layout channels"):
            read_settings(state, {"num_classes": num_classes, **more}, "a.pt")


@pytest.mark.parametrize(
    "name, value, read",
    [
        ("num_channels", 64, "32"),
        ("channel_mult", "1,2,2", "'1,2'"),
        ("num_res_blocks", 2, "1"),
        ("attention_resolutions", "16", "'8'"),
        ("learn_sigma", False, "True"),
        ("resblock_updown", False, "True"),
        ("use_scale_shift_norm", False, "True"),
    ],
)
def test_a_flag_that_contradicts_the_shapes_is_refused_with_both(name, value, read):
    given = SETTINGS | {name: value}
    config, source = describe(network(SETTINGS).state_dict(), given, "a.pt", lambda line: None)
    with pytest.raises(ConfigError, match=rf"--{name} {value} contradicts .* {name} {read} \(the weights in a\.pt\)"):
        network_settings(given, config, source)


def test_an_image_size_that_the_attention_contradicts():
    with pytest.raises(ConfigError, match=r"--image_size 33 contradicts a\.pt: .*multiple of 2"):
        read_settings(network(SETTINGS).state_dict(), {"image_size": 33}, "a.pt")


def test_parts_of_a_network_are_missing():
    whole = dict(network(SETTINGS).state_dict())
    for name in ("time_embed.0.weight", "out.2.weight", "input_blocks.1.0.out_layers.3.weight"):
        with pytest.raises(
            CheckpointError, match=f"a.pt does not hold the weights of an SDM network: {name} is missing"
        ):
            read_settings({n: v for n, v in whole.items() if n != name}, {}, "a.pt")
    with pytest.raises(CheckpointError, match=r"for 4 image channels that predicts 6"):
        read_settings(whole | {"input_blocks.0.0.weight": torch.empty(32, 4, 3, 3)}, {}, "a.pt")


# -- where they are used ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network's checkpoint, and the same weights in a wrapper beside others, without a config."""
    root = tmp_path_factory.mktemp("weights")
    write_custom(root / "data", {"train": 4, "val": 2}, size=(20, 20))
    whole = save_checkpoint(root / "run", root / "data")
    state = torch.load(whole, weights_only=True)
    (root / "alone").mkdir()
    others = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": others, "ema": {f"module.{n}": v for n, v in state.items()}}, root / "alone" / "last.ckpt")
    safetensors.torch.save_file(state, root / "alone" / "ema.safetensors")
    return root


UNSEEN = dict(image_size=16, num_classes=4, num_heads=4)


def test_sampling_without_a_config(folder):
    fast = ("--sampler", "ddim", "--num_steps", "2", "--data_dir", str(folder / "data"), "--dataset_mode", "custom")
    unseen = [word for name, value in UNSEEN.items() for word in (f"--{name}", str(value))]

    def sample(path, results, *flags):
        places = ("--model_path", str(folder / path), "--results_path", str(folder / results))
        return run_here("image_sample.py", *places, *fast, *flags)

    known = sample("run/ema_0.9_best.pt", "known")
    assert known.returncode == 0 and "unverified" not in known.stdout, known.stdout
    several = sample("alone/last.ckpt", "ema", *unseen)
    assert several.returncode and "choose one of model, ema with --weights_key" in several.stdout, several.stdout
    chosen = sample("alone/last.ckpt", "ema", "--weights_key", "ema", *unseen)
    assert chosen.returncode == 0 and "unverified: as given, image_size 16" in chosen.stdout, chosen.stdout
    assert "took the weights under ema; took the prefix module." in chosen.stdout
    for picture in (folder / "known" / "samples").iterdir():
        assert picture.read_bytes() == (folder / "ema" / "samples" / picture.name).read_bytes()
    other = sample("alone/last.ckpt", "ema", "--weights_key", "model", *unseen)
    assert other.returncode and "weights_key: 'ema' there, 'model' now" in other.stdout, other.stdout


def test_fine_tuning_without_a_config(folder, tmp_path, capsys):
    data = DataConfig(data_dir=str(folder / "data"), dataset_mode="custom")
    flags = {"num_classes": 4, "image_size": 16, "num_heads": 4}
    for path, key in (("ema.safetensors", ""), ("last.ckpt", "ema")):
        config = TrainConfig(resume_checkpoint=str(folder / "alone" / path), weights_key=key)
        recorded, source, notes = recorded_settings(flags, data, config, str(tmp_path / "new"), World())
        assert source == f"the weights in {config.resume_checkpoint}" and "unverified" in notes[-1]
        model, diffusion, _ = network_settings(flags, recorded, source, training=True)
        assert model == dataclasses.replace(MODEL, num_head_channels=-1)
        settings = dict(model=dataclasses.asdict(model), diffusion=dataclasses.asdict(diffusion))
        logdir = tmp_path / path
        loop = make_loop(folder / "data", logdir, **settings, max_steps=1, resume_checkpoint=config.resume_checkpoint,
                         weights_key=key)  # fmt: skip
        expected = torch.load(folder / "run" / "ema_0.9_best.pt", weights_only=True)
        assert all(torch.equal(value, expected[name]) for name, value in loop.model.state_dict().items())
        assert key == "" or "took the weights under ema" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="num_classes 9 contradicts"):
        recorded_settings(flags | {"num_classes": 9}, data, config, str(tmp_path / "new"), World())
