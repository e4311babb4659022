"""What the plans of a training and of a sampling (`plan_training`, `plan_sampling`) have in common.

Settings, data, checkpoints and folders are checked as a start checks them; operations and memory are counted
(`footprint`). Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from ..dist_util import World
from ..hosts.memory import free_memory
from ..script_util import create_model
from ..settings import DataConfig, DiffusionConfig, ModelConfig, PlanConfig
from ..weights import store
from .footprint import Pretence, network_rows

Log = Callable[[str], None]

NOT_COUNTED = (
    "not counted: working memory inside kernels (convolutions, the attention backend), fragmentation and rounding of "
    "the allocator, the GPU's context, buffers of the collectives, loader processes, and what --compile changes. Leave "
    "a tenth free"
)
NO_TIME = "time: give --peak_tflops (the device's, in this precision) and --peak_share (0.4, say)"
OPERATIONS = "operations per image, in T (10^12; a multiplication and an addition are two)"


def tell_network(config: ModelConfig, diffusion: DiffusionConfig, size: Sequence[int], log: Log) -> None:
    """The network as a table: parameters in millions, operations of a forward pass over an image of (height, width)
    `size` in 10^12."""
    with torch.device("meta"):
        model = create_model(config, diffusion.learn_sigma)
    pretence = Pretence.of("meta")
    rows, operations = network_rows(pretence, pretence.network(model, training=False), size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rest = parameters - sum(row.parameters for row in rows), operations - sum(row.operations for row in rows)
    lines = [("network", "height x width", "width", "blocks", "attention", "M parameters", "T operations")]
    for row in rows:
        attention = f"{len(row.attention)} x {row.attention[0]}" if row.attention else "-"
        shape = (f"{row.size[0]}x{row.size[1]}", str(row.width), str(row.blocks), attention)
        lines.append((row.part, *shape, f"{row.parameters / 1e6:.3g}", f"{row.operations / 1e12:.3g}"))
    for name, count, work in (("the rest", *rest), ("all", parameters, operations)):
        lines.append((name, "", "", "", "", f"{count / 1e6:.4g}", f"{work / 1e12:.4g}"))
    tell_table(lines, log)


def tell_table(lines: Sequence[Sequence[str]], log: Log) -> None:
    """Columns, indented."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        log("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def picture_size(data: DataConfig, model: ModelConfig) -> tuple[int, int]:
    """(height, width) of pictures that are not at hand. Cityscapes' are kept whole, twice as wide as high."""
    return model.image_size, model.image_size * (2 if data.dataset_mode == "cityscapes" else 1)


def planned_device(plan: PlanConfig, world: World) -> str:
    """The type of the device that is planned for: "cpu" or "cuda"."""
    return {"": world.device.type, "gpu": "cuda"}.get(plan.plan_device, plan.plan_device)


def memory_limit(plan: PlanConfig, device_type: str, world: World, sharing: int) -> float | None:
    """Bytes that a rank may take, where `sharing` ranks share a device's memory; None where they are not known, as the
    device is not at hand."""
    if plan.memory_gib:
        return plan.memory_gib * 2**30
    return free_memory(world.device) / sharing if device_type == world.device.type else None


def device_words(device_type: str) -> str:
    return "a CPU" if device_type == "cpu" else "a GPU"


def existing(folder: str) -> str:
    """The folder, or the nearest one above it that exists."""
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def check_folder(folder: str, flag: str, words: str) -> None:
    """:raises CheckpointError: a run could not write there, or another one does."""
    place = existing(folder)
    problem = "no permission to write" if os.path.isdir(place) else "it is not a folder"
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise store.CheckpointError(f"cannot write to the {words} {folder} ({place}: {problem}): give another --{flag}")
    if os.path.isdir(folder):
        store.lock(folder, flag, look=True)


def gib(size: float) -> str:
    """Bytes in GiB, to two places, or more of a small number."""
    return f"{size / 2**30:.2f}" if size >= 2**29 else f"{size / 2**30:.3g}"


def duration(seconds: float) -> str:
    """A time as a reader takes it in: 0.21 s, 5.3 min, 4.1 h, 12 days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
