"""Tiny trainings, inside the test's process and as real runs of image_train.py."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from data_helpers import write_custom

from guided_diffusion.dist_util import World
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.logger import Logger
from guided_diffusion.objectives.denoising import Denoising
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.settings import DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from guided_diffusion.train_util import TrainLoop, prepare_training

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 4
# The smallest network with every kind of layer: the norms need a multiple of 32 channels.
MODEL = dict(
    image_size=16,
    num_classes=CLASSES,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions="8",
    num_head_channels=32,
    no_instance=True,
)
DIFFUSION = dict(learn_sigma=True, diffusion_steps=50)
TRAINING = dict(
    batch_size=4, lr=1e-3, ema_rate="0.9,0.99", drop_rate=0.3, val_images=2, log_interval=2, save_interval=1000
)


def make_data(folder: Path) -> Path:
    """Ten training and two validation scenes of blocks, 24 x 20: an epoch ends in the midst of a batch of 4."""
    return write_custom(folder, {"train": 10, "val": 2}, size=(24, 20), classes=CLASSES)


def make_loop(
    data: Path, logdir: Path, *, validation=True, objective=None, world=None, model=None, diffusion=None, **training
) -> TrainLoop:
    """A training loop in this process, single rank."""
    model_config = ModelConfig(**MODEL | (model or {}))
    diffusion_config = DiffusionConfig(**DIFFUSION | (diffusion or {}))
    config = TrainConfig(**TRAINING | training)
    config.check()
    common = dict(
        data_dir=str(data), dataset_mode="custom", image_size=model_config.image_size, num_classes=CLASSES,
        use_instances=False, skip_bad=config.skip_bad,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    return prepare_training(
        model=create_model(model_config, diffusion_config.learn_sigma),
        objective=objective or Denoising(create_gaussian_diffusion(diffusion_config)),
        diffusion_config=diffusion_config,
        dataset=open_dataset(split="train", seed=config.seed, **common),
        validation=open_dataset(split="val", **common) if validation else None,
        config=config,
        num_workers=0,
        world=world or World(),
        logger=Logger(str(logdir)),
        logdir=str(logdir),
        record={
            "data": dataclasses.asdict(DataConfig(data_dir=str(data), dataset_mode="custom")),
            "training": dataclasses.asdict(config),
            "model": dataclasses.asdict(model_config),
            "diffusion": dataclasses.asdict(diffusion_config),
        },
    )


def flags(data: Path, logdir: Path, **settings) -> list[str]:
    """The command line of the same training."""
    settings = {
        **MODEL, **DIFFUSION, **TRAINING, "num_workers": 0, "dataset_mode": "custom",
        "data_dir": data, "logdir": logdir, **settings,
    }  # fmt: skip
    return [
        str(ROOT / "image_train.py"),
        *(part for key, value in settings.items() for part in (f"--{key}", str(value))),
    ]


def environment(**more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not re.match(r"(PMI|OMPI|SLURM|RANK|WORLD_SIZE)", name)
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments: list[str], ranks: int = 1, log: Path | None = None) -> list[subprocess.Popen]:
    """Starts the ranks as plain processes with torchrun's variables, so that nothing but they themselves ends them.

    Each rank's output goes to `log`.RANK (or nowhere).
    """
    port, processes = str(free_port()), []
    for rank in range(ranks):
        variables = {}
        if ranks > 1:
            variables = dict(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
            variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        output = subprocess.DEVNULL if log is None else open(f"{log}.{rank}", "w")  # noqa: SIM115
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments], env=environment(**variables), stdout=output, stderr=subprocess.STDOUT
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[int]:
    """Waits for all; their exit statuses. Those that do not end in time are killed, and count as -9."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.returncode for process in processes]


def train(arguments: list[str], ranks: int = 1, log: Path | None = None) -> list[int]:
    return finish(launch(arguments, ranks, log))


def state_of(logdir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint set by name: weights, EMAs, the optimizer's averages."""
    tensors = {}
    for name in (f"model{step:06d}", f"ema_0.9_{step:06d}", f"ema_0.99_{step:06d}"):
        state = torch.load(logdir / f"{name}.pt", weights_only=True)
        tensors |= {f"{name}/{key}": value for key, value in state.items()}
    for index, values in torch.load(logdir / f"opt{step:06d}.pt", weights_only=True)["state"].items():
        tensors |= {f"opt/{index}/{key}": value for key, value in values.items()}
    return tensors


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names whose tensors are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
