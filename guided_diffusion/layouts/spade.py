"""SPADE, and the object that knows a layout.

SPADE (Park et al., arXiv 1903.07291) is a group norm without parameters whose scale and shift are convolved, for each
pixel, from the layout. They depend on the layout and the resolution alone, not on the timestep: a `Layout` resizes the
map once per resolution and, when told to, keeps each norm's scale and shift for a whole sampling loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..nn import NORM_GROUPS, Conv2d, GroupNorm, in_precision_of

SPADE_HIDDEN_CHANNELS = 128
TENSOR_CORE_CHANNELS = 8  # a GPU's 16-bit convolutions are fast where both channel counts are multiples of it


class Modulation(Protocol):
    """An encoded layout: all that the network asks of one."""

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Makes ready for the (height, width) of every norm, before the first one asks.

        What is recomputed in a backward pass may then only read: the compiler breaks its graph at a block that changes
        an object from outside, as by remembering a resized map.
        """

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, C, h, w], already normalized, scaled and shifted for each pixel by the layout; written into `out`
        where that is given (in inference only)."""


def wants_padding(y: torch.Tensor) -> bool:
    """Whether convolutions over y [N, L, H, W] are faster with L a multiple of 8: on a GPU in 16 bits. (On a CPU, in
    bfloat16, 152 channels take as long as 151, and padding them comes on top.)"""
    return y.device.type == "cuda" and y.dtype in (torch.float16, torch.bfloat16)


def pad_channels(y: torch.Tensor) -> torch.Tensor:
    """y [N, L, H, W] with channels of zeros added where that pays; the memory layout stays."""
    missing = -y.shape[1] % TENSOR_CORE_CHANNELS
    return F.pad(y, (0, 0, 0, 0, 0, missing)) if missing and wants_padding(y) else y


class Layout:
    """What SPADE reads of a layout: the map at each resolution, and each norm's scale and shift.

    `y` is [N, L, H, W]: the one-hot classes, followed by the instance edges where the network has that channel. What
    `keep` has computed is read from then on; without it (training) nothing is kept, so that memory stays flat. A `y`
    of batch 1 serves any batch. On a GPU in 16 bits, L grows by channels of zeros to a multiple of 8.
    """

    def __init__(self, y: torch.Tensor):
        self.y = pad_channels(y)
        self._resized: dict[tuple[int, ...], torch.Tensor] = {}
        self._modulations: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Resizes the map; where modulations are kept, nothing reads it any more."""
        if not self._modulations:
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
        return norm.modulation(norm.hidden(self.resized(size)))

    def keep(self, norms: Iterable[SPADEGroupNorm], buffers: Layout | None = None) -> Layout:
        """Computes the scale and shift of all `norms`, to be read from now on, and frees the maps. Returns itself.

        What is kept is dense and channels-last, as the feature maps are. `buffers`: a layout of the same shape that is
        no longer needed; its memory is used again, at the same addresses.
        """
        height, width = self.y.shape[2:]
        for norm in norms:
            modulation = self.modulation(norm, (height // norm.downsampling, width // norm.downsampling))
            if buffers is None:
                kept = tuple(part.contiguous(memory_format=torch.channels_last) for part in modulation)
            else:
                kept = buffers._modulations[norm.index]
                for old, new in zip(kept, modulation, strict=True):
                    old.copy_(new)
            self._modulations[norm.index] = kept
        self._resized.clear()
        self.y = self.y.new_empty((*self.y.shape[:-1], 0))  # a slice would keep all of it
        return self

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, C, h, w], already normalized, scaled and shifted for each pixel by the layout (into `out`)."""
        scale, shift = self.modulation(norm, x.shape[2:])
        return torch.addcmul(shift, x, scale, out=out)


class LayoutPair:
    """Two layouts, `first` [N] and `second` [N or 1], for a batch of 2N: both predictions of guidance in one pass."""

    def __init__(self, first: Modulation, second: Modulation):
        self.first, self.second = first, second

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.first.prepare(sizes)
        self.second.prepare(sizes)

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [2N, C, h, w], already normalized; each half is scaled and shifted by its own layout."""
        first, second = x.chunk(2)
        # The compiler of some PyTorch versions gives up at an `out` that is channels-last.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([self.first.modulate(norm, first), self.second.modulate(norm, second)])
        out = torch.empty_like(x) if out is None else out
        self.first.modulate(norm, first, out=out[: len(first)])
        self.second.modulate(norm, second, out=out[len(first) :])
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

    def hidden(self, y: torch.Tensor) -> torch.Tensor:
        """The hidden features [N, 128, h, w] of a map, which may have channels of zeros beyond the layout's."""
        convolution, activation = self.mlp_shared
        more = y.shape[1] - convolution.in_channels
        if not more:
            return activation(convolution(y))
        weight = F.pad(convolution.weight, (0, 0, 0, 0, 0, more))
        return activation(in_precision_of(F.conv2d, y, weight, convolution.bias, padding=1))

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
