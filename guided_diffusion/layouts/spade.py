"""SPADE, and the object that knows a layout.

SPADE (Park et al., arXiv 1903.07291) is a group norm without parameters whose scale and shift are convolved, for each
pixel, from the layout. They depend on the layout and the resolution alone, not on the timestep: a `Layout` resizes the
map once per resolution and, when told to, keeps each norm's scale and shift for a whole sampling loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..nn import NORM_GROUPS, Conv2d, GroupNorm, in_precision_of

SPADE_HIDDEN_CHANNELS = 128


class Modulation(Protocol):
    """What the network asks of a layout: `passes` 2 stands for a conditional and a null pass in one batch."""

    passes: int

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Makes ready for the (height, width) of every norm, before the first one asks.

        What is recomputed in a backward pass may then only read: the compiler breaks its graph at a block that changes
        an object from outside, as by remembering a resized map.
        """

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, h, w], already normalized, scaled and shifted for each pixel by the layout."""


class Layout:
    """What SPADE reads of a layout: the map at each resolution, and each norm's scale and shift.

    `y` is [N, L, H, W]: the one-hot classes, followed by the instance edges where the network has that channel. With
    `keep` every (scale, shift) that is asked for is computed once and kept; without it (training) nothing is, so that
    memory stays flat. A `y` of batch 1 serves any batch.
    """

    passes = 1

    def __init__(self, y: torch.Tensor, keep: bool = False):
        self.y = y
        self.keep = keep
        self._resized: dict[tuple[int, ...], torch.Tensor] = {}
        self._modulations: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Resizes the map; where modulations are kept, nothing reads it any more."""
        if not self.keep:
            for size in sizes:
                self.resized(size)

    def resized(self, size: Sequence[int]) -> torch.Tensor:
        """The layout at (height, width) `size`, by nearest neighbour."""
        size = tuple(size)
        if size == tuple(self.y.shape[2:]):
            return self.y
        if size not in self._resized:
            self._resized[size] = F.interpolate(self.y, size=size, mode="nearest")
        return self._resized[size]

    def modulation(self, norm: SPADEGroupNorm, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 + scale, shift) of `norm` at `size`, each [N, C, h, w]."""
        if norm.index in self._modulations:
            return self._modulations[norm.index]
        modulation = norm.modulation(norm.mlp_shared(self.resized(size)))
        if self.keep:
            self._modulations[norm.index] = modulation
        return modulation

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, C, h, w], already normalized, scaled and shifted for each pixel by the layout (into `out`)."""
        scale, shift = self.modulation(norm, x.shape[2:])
        return torch.addcmul(shift, x, scale, out=out)

    @property
    def conditional(self) -> Layout:
        """This layout without the null pass: itself."""
        return self

    def forget_map(self) -> None:
        """Frees the one-hot maps once every modulation is kept."""
        self._resized.clear()
        self.y = self.y.new_empty((*self.y.shape[:-1], 0))  # a slice would keep all of it


class GuidedLayout:
    """A layout and the null layout side by side: one pass of the network yields both halves of guidance.

    The middle block and decoder see a batch of 2N, conditional first; the null layout has batch 1 and is shared.
    """

    passes = 2

    def __init__(self, conditional: Layout, null: Layout):
        self.conditional = conditional
        self.null = null

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.conditional.prepare(sizes)
        self.null.prepare(sizes)

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor) -> torch.Tensor:
        conditional, null = x.chunk(2)
        # The compiler of some PyTorch versions gives up at an `out` that is channels-last.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([self.conditional.modulate(norm, conditional), self.null.modulate(norm, null)])
        out = torch.empty_like(x)
        self.conditional.modulate(norm, conditional, out=out[: len(conditional)])
        self.null.modulate(norm, null, out=out[len(conditional) :])
        return out


class SPADEGroupNorm(nn.Module):
    """Group norm without parameters, modulated by the layout (Park et al., arXiv 1903.07291, equation 1)."""

    def __init__(self, channels: int, layout_channels: int, downsampling: int):
        super().__init__()
        self.channels = channels
        self.downsampling = downsampling  # of the feature map that this norm acts on; for the prediction of memory
        self.index = -1  # its place among the network's norms; the network sets it
        self.param_free_norm = GroupNorm(NORM_GROUPS, channels, affine=False)
        self.mlp_shared = nn.Sequential(Conv2d(layout_channels, SPADE_HIDDEN_CHANNELS, 3, padding=1), nn.ReLU())
        self.mlp_gamma = Conv2d(SPADE_HIDDEN_CHANNELS, channels, 3, padding=1)
        self.mlp_beta = Conv2d(SPADE_HIDDEN_CHANNELS, channels, 3, padding=1)

    def modulation_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [2C, 128, 3, 3] and bias [2C] of the one convolution that makes (1 + scale, shift)."""
        weight = torch.cat([self.mlp_gamma.weight, self.mlp_beta.weight])
        # The 1 of (1 + scale) rides on the bias. In float32, so that the sum is rounded only once.
        return weight, torch.cat([self.mlp_gamma.bias.float() + 1.0, self.mlp_beta.bias.float()])

    def modulation(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 + scale, shift), each [N, C, h, w], from the layout's hidden features; both by one convolution."""
        weight, bias = self.modulation_weights()
        return in_precision_of(F.conv2d, hidden, weight, bias, padding=1).chunk(2, dim=1)

    def forward(self, x: torch.Tensor, layout: Modulation) -> torch.Tensor:
        return layout.modulate(self, self.param_free_norm(x))
