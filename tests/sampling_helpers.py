"""A tiny network with weights by formula, saved as a training run saves it, and data that fits it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from golden_helpers import load_formula_weights

from guided_diffusion.script_util import create_model
from guided_diffusion.settings import DataConfig, DiffusionConfig, ModelConfig
from guided_diffusion.weights import store

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    image_size=16,
    num_classes=4,
    num_channels=32,
    num_res_blocks=1,
    attention_resolutions="8",
    channel_mult="1,2",
    resblock_updown=True,
    no_instance=True,
)
DIFFUSION = DiffusionConfig(learn_sigma=True)
SETTINGS = {**dataclasses.asdict(MODEL), **dataclasses.asdict(DIFFUSION)}


def save_checkpoint(folder: pathlib.Path, data_dir: pathlib.Path, model: ModelConfig = MODEL, **recorded) -> str:
    """Writes ema_0.9_best.pt and config.json (with what else is `recorded`); returns the former's path."""
    folder.mkdir(parents=True, exist_ok=True)
    network = create_model(model, DIFFUSION.learn_sigma)
    load_formula_weights(network)
    path = folder / "ema_0.9_best.pt"
    torch.save(network.state_dict(), path)
    data = DataConfig(data_dir=str(data_dir), dataset_mode="custom", num_workers=0)
    record = {"model": model, "diffusion": DIFFUSION, "data": data}
    record = {key: dataclasses.asdict(value) for key, value in record.items()}
    store.write_json(str(folder / "config.json"), record | recorded)
    return str(path)


def run(script: str, *flags: str, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """A script in a process of its own (under `mpiexec` where `ranks` are given); output is kept together."""
    launcher = ["mpiexec", "-n", str(ranks)] if ranks else []
    return subprocess.run(
        [*launcher, sys.executable, str(REPOSITORY / script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def run_here(script: str, *flags: str) -> SimpleNamespace:
    """The same in this process, without the seconds that a start takes: `returncode`, and the output in `stdout`.

    A sentence that the script ends with is the last of its output. What is no such ending fails the test by itself.
    Locks of a folder are no use here: they are between processes.
    """
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(sys, "argv", [script, *flags])
        try:
            code = importlib.import_module(pathlib.Path(script).stem).main()
        except SystemExit as end:
            code = end.code
    said = f"{code}\n" if isinstance(code, str) else ""
    return SimpleNamespace(returncode=1 if said else code or 0, stdout=output.getvalue() + said)
