"""Group norms to compare with one another, each of which any `GroupNorm` of a network can be turned into."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from guided_diffusion.nn import GroupNorm, group_norm


class TorchNorm(GroupNorm):
    """PyTorch's kernel, and back to channels-last where it answers in the default layout, as on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        h = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            h = h.contiguous(memory_format=torch.channels_last)
        return h


class FloatSums(GroupNorm):
    """`group_norm` on any device; the network itself calls it everywhere but on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


NORMS = {"our group norm": FloatSums, "PyTorch's group norm": TorchNorm}


def rounding_norm(dtype: torch.dtype) -> type[GroupNorm]:
    """A norm that rounds mean and 1 / deviation to `dtype`, as PyTorch's CUDA kernel does to its input's. All else is
    in float32, but for the result, which has the input's precision."""

    class RoundingNorm(GroupNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            groups = x.float().unflatten(1, (self.num_groups, -1)).flatten(2)  # [N, groups, C / groups * pixels]
            variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
            mean, rstd = (value.to(dtype).float() for value in (mean, (variance + self.eps).rsqrt()))
            h = ((groups - mean) * rstd).view(x.shape)
            if self.affine:
                channels = (1, -1) + (1,) * (x.dim() - 2)
                h = h * self.weight.float().view(channels) + self.bias.float().view(channels)
            return torch.empty_like(x).copy_(h)

    return RoundingNorm


def use_norm(model: torch.nn.Module, norm: type[GroupNorm]) -> None:
    """Turns every group norm of the network into that one, in place; the weights stay."""
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.__class__ = norm
