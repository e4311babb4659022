"""Weights from whatever file they are in, and what is refused, each by its own sentence (weights/reading.py)."""

import argparse
import io
import json
import os
import pathlib
import pickle
import traceback
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from sampling_helpers import MODEL

from guided_diffusion.script_util import create_model
from guided_diffusion.weights.files import CheckpointError
from guided_diffusion.weights.from_shapes import read_shapes
from guided_diffusion.weights.reading import load_weights
from guided_diffusion.weights.store import load_state_into, read_config

STATE = {
    "time_embed.0.weight": torch.arange(12.0).reshape(4, 3) / 8,  # exact in every type
    "input_blocks.0.0.weight": torch.arange(8.0).reshape(2, 4) - 3,
    "input_blocks.0.0.bias": torch.tensor([0.5, -2.0]),
}
EMA = {name: value + 1 for name, value in STATE.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def saved(path, content, kind="zip"):
    if kind == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return str(path)


def same(state, expected=STATE):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(str(path), **options)
    assert str(path) in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    for advice in ("weights_only=False", "add_safe_globals", "torch.load", "safe_globals"):
        assert advice not in shown, "PyTorch's advice to switch its protection off"
    return str(caught.value)


# -- wrappers ---------------------------------------------------------------------------------------------------------

WRAPPED = {
    "plain": (STATE, ""),
    "parallel": (prefixed("module."), "prefix module."),
    "compiled": (prefixed("_orig_mod."), "PyTorch's wrappers"),
    "compiled, then parallel": (prefixed("module._orig_mod."), "prefix module."),
    "parallel, then compiled": (prefixed("_orig_mod.module."), "prefix module."),
    "a compiled part": ({k.replace("0.0", "0._orig_mod.0"): v for k, v in STATE.items()}, "PyTorch's wrappers"),
    "an average": ({"n_averaged": torch.tensor(3), **prefixed("module.")}, "left out n_averaged"),
    "beside numbers": ({**STATE, "epoch": 3}, "left out epoch"),
    "by another name": (prefixed("diffusion.net."), "prefix diffusion.net."),
    **{
        key: (
            {key: prefixed("module."), "step": 7, "optimizer": OPTIMIZER, "losses": [1.0, 2.0], "args": {"lr": 1.0}},
            f"weights under {key}; took the prefix module. off their names; left out step, optimizer, losses, args",
        )
        for key in ("model", "state_dict", "model_state_dict", "ema", "ema_state_dict", "ema_model", "params_ema")
    },
    "deep": ({"state": {"ema": {"model": STATE, "decay": 0.9}}}, "weights under state.ema.model"),
    "beside another network": ({"net": STATE, "critic": {"0.weight": torch.ones(1)}}, "left out critic"),
    "a list": ({"models": [STATE]}, "weights under models.0"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found_in_their_wrappers(tmp_path, name):
    content, words = WRAPPED[name]
    said = []
    assert same(load_weights(saved(tmp_path / "a.pt", content), note=said.append))
    assert (len(said), words in "".join(said)) == (bool(words), True), said


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors", "a"])
def test_the_content_decides_not_the_name(tmp_path, kind, name):
    assert same(load_weights(saved(tmp_path / name, prefixed("module."), kind)))


def test_one_of_several_is_chosen(tmp_path):
    path = saved(tmp_path / "a.pt", {"model": STATE, "ema": {"model": prefixed("module.", EMA)}, "step": 3})
    assert "choose one of model, ema.model with --weights_key" in refusal(path)
    assert "no 'em': choose one of model, ema.model" in refusal(path, key="em")
    assert same(load_weights(path, "ema.model"), EMA) and same(load_weights(path, "model"))
    flat = saved(tmp_path / "b.pt", {**prefixed("ema_model.", EMA), **prefixed("online_model."), "step": torch.ones(1)})
    assert "choose one of ema_model, online_model" in refusal(flat)
    assert same(load_weights(flat, "ema_model"), EMA)
    beside = saved(tmp_path / "c.pt", {**STATE, "ema": EMA})
    assert "choose one of ., ema" in refusal(beside)
    assert same(load_weights(beside, "."))
    assert "leave weights_key out" in refusal(saved(tmp_path / "d.pt", STATE), key="ema")


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(tmp_path, dtype, kind):
    said = []
    path = saved(tmp_path / "a.pt", {name: value.to(dtype) for name, value in STATE.items()}, kind)
    state = load_weights(path, note=said.append)
    assert same(state) and {value.dtype for value in state.values()} == {torch.float32}
    assert f"converted {str(dtype)[6:]} to float32" in said[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, value):
    broken = {**STATE, "input_blocks.0.0.bias": torch.tensor([0.5, value], dtype=torch.float64)}
    assert "1 of the 2 values of input_blocks.0.0.bias are not finite" in refusal(saved(tmp_path / "a.pt", broken))


def test_what_is_no_number_is_refused_by_name(tmp_path):
    whole = {**STATE, "input_blocks.0.0.bias": torch.tensor([1, 2], dtype=torch.int8)}
    assert "input_blocks.0.0.bias has int8 values" in refusal(saved(tmp_path / "a.pt", whole))
    empty = {**STATE, "input_blocks.0.0.bias": torch.ones(2, device="meta")}
    assert "input_blocks.0.0.bias has no values" in refusal(saved(tmp_path / "b.pt", empty))


def test_an_optimizer_s_averages_are_no_weights(tmp_path):
    by_name = {"state": {"out.weight": {"exp_avg": torch.ones(2)}}, "param_groups": []}
    for content in (by_name, {"optimizer": by_name, "step": 3}, OPTIMIZER, [1, 2], 3.0):
        assert "does not hold a network's state dict" in refusal(saved(tmp_path / "opt.pt", content))


# -- files that are no checkpoints ------------------------------------------------------------------------------------


def archive(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return content.getvalue()


HEADER = safetensors.torch.save(STATE)
NO_CHECKPOINTS = {
    "is empty": b"",
    "is JSON text": b'{"data":{"model": 1}}',
    "is JSON text, not": b"[1, 2]",
    "is a web page": b"\n<!DOCTYPE html>\n<html><title>Sign in</title>",
    "is a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n",
    "is a gzip archive": b"\x1f\x8b\x08\x00" + bytes(99),
    "is a tar archive": bytes(257) + b"ustar" + bytes(400),
    "is an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "is a pickle, but torch.save did not": pickle.dumps({"a": np.ones(3)}),
    "is a zip archive that torch.save did not write (it holds a.npy)": archive(**{"a.npy": "1"}),
    "is a TorchScript program": archive(**{"a/data.pkl": "", "a/constants.pkl": ""}),
    "is no checkpoint: it begins with b'not a checkp'": b"not a checkpoint",
    "it would be 1099511627776 bytes long": (1 << 40).to_bytes(8, "little") + HEADER[8:],
    "is damaged: its safetensors header cannot be read": HEADER[:12] + b"\0" + HEADER[13:],
    "bytes of tensors, and": HEADER + b"more",
}


@pytest.mark.parametrize("words", NO_CHECKPOINTS)
def test_what_a_file_is_instead(tmp_path, words):
    path = tmp_path / "model.pt"
    path.write_bytes(NO_CHECKPOINTS[words])
    message = refusal(path)
    assert words in message and "truncated" not in message


def test_a_folder_and_a_missing_file(tmp_path):
    assert "and no checkpoint is in it" in refusal(tmp_path)
    saved(tmp_path / "model.pt", STATE)
    saved(tmp_path / "ema_0.9_best.pt", STATE)
    assert f"name a file in it, as {tmp_path}/ema_0.9_best.pt" in refusal(tmp_path)
    assert "there is no checkpoint" in refusal(tmp_path / "none.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_called_truncated(tmp_path, kind):
    content = STATE | {"input_blocks.0.0.weight": torch.randn(60, 60)}
    path = tmp_path / "a.safetensors"
    whole = pathlib.Path(saved(path, content, kind)).read_bytes()
    for length in (1, 7, 30, 200, 600, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is truncated" in refusal(path), length


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_file_that_lost_bytes_within_is_damaged_not_truncated(tmp_path, kind):
    path = tmp_path / "a.pt"
    whole = pathlib.Path(saved(path, STATE, kind)).read_bytes()
    path.write_bytes(whole[:40] + b"\xff" * 60 + whole[100:])
    message = refusal(path)
    assert "damaged" in message and "truncated" not in message


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


OBJECTS = {
    "argparse.Namespace": lambda folder: {"model": STATE, "args": argparse.Namespace(lr=1.0)},
    "torch.nn.modules.conv.Conv2d": lambda folder: torch.nn.Conv2d(1, 1, 1),
    "numpy": lambda folder: {"model": STATE, "loss": np.float64(3)},
    f"{os.mkdir.__module__}.mkdir": lambda folder: {"model": STATE, "evil": Evil(folder / "was-here")},
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("name", OBJECTS)
def test_pickled_objects_are_named_and_not_run(tmp_path, name, kind):
    message = refusal(saved(tmp_path / "a.pt", OBJECTS[name](tmp_path), kind))
    assert f"pickles Python objects ({name}" in message and "truncated" not in message
    assert "python scripts/convert_checkpoint.py" in message
    assert not (tmp_path / "was-here").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_objects_are_named_in_every_protocol(tmp_path):
    """Later protocols name a class by two strings on the stack, which may come from the memo."""
    for protocol in (2, 3, 4, 5):
        torch.save(
            {"a": argparse.Namespace(), "b": [argparse.Namespace()]}, tmp_path / "a.pt", pickle_protocol=protocol
        )
        assert "(argparse.Namespace)" in refusal(tmp_path / "a.pt")


# -- other networks, other configs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_of_diffusers_is_recognized():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(
            block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
    with pytest.raises(CheckpointError, match=r"lacks is input_blocks\.0\.0\.weight.*look like a diffusers U-Net"):
        read_shapes(theirs.state_dict(), "unet.safetensors")


def test_other_networks_are_recognized():
    unconditional = STATE | {"middle_block.0.in_layers.0.weight": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"lacks is middle_block\.0\.in_norm.*guided-diffusion's U-Net"):
        read_shapes(unconditional, "64x64_diffusion.pt")
    with pytest.raises(CheckpointError, match=r"the first that it has is fc\.weight$"):
        read_shapes({"fc.weight": torch.ones(1)}, "a.pt")


def test_another_library_s_config_is_passed_over(tmp_path):
    path = tmp_path / "config.json"
    for content in (
        {"_class_name": "UNet2DModel", "sample_size": 32},
        {"architectures": ["Bert"], "model_type": "bert"},
    ):
        path.write_text(json.dumps(content))
        said = []
        assert read_config(str(tmp_path / "model.pt"), said.append) is None
        assert "another library" in said[0] and str(path) in said[0]
    path.write_text(json.dumps({"_class_name": "SDMPipeline", "model": {"num_classes": 4}, "diffusion": {}}))
    assert read_config(str(tmp_path / "model.pt"))["model"] == {"num_classes": 4}


def test_the_first_difference_is_named():
    with torch.device("meta"):
        network = create_model(MODEL, True)
    theirs = dict(network.state_dict())
    theirs["time_embed.2.weight"] = torch.ones(7, 7)
    theirs["out.0.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"2 shapes differ, the first is time_embed\.2\.weight: \[7, 7\]"):
        load_state_into(network, theirs, "a.pt")
