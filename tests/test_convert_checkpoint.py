"""scripts/convert_checkpoint.py: a plain checkpoint of any file, without running what it pickles."""

import argparse
import dataclasses
import enum
import json
import os
import pathlib
import sys

import pytest
import torch
from data_helpers import REPOSITORY
from golden_helpers import load_formula_weights
from sampling_helpers import MODEL, save_checkpoint

from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.script_util import create_model
from guided_diffusion.settings import ConfigError
from guided_diffusion.weights.files import CheckpointError
from guided_diffusion.weights.reading import load_weights

sys.path.insert(0, str(REPOSITORY / "scripts"))
import convert_checkpoint as script

UNSEEN = {"num_classes": 4, "image_size": 16, "num_heads": 4}
RAN = []


@pytest.fixture(scope="module")
def network():
    model = create_model(MODEL, True)
    load_formula_weights(model)
    return model


@dataclasses.dataclass
class State:
    """As training programs save theirs: with objects of every kind."""

    net: object
    step: int
    place: pathlib.Path
    mode: enum.Enum

    def __setstate__(self, state):
        RAN.append("setstate")
        self.__dict__.update(state)


Mode = enum.Enum("Mode", "TRAIN")


class Hidden:
    """Whose pickle holds weights in a form that only its own code knows."""

    def __init__(self, model):
        self.model = model

    def __reduce__(self):
        return reveal, (list(self.model.state_dict().items()),)


def reveal(items):
    RAN.append("reveal")
    return dict(items)


CONTENTS = {
    "a namespace beside": lambda net: {"model": net.state_dict(), "args": argparse.Namespace(out=pathlib.Path("x"))},
    "a whole network": lambda net: net,
    "a wrapped network": lambda net: {"ema": torch.nn.DataParallel(net), "epoch": 3},
    "a state of training": lambda net: State(net, 3, pathlib.Path("x"), Mode.TRAIN),
    "plain": lambda net: {"state_dict": {f"module.{k}": v.half() for k, v in net.state_dict().items()}},
}


@pytest.mark.parametrize("name, kind", [*((name, True) for name in CONTENTS), ("a state of training", False)])
def test_weights_come_out_and_no_code_runs(network, tmp_path, name, kind, capsys):
    torch.save(CONTENTS[name](network), tmp_path / "in.pt", _use_new_zipfile_serialization=kind)
    RAN.clear()
    target = tmp_path / "out" / "model.safetensors"
    script.convert(str(tmp_path / "in.pt"), str(target), UNSEEN)
    assert RAN == []
    said = capsys.readouterr().out
    assert ("inert ones stand in" in said) == (name != "plain") and "unverified" in said
    pipeline = SDMPipeline.from_checkpoint(target)  # by the config beside it, without any setting
    assert pipeline.model_config == MODEL and pipeline.diffusion_config.learn_sigma
    exact = 0 if name != "plain" else 2**-10
    for key, value in network.state_dict().items():
        assert torch.allclose(pipeline.model.state_dict()[key], value, rtol=exact, atol=exact)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["converted"]["source"] == "in.pt"


def test_objects_that_hide_weights_are_run_with_trust_alone(network, tmp_path, capsys):
    torch.save({"net": Hidden(network)}, tmp_path / "in.pt")
    RAN.clear()
    places = (str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"))
    with pytest.raises(CheckpointError, match="--trust True runs that code, which may do anything"):
        script.convert(*places, UNSEEN)
    assert RAN == [] and os.listdir(tmp_path) == ["in.pt"]
    script.convert(*places, UNSEEN | {"trust": True})
    assert RAN == ["reveal"] and "send and delete your files" in capsys.readouterr().out
    assert load_weights(places[1]).keys() == network.state_dict().keys()


def test_a_run_s_own_checkpoint_keeps_its_config(tmp_path):
    source = save_checkpoint(tmp_path / "run", tmp_path, dataset_json={"grey": True})
    before = (tmp_path / "run" / "config.json").read_bytes()
    script.convert(source, str(tmp_path / "run" / "plain.safetensors"), {})
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    script.convert(source, str(tmp_path / "other" / "plain.safetensors"), {})
    written = json.loads((tmp_path / "other" / "config.json").read_text())
    assert written["dataset_json"] == {"grey": True} and written["model"] == dataclasses.asdict(MODEL)
    with pytest.raises(ConfigError, match=r"num_classes 9 contradicts .* num_classes 4"):
        script.convert(source, str(tmp_path / "other" / "plain.safetensors"), {"num_classes": 9})


def test_what_it_did_not_write_stays(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "in.pt")
    out = tmp_path / "out"
    out.mkdir()
    convert = lambda target, **flags: script.convert(str(tmp_path / "in.pt"), str(target), UNSEEN | flags)  # noqa: E731
    for target, words in (
        (out / "a.pt", "its name to end with"),
        (out, "its name to end with"),
        (tmp_path / "b.safetensors", "did not write it"),
    ):
        (tmp_path / "b.safetensors").write_bytes((tmp_path / "in.pt").read_bytes())
        with pytest.raises(CheckpointError, match=words):
            convert(target)
    (out / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match=r"config\.json is there, and describes something else"):
        convert(out / "a.safetensors")
    assert os.listdir(out) == ["config.json"]
    (out / "config.json").unlink()
    convert(out / "a.safetensors")
    convert(out / "b.safetensors")  # another of the same network
    convert(out / "a.safetensors", diffusion_steps=500)  # again: the flags of now count
    assert json.loads((out / "config.json").read_text())["diffusion"]["diffusion_steps"] == 500
    with pytest.raises(CheckpointError, match="describes something else"):
        convert(out / "b.safetensors")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_nothing_half_written(network, tmp_path, monkeypatch, failing):
    torch.save(network.state_dict(), tmp_path / "in.pt")
    calls = []
    real = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left"):
        script.convert(str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), UNSEEN)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_the_command(network, tmp_path, monkeypatch, capsys):
    torch.save({"model": network.state_dict(), "ema": network.state_dict()}, tmp_path / "in.ckpt")
    places = [str(tmp_path / "in.ckpt"), str(tmp_path / "out.safetensors")]
    flags = [word for name, value in UNSEEN.items() for word in (f"--{name}", str(value))]
    for words, message in (
        ([places[0]], "give IN and OUT first"),
        ([*places, *flags], "choose one of model, ema with --weights_key"),
        ([*places, *flags, "--weights_key", "ema"], None),
    ):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
        if message:
            with pytest.raises(SystemExit, match=message):
                script.main()
        else:
            script.main()
    assert "took the weights under ema; left out model" in capsys.readouterr().out
