"""The pipeline in one process: three lines of Python, checkpoints of both kinds, what cannot be right."""

import dataclasses
import pathlib
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
from data_helpers import packed_png, write_custom
from golden_helpers import golden_case
from PIL import Image
from sampling_helpers import MODEL, SETTINGS, save_checkpoint

from guided_diffusion.layouts.encode import encode_label_map
from guided_diffusion.pipeline import SDMPipeline, image_seed
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings import ConfigError, ModelConfig, Sampling
from guided_diffusion.weights import store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    write_custom(root / "data", classes=4)
    save_checkpoint(root / "run", root / "data")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder):
    return str(folder / "run" / "ema_0.9_best.pt")


LABEL = np.arange(256).reshape(16, 16) // 64
FAST = dict(s=1.5, sampler="dpmsolver++", num_steps=4)


def test_three_lines(checkpoint):
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    images = pipeline(LABEL, s=1.5, sampler="dpmsolver++", num_steps=4, seed=7)
    assert images[0].size == (16, 16) and images[0].mode == "RGB"
    again = pipeline(LABEL, samples=2, seed=7, **FAST)
    assert np.array_equal(images[0], again[0])
    assert not np.array_equal(again[0], again[1])
    assert not np.array_equal(images[0], pipeline(LABEL, seed=8, **FAST)[0])
    apart = pipeline(LABEL, samples=3, batch_size=2, seed=7, **FAST)
    assert len(apart) == 3 and np.abs(np.asarray(apart[1]).astype(int) - np.asarray(again[1])).max() <= 1


def test_a_network_of_grey_pictures_makes_grey_ones(checkpoint, tmp_path):
    coloured = np.asarray(SDMPipeline.from_checkpoint(checkpoint)(LABEL, **FAST)[0])
    assert np.ptp(coloured, axis=2).max() > 1
    save_checkpoint(tmp_path, tmp_path, dataset_json={"grey": True})
    grey = np.asarray(SDMPipeline.from_checkpoint(tmp_path / "ema_0.9_best.pt")(LABEL, **FAST)[0])
    assert np.ptp(grey, axis=2).max() == 0
    inside = (coloured.min(axis=2) > 0) & (coloured.max(axis=2) < 255)  # where nothing was cut off
    assert inside.any() and np.abs(grey[..., 0] - coloured.mean(axis=2))[inside].max() < 1.01


def test_a_file_is_as_good_as_an_array(checkpoint, tmp_path):
    Image.fromarray(LABEL.astype(np.uint8)).save(tmp_path / "layout.png")
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    assert np.array_equal(pipeline(LABEL, **FAST)[0], pipeline(tmp_path / "layout.png", **FAST)[0])


def test_settings_of_a_checkpoint_without_a_config(checkpoint, tmp_path):
    alone = tmp_path / "published.pt"
    alone.write_bytes(open(checkpoint, "rb").read())  # noqa: SIM115
    image = SDMPipeline.from_checkpoint(str(alone), **SETTINGS)(LABEL, **FAST)[0]
    assert np.array_equal(image, SDMPipeline.from_checkpoint(checkpoint)(LABEL, **FAST)[0])
    with pytest.raises(ConfigError, match=r"num_channels 64 contradicts .* num_channels 32 \(the weights in .*\.pt\)"):
        SDMPipeline.from_checkpoint(str(alone), **{**SETTINGS, "num_channels": 64})
    with pytest.raises(ConfigError, match=r"num_classes 9 .*contradicts .* 4 layout channels"):
        SDMPipeline.from_checkpoint(str(alone), **{**SETTINGS, "num_classes": 9})


@pytest.mark.parametrize("sampling", [FAST, {"s": 2.0, "sampler": "ddpm", "num_steps": 3}, {"s": 1.0, "num_steps": 2}])
def test_keeping_modulations_changes_nothing(checkpoint, sampling):
    """The same arithmetic, in another order: float32 to 1e-4, which is far less than one of 255 levels."""
    kept, plain = (SDMPipeline.from_checkpoint(checkpoint, keep_modulations=keep) for keep in ("true", "false"))
    a, b = (np.asarray(pipeline(LABEL, **sampling)[0]).astype(int) for pipeline in (kept, plain))
    assert np.abs(a - b).max() <= 1


def test_predicted_memory_is_what_is_kept():
    model, _, _, y = golden_case("base")
    layout = model.encode_layout(y, keep=True)
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in layout._modulations.values() for t in m
    }
    assert sum(kept.values()) == len(y) * model.modulation_bytes(*y.shape[2:])


def test_modulations_are_computed_once(checkpoint, monkeypatch):
    """Once per layout for all steps, and once per run for the null layout."""
    from guided_diffusion.layouts.spade import SPADEGroupNorm

    calls = []
    original = SPADEGroupNorm.modulation
    monkeypatch.setattr(SPADEGroupNorm, "modulation", lambda self, y: calls.append(1) or original(self, y))
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    norms = len(list(pipeline.model.spade_norms()))
    pipeline(LABEL, **FAST)
    assert len(calls) == 2 * norms
    pipeline(LABEL, samples=3, **FAST)
    assert len(calls) == 3 * norms


def test_what_is_encoded_holds_no_map():
    model, _, _, y = golden_case("base")
    assert model.encode_layout(y, keep=True).y.untyped_storage().nbytes() == 0


def test_numbers_that_are_not_finite_make_no_picture(checkpoint):
    pipeline = SDMPipeline.from_checkpoint(checkpoint, precision="fp16")
    next(pipeline.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in fp16: try --precision bf16"):
        pipeline(LABEL, **FAST)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_give_nearly_the_same_picture(checkpoint, precision):
    exact = np.asarray(SDMPipeline.from_checkpoint(checkpoint)(LABEL, **FAST)[0]).astype(float)
    other = np.asarray(SDMPipeline.from_checkpoint(checkpoint, precision=precision)(LABEL, **FAST)[0]).astype(float)
    # bfloat16 has 8 bits of precision; errors of a few levels, none of them visible
    assert np.abs(exact - other).mean() < 3.0


def test_images_of_a_batch_are_those_made_alone(checkpoint):
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    labels = torch.from_numpy(np.stack([LABEL, LABEL.T, LABEL[::-1].copy()]))[:, None]
    seeds = [image_seed(0, name, 0) for name in "abc"]
    sampling = Sampling(s=1.5, sampler="ddpm", num_steps=5)
    together = pipeline.generate(labels, None, seeds=seeds, sampling=sampling)
    for i in range(3):
        alone = pipeline.generate(labels[i : i + 1], None, seeds=seeds[i : i + 1], sampling=sampling)
        # convolutions may choose another kernel for another batch: rounding, at most one level of 255
        assert np.abs(together[i].astype(int) - alone[0].astype(int)).max() <= 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"num_steps": 1001}, "num_steps must lie between 1 and the 1000 trained steps; got 1001"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"dynamic_threshold": 2.0}, "dynamic_threshold"),
        ({"eta": -1.0}, "eta"),
        ({"s": float("nan")}, "s must be a finite number; got nan"),
        ({"s": float("inf")}, "s must be a finite number; got inf"),
        ({"s": None}, r"s must be a number; got None \(NoneType\)"),
        ({"num_steps": 2.5}, "num_steps must be a whole number; got 2.5"),
        ({"clip_denoised": "perhaps"}, "clip_denoised must be True or False; got 'perhaps'"),
        ({"guidance_interval": "0.5"}, "guidance_interval must be LOW,HIGH, .* got '0.5'"),
        ({"guidance_interval": (0, 0.5, 1)}, r"guidance_interval must be LOW,HIGH, .* got \(0, 0.5, 1\)"),
        ({"guidance_interval": None}, "guidance_interval must be LOW,HIGH, .* got None"),
    ],
)
def test_settings_that_cannot_be(checkpoint, arguments, message):
    with pytest.raises(ConfigError, match=message):
        SDMPipeline.from_checkpoint(checkpoint)(LABEL, **{**FAST, **arguments})


def test_settings_of_other_types_mean_the_same():
    plain = Sampling(s=2.0, num_steps=5, timestep_respacing="10,15", guidance_interval=(0.0, 0.5), clip_denoised=False)
    other = Sampling(
        "2", num_steps=np.int64(5), timestep_respacing=[10, 15], guidance_interval="0,0.5", clip_denoised=0
    )
    assert other == plain and dataclasses.replace(other) == plain
    assert {type(value) for value in dataclasses.asdict(other).values()} == {float, int, str, tuple, bool}
    assert Sampling(guidance_interval=[0, 1]) == Sampling()


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_a_seed_is_a_number_whatever_holds_it(checkpoint, three):
    assert image_seed(three, "a", np.int64(1)) == image_seed(3, "a", 1)
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    assert np.array_equal(pipeline(LABEL, seed=three, **FAST)[0], pipeline(LABEL, seed=3, **FAST)[0])


def test_seeds_stay_what_they_were():
    assert (
        image_seed(0, "", 0) == 3323650313632651868
        and image_seed(True, "name", 2) == image_seed(1, "name", 2) == 5103386432334912746
    )


@pytest.mark.parametrize("seed", [0.0, "0", None, torch.tensor(0.0)])
def test_what_is_no_seed_is_refused(checkpoint, seed):
    with pytest.raises(TypeError, match=r"seed must be a whole number, as 0; got .*: convert it"):
        SDMPipeline.from_checkpoint(checkpoint)(LABEL, seed=seed, **FAST)


def test_layouts_that_cannot_be(checkpoint):
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="ids 0 to 4; the network knows 0 to 3"):
        pipeline(np.minimum(LABEL + LABEL // 3, 4), **FAST)
    with pytest.raises(ValueError, match=r"multiples of 2; got 15x16 .*height 14 or 16"):
        pipeline(LABEL[:15], **FAST)
    with pytest.raises(ValueError, match="one per pixel"):
        pipeline(np.zeros((16, 16, 3), np.uint8), **FAST)
    with pytest.raises(ValueError, match="takes no instance_map"):
        pipeline(LABEL, instance_map=LABEL, **FAST)


def test_checkpoints_that_cannot_be(checkpoint, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"num_classes 7 contradicts .* num_classes 4"):
        SDMPipeline.from_checkpoint(checkpoint, num_classes=7)
    with pytest.raises(ConfigError, match="unknown settings: num_clases"):
        SDMPipeline.from_checkpoint(checkpoint, num_clases=4)
    with pytest.raises(store.CheckpointError, match="there is no checkpoint"):
        SDMPipeline.from_checkpoint(str(tmp_path / "none.pt"), **SETTINGS)
    whole = open(checkpoint, "rb").read()  # noqa: SIM115
    for name, content, said in (
        ("half.pt", whole[: len(whole) // 2], "truncated"),
        ("empty.pt", b"", "empty"),
        ("text.pt", b"not a checkpoint", "no checkpoint"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(store.CheckpointError, match=f"{name} is {said}"):
            SDMPipeline.from_checkpoint(str(tmp_path / name), **SETTINGS)


def test_other_spellings_of_one_network_do_not_contradict(checkpoint):
    spellings = [
        {"channel_mult": "1.0,2", "attention_resolutions": "8"},
        {"channel_mult": (1, 2), "attention_resolutions": [8], "num_channels": "32", "no_instance": "True"},
        {"channel_mult": [1.0, 2], "attention_resolutions": 8, "num_channels": np.int64(32), "image_size": 16.0},
    ]
    for settings in spellings:
        pipeline = SDMPipeline.from_checkpoint(checkpoint, **settings)
        assert pipeline.model_config.multipliers() == MODEL.multipliers()


def test_builders_take_numbers_and_lists():
    settings = {**SETTINGS, "attention_resolutions": 8, "channel_mult": (1, 2), "use_fp16": "False"}
    model, diffusion = create_model_and_diffusion(**settings)
    assert model.state_dict().keys() == create_model_and_diffusion(**SETTINGS)[0].state_dict().keys()
    assert model.dtype == torch.float32 and diffusion.num_timesteps == 1000


@pytest.mark.parametrize(
    "name,value,wanted",
    [
        ("num_channels", "many", "a whole number"),
        ("num_channels", 32.5, "a whole number"),
        ("channel_mult", None, "text or numbers"),
        ("channel_mult", (1, None), "text or numbers"),
        ("dropout", "none", "a number"),
        ("learn_sigma", "maybe", "True or False"),
    ],
)
def test_settings_of_no_clear_meaning(checkpoint, name, value, wanted):
    with pytest.raises(ConfigError, match=f"{name} must be {wanted}; got {re.escape(repr(value))}"):
        SDMPipeline.from_checkpoint(checkpoint, **{name: value})


def test_a_path_is_as_good_as_text(checkpoint):
    image = SDMPipeline.from_checkpoint(pathlib.Path(checkpoint))(LABEL, **FAST)[0]
    assert np.array_equal(image, SDMPipeline.from_checkpoint(checkpoint)(LABEL, **FAST)[0])


def test_instances_and_rectangles(tmp_path):
    model = dataclasses.replace(MODEL, no_instance=False)
    pipeline = SDMPipeline.from_checkpoint(save_checkpoint(tmp_path / "run", tmp_path, model))
    wide = np.repeat(LABEL, 2, axis=1)
    image = pipeline(wide, instance_map=wide * 1000, **FAST)[0]
    assert image.size == (32, 16)
    other = pipeline(wide, instance_map=np.zeros_like(wide), **FAST)[0]
    assert not np.array_equal(image, other)
    with pytest.raises(ValueError, match="needs an instance_map"):
        pipeline(wide, **FAST)
    for shape in ((1, 1), (16, 1), (1, 32), (8, 8)):
        sizes = f"instance map is {shape[0]}x{shape[1]} .* label map 16x32"
        with pytest.raises(ValueError, match=sizes):
            pipeline(wide, instance_map=np.zeros(shape, int), **FAST)


def test_a_layout_much_larger_than_in_training_is_noted_once(checkpoint):
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(LABEL, **FAST)
        pipeline(np.repeat(LABEL, 2, axis=1), **FAST)
    large = np.kron(LABEL, np.ones((2, 2), int))
    with pytest.warns(UserWarning, match="the layout is 32 x 32, and the network was trained on 16 x 16") as caught:
        pipeline(large, **FAST)
        pipeline(large, **FAST)
    assert len(caught) == 1


def test_label_maps_whose_ids_a_reader_would_change(tmp_path, checkpoint):
    """As in a data set: 1 of 4 bits of grey comes out of Pillow as 17, which may well be a class."""
    pipeline = SDMPipeline.from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"the label map .*grey\.png is grey with 4 bits per pixel"):
        pipeline(packed_png(tmp_path / "grey.png", LABEL % 2, 4), **FAST)
    stored = packed_png(tmp_path / "palette.png", LABEL, 4, palette=True)
    assert np.array_equal(pipeline(stored, **FAST)[0], pipeline(LABEL, **FAST)[0])
    with pytest.raises(ValueError, match=r"the label map .*none\.png does not exist"):
        pipeline(tmp_path / "none.png", **FAST)


def test_traditional_channel_multipliers():
    assert ModelConfig(image_size=256).multipliers() == (1, 1, 2, 2, 4, 4)
    with pytest.raises(ConfigError, match="--channel_mult"):
        ModelConfig(image_size=48).multipliers()


@pytest.mark.parametrize("reuses", [False, True])
def test_no_map_is_held_while_images_form(checkpoint, monkeypatch, reuses):
    """Where scale and shift are kept, the one-hot maps are freed before the first step."""
    from guided_diffusion import pipeline as module

    maps, alive = [], []

    def encode(*arguments):
        y = encode_label_map(*arguments)
        maps.append(weakref.ref(y))
        return y

    monkeypatch.setattr(module, "encode_label_map", encode)
    made = SDMPipeline.from_checkpoint(checkpoint, keep_modulations="true")
    made.layouts.reuse = reuses
    label = torch.from_numpy(LABEL)[None, None]
    look = lambda _: alive.append(maps[0]() is not None)  # noqa: E731
    made.generate(label, None, seeds=[0], sampling=Sampling(**FAST), on_step=look)
    assert alive == [False] * 4
