"""What group norms cost where mean and deviation are rounded to 16 bits and feature maps copied; what padding gains.

    python benchmarks/numerics.py OUTPUT/quickstart     after scripts/quickstart.sh; minutes on one CPU core

PyTorch's CUDA kernel rounds both to its input's precision; here that is emulated on the CPU (`norms.rounding_norm`), on
the quickstart's trained network, and compared with `nn.group_norm` and with float32: the network's output at several
timesteps, and images of its default sampling. Then the feature maps that are copied from channels-last to the default
layout and back, counted for the published ADE20K network without computing anything. Last, times on this CPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from norms import NORMS, FloatSums, rounding_norm, use_norm
from sampling import COMMON, SIZES

from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.layouts.encode import to_network
from guided_diffusion.layouts.spade import SPADEGroupNorm
from guided_diffusion.nn import GroupNorm
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.script_util import create_model
from guided_diffusion.settings import ModelConfig, Sampling

TIMESTEPS = (50, 250, 500, 750, 950)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def errors(run: Path, images: int) -> list[str]:
    """Rows of a table: the error of each precision and norm against float32."""
    checkpoint = next((run / "finetune").glob("ema_*_best.pt"))

    def load(precision: str, norm: type[GroupNorm] | None) -> SDMPipeline:
        pipeline = SDMPipeline.from_checkpoint(checkpoint, precision=precision, device="cpu")
        if norm is not None:
            use_norm(pipeline.model, norm)
        return pipeline

    exact = load("fp32", None)
    config = exact.model_config
    dataset = open_dataset(
        data_dir=str(run / "data"), dataset_mode="custom", split="val", image_size=config.image_size,
        num_classes=config.num_classes, use_instances=False, training=False,
    )  # fmt: skip
    samples = [dataset[i] for i in range(images)]
    batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in ("image", "label")}
    batch["instance"] = None
    x_start, y = to_network(batch, torch.device("cpu"), config.num_classes, torch.float32)
    diffusion = exact.diffusion("", 0)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0))

    def outputs(pipeline: SDMPipeline) -> torch.Tensor:
        with torch.inference_mode():
            steps = [torch.full((images,), t) for t in TIMESTEPS]
            return torch.stack([pipeline.model(diffusion.q_sample(x_start, t, noise), t, y=y)[:, :3] for t in steps])

    def pictures(pipeline: SDMPipeline) -> np.ndarray:
        return pipeline.generate(batch["label"], None, seeds=range(images), sampling=Sampling()).astype(float)

    true_output, true_pictures = outputs(exact), pictures(exact)
    rows = [
        "| all else in | mean and deviation | error of the output | of the image, levels of 255 |",
        "|---|---|---|---|",
    ]
    kinds = [("fp32", name, rounding_norm(dtype)) for name, dtype in DTYPES.items()]
    for name, dtype in DTYPES.items():
        kinds += [(name, name, rounding_norm(dtype)), (name, "fp32", FloatSums)]
    for precision, statistic, norm in kinds:
        pipeline = load(precision, norm)
        error = rms(outputs(pipeline) - true_output) / rms(true_output)
        levels = np.abs(pictures(pipeline) - true_pictures).mean()
        rows.append(f"| {precision} | {statistic} | {error:.2e} | {levels:.3f} |")
        print(rows[-1], flush=True)
    return rows


def norm_inputs(guided: bool) -> list[tuple[torch.Size, int]]:
    """Shape and bytes of the input of every group norm of the published network in float16, batch 1: in a forward pass
    of training, or in a guided step with modulations kept. On PyTorch's device without numbers."""
    with torch.device("meta"):
        model = create_model(ModelConfig(**COMMON, **SIZES["published"]), learn_sigma=True).convert_to(torch.float16)
        x, t = torch.empty(1, 3, 256, 256), torch.zeros(1)
        y = torch.empty(1, model.layout_channels, 256, 256)
    seen = []
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].shape, inputs[0].nbytes)))
    with torch.inference_mode():
        if guided:
            model.denoise(x, t, model.encode_layout(y, keep=True), model.encode_layout(y, keep=True))
        else:
            model(x, t, y=y)
    return seen


def median_seconds(actions: list[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Of each action, all measured in rounds after one that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    with torch.inference_mode():
        for _, (action, taken) in itertools.product(range(rounds + 1), zip(actions, seconds, strict=True)):
            since = time.perf_counter()
            action()
            taken.append(time.perf_counter() - since)
    return [statistics.median(taken[1:]) for taken in seconds]


def norm_ratio(dtype: torch.dtype) -> float:
    """How many times as long our norm takes as PyTorch's on this CPU, of [2, 256, 64, 64], channels-last, without
    gradients."""
    x = torch.randn(2, 256, 64, 64).to(dtype, memory_format=torch.channels_last)
    ours, of_torch = median_seconds([functools.partial(norm(32, 256).to(dtype), x) for norm in NORMS.values()])
    return ours / of_torch


def padding_ratio(dtype: torch.dtype, side: int) -> float:
    """How many times as long SPADE's first convolution over 151 channels takes on this CPU as over 152, a map of zeros
    more and weights that are padded each time."""
    y = torch.randn(1, 151, side, side).to(dtype, memory_format=torch.channels_last)
    norm = SPADEGroupNorm(256, 151, 1).to(dtype)
    padded = F.pad(y, (0, 0, 0, 0, 0, 1))
    plain, more = median_seconds([functools.partial(norm.hidden, layout) for layout in (y, padded)])
    return plain / more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the quickstart's folder")
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()
    table = errors(arguments.run, arguments.images)
    print(f"\n{arguments.images} scenes, timesteps {TIMESTEPS}\n", *table, "", sep="\n")
    for guided, title in ((True, "guided step"), (False, "forward pass of training")):
        inputs = norm_inputs(guided)
        size = sum(count for _, count in inputs)
        print(f"{title}: {len(inputs)} norms of {size / 1e9:.2f} GB; each is copied twice by PyTorch's kernel")
    for name, dtype in {"fp32": torch.float32, **DTYPES}.items():
        print(f"on this CPU, in {name}, our group norm takes {norm_ratio(dtype):.1f} times as long as PyTorch's")
    for side in (128, 64, 16):
        ratio = padding_ratio(torch.bfloat16, side)
        print(f"on this CPU, in bf16, {side}x{side}: 152 layout channels are {ratio:.2f} times as fast as 151")


if __name__ == "__main__":
    main()
