"""Building blocks of the network: layers that compute in their input's precision, embeddings, EMA.

Parameters stay in the precision in which they are stored (float32 while training: they are the master weights); every
layer casts them to the precision of what flows through it. At inference the network is converted once
(`UNetModel.convert_to`), and the casts become no-ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_GROUPS = 32


def in_precision_of(
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """`function(x, weight, bias)`, a convolution or linear map, with weight and bias in the precision of x.

    CPUs have no fast float16 kernels (convolutions run twenty times slower than in float32): there the float16 numbers
    are multiplied in float32 and only the result is rounded.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return function(x.float(), weight.float(), None if bias is None else bias.float(), **options).half()
    return function(x, weight, bias, **options)


class Conv2d(nn.Conv2d):
    """A convolution over [N, C, H, W] in the precision of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_precision_of(F.conv2d, x, self.weight, self.bias, stride=self.stride, padding=self.padding)


class Linear(nn.Linear):
    """A linear map over [..., C] in the precision of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_precision_of(F.linear, x, self.weight, self.bias)


class PointwiseConv1d(nn.Conv1d):
    """A 1x1 convolution kept as `Conv1d` weights [out, in, 1] but applied as a matrix product to [N, T, C].

    The shape of the weights is that of published checkpoints; tokens before channels is what channels-last memory and
    the fused attention kernels want.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return in_precision_of(F.linear, tokens, self.weight.squeeze(-1), self.bias)


class GroupNorm(nn.GroupNorm):
    """Group normalization whose sums are taken in float32 whatever the precision of its input [N, C, *].

    PyTorch's kernels accumulate 16-bit inputs in float32 themselves; the result, and on a GPU mean and deviation, are
    rounded. On a CPU their backward pass over channels-last bfloat16 takes three times as long as the one over float32:
    there we convert. Channels-last memory stays so.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
        h = x.float() if slow else x
        weight = None if self.weight is None else self.weight.to(h.dtype)
        bias = None if self.bias is None else self.bias.to(h.dtype)
        h = F.group_norm(h, self.num_groups, weight, bias, self.eps).to(x.dtype)
        # A GPU's kernels of some PyTorch versions answer in the default layout, which what follows would read askew.
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            h = h.contiguous(memory_format=torch.channels_last)
        return h


def normalization(channels: int) -> GroupNorm:
    """The affine group norm of the encoder, the attention and the output: 32 groups."""
    return GroupNorm(NORM_GROUPS, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Sets every parameter of `module` to zero and returns it: residual branches begin as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding [N, dim] in float32 of timesteps [N] (possibly fractional).

    Cosines first, then sines, of geometrically falling frequencies (Vaswani et al., arXiv 1706.03762, section 3.5).
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = timesteps[:, None].float() * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Mean over everything but the batch: [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


@torch.no_grad()
def update_ema(
    ema: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], rate: float, found_inf: torch.Tensor | None = None
) -> None:
    """Moves every average towards its parameter, in place: ema <- rate * ema + (1 - rate) * parameter.

    :param found_inf: float32 scalar on the device, as the fused optimizers take it: where it is 1, the averages stay as
        they are. Nothing is read from the device for it.
    """
    if found_inf is None:
        torch._foreach_lerp_(list(ema), list(parameters), 1.0 - rate)
    elif rate > 0.5:
        # ema - (1 - rate) * (ema - parameter) is a step of gradient ascent, the parameter being the gradient, with
        # weight decay 1: one kernel for all tensors that can skip. It rounds as lerp does for weights below 1/2.
        torch._fused_sgd_(
            list(ema), list(parameters), [], weight_decay=1.0, momentum=0.0, lr=1.0 - rate, dampening=0.0,
            nesterov=False, maximize=True, is_first_step=False, found_inf=found_inf,
        )  # fmt: skip
    else:
        weight = (1.0 - found_inf) * (1.0 - rate)
        torch._foreach_lerp_(list(ema), list(parameters), [weight] * len(ema))
