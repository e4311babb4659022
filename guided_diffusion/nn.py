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
from torch.autograd.function import once_differentiable

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
    """Group normalization of [N, C, *] with mean, deviation and all sums in float32; the memory layout stays.

    On a CPU PyTorch's own kernel does that. Its CUDA kernel copies channels-last input to the default layout and rounds
    mean and deviation to the input's precision, as the original (guided-diffusion's GroupNorm32) does not; elsewhere
    than on a CPU `group_norm` takes its place.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        # The CPU kernel's backward pass over channels-last bfloat16 takes three times as long as the one over float32.
        slow = x.dtype == torch.bfloat16 and torch.is_grad_enabled()
        h = x.float() if slow else x
        weight = None if self.weight is None else self.weight.to(h.dtype)
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return F.group_norm(h, self.num_groups, weight, bias, self.eps).to(x.dtype)


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = 1e-5
) -> torch.Tensor:
    """Group normalization (Wu and He, arXiv 1803.08494) of x [N, C, spatial...]; the memory layout stays.

    As `F.group_norm`, but for 16-bit input mean and deviation are neither computed in nor rounded to 16 bits; only the
    result is. On a GPU the forward pass makes no feature map but its result. weight and bias [C], both or neither, may
    have another precision than x.

    :raises ValueError: x has no spatial dimension.
    """
    if x.dim() < 3:
        raise ValueError(f"group_norm takes [N, C, spatial...]; got {list(x.shape)}")
    if not torch.compiler.is_compiling():
        return _GroupNorm.apply(x, groups, weight, bias, eps)
    # The compiler fuses the conversions into the kernels, and knows the derivative.
    wide = x.float()
    scale, shift = _scale_and_shift(*_statistics(wide, groups, eps), weight, bias, x)
    return torch.addcmul(shift, wide, scale).to(x.dtype)


class _GroupNorm(torch.autograd.Function):
    """`group_norm` one operation at a time, with few feature maps in memory.

    An operation on a GPU reads 16-bit tensors among float32 ones, and writes 16 bits into `out`, without converting any
    of them in memory; its arithmetic is in float32 where one of its inputs is.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        mean, rstd = _statistics(x, groups, eps)
        scale, shift = _scale_and_shift(mean, rstd, weight, bias, x)
        ctx.save_for_backward(x, weight, mean, rstd)
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors  # mean, rstd: [N, groups, 1]
        spatial = tuple(range(2, x.dim()))
        zero = mean.new_zeros((1,) * x.dim())  # has the products computed and kept in float32
        products = torch.addcmul(zero, grad, x)
        to_shift = grad.sum(spatial, dtype=torch.float32).view(*mean.shape[:2], -1)  # [N, groups, C / groups]
        to_scale = (products.sum(spatial).view_as(to_shift) - mean * to_shift) * rstd  # of the normalized x
        weights = torch.ones_like(mean[:1]) if weight is None else weight.float().view(1, mean.shape[1], -1)
        count = x.numel() // mean.numel()
        along_one = (weights * to_shift).sum(2, keepdim=True) / count
        along_x = (weights * to_scale).sum(2, keepdim=True) / count * rstd
        # d/dx = rstd * (weight * grad - along_one - (x - mean) * along_x)
        torch.addcmul(
            _per_channel(rstd * (mean * along_x - along_one), x), x, _per_channel(-rstd * along_x, x), out=products
        )
        to_x = torch.addcmul(products, grad, _per_channel(rstd * weights, x), out=torch.empty_like(x))
        if weight is None:
            return to_x, None, None, None, None
        return to_x, None, to_scale.sum(0).flatten().to(weight), to_shift.sum(0).flatten().to(weight), None


def _statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / deviation of each group, float32 [N, groups, 1].

    First of each channel, along whichever axes are strided: for a GPU's reductions, that is channels-last at its best.
    """
    spatial = tuple(range(2, x.dim()))
    if x.dtype == torch.float32:
        variances, means = torch.var_mean(x, spatial, correction=0)
        spread, mean = torch.var_mean(means.view(len(x), groups, -1), 2, correction=0, keepdim=True)
        variance = variances.view(len(x), groups, -1).mean(2, keepdim=True) + spread
    else:
        # E[x^2] - E[x]^2, which needs no centred copy of x. Up to a mean of a hundred deviations it loses less than a
        # tenth of what rounding x to 16 bits has lost already.
        mean = x.mean(spatial, dtype=torch.float32).view(len(x), groups, -1).mean(2, keepdim=True)
        norms = torch.linalg.vector_norm(x, 2, spatial, dtype=torch.float32)
        squares = norms.view(len(x), groups, -1).square().sum(2, keepdim=True)
        variance = torch.addcmul(squares / (x.numel() // mean.numel()), mean, mean, value=-1).clamp(min=0)
    return mean, (variance + eps).rsqrt()


def _scale_and_shift(
    mean: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What x is multiplied with and what is then added: float32, each with an entry for every sample and channel."""
    if weight is None:
        return _per_channel(rstd, x), _per_channel(-mean * rstd, x)
    scale = rstd * weight.float().view(1, mean.shape[1], -1)
    return _per_channel(scale, x), _per_channel(bias.float().view(1, mean.shape[1], -1) - mean * scale, x)


def _per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, groups, 1 or C / groups] -> [N, C, 1...], with as many dimensions as x."""
    values = values.expand(-1, -1, x.shape[1] // values.shape[1])
    return values.reshape(len(x), x.shape[1], *(1,) * (x.dim() - 2))


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
