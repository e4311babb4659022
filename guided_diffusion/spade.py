"""SPADE, and the object that knows a layout.

SPADE (Park et al., arXiv 1903.07291) is a group norm without parameters whose scale and shift are convolved, for each
pixel, from the layout. They depend on the layout and the resolution alone, not on the timestep: a `Layout` resizes the
map once per resolution and, when told to, keeps each norm's scale and shift for a whole sampling loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .nn import NORM_GROUPS, Conv2d, GroupNorm, in_precision_of

SPADE_HIDDEN_CHANNELS = 128


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
        modulation = norm.modulation(self.hidden(norm, size))
        if self.keep:
            self._modulations[norm.index] = modulation
        return modulation

    def hidden(self, norm: SPADEGroupNorm, size: Sequence[int]) -> torch.Tensor:
        """The hidden features [N, 128, h, w] of `norm`, from which it convolves scale and shift."""
        return norm.mlp_shared(self.resized(size))

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


class _LookUp(torch.autograd.Function):
    """Sums of table rows; the table's gradient is a look-up of its own, from a list that every norm shares.

    `rows` [E] lists, pixel by pixel, the rows of `table` [R, C] that it sums, a pixel's list beginning at `firsts` [P].
    `pixels` [E] lists, row by row, the pixels that sum it, a row's list beginning at `starts` [R].
    """

    @staticmethod
    def forward(
        ctx, table: torch.Tensor, rows: torch.Tensor, firsts: torch.Tensor, pixels: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(pixels, starts)
        return F.embedding_bag(rows, table, firsts, mode="sum")

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pixels, starts = ctx.saved_tensors
        return F.embedding_bag(pixels, grad.contiguous(), starts, mode="sum"), None, None, None, None


class LabelLayout(Layout):
    """A layout as integers: the convolution over a one-hot map is a sum of nine weights (and nine more where there are
    edges), which are looked up.

    The same numbers as `Layout` of the one-hot map, to rounding, without the products with its zeros: on a CPU, which
    has no matrix units to make those cheap, a third of a training step. For one pass (nothing is kept).

    :param label: class ids [N, 1, H, W]. :param edge: bool [N, 1, H, W], where the network reads instance edges.
    :param drop: bool [N]; these samples have the null layout. :param dtype: what the network computes in.
    """

    def __init__(
        self,
        label: torch.Tensor,
        edge: torch.Tensor | None,
        num_classes: int,
        drop: torch.Tensor,
        dtype: torch.dtype,
    ):
        drop = drop.view(-1, 1, 1, 1)
        # The layout channels that are 1 at a pixel: its class and, on an edge, the last one; -1: none.
        ones = [label.long().masked_fill(drop, -1)]
        if edge is not None:
            ones.append(torch.where(edge & ~drop, num_classes, -1))
        super().__init__(torch.cat(ones, dim=1))
        self.channels, self.dtype = num_classes + len(ones) - 1, dtype

    def resized(self, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """What `_LookUp` takes after the table, at (height, width) `size`. Of L layout channels, the table's first
        L rows are for the first neighbour among the 3x3 around a pixel, and so on."""
        size = tuple(size)
        if size not in self._resized:
            ones = F.interpolate(self.y.double(), size=size, mode="nearest").long()
            around = F.pad(ones, (1, 1, 1, 1), value=-1).unfold(2, 3, 1).unfold(3, 3, 1)  # [N, 1 or 2, h, w, 3, 3]
            around = around.permute(0, 2, 3, 1, 4, 5).reshape(-1, ones.shape[1], 9)
            there = around >= 0
            rows = (around + self.channels * torch.arange(9, device=around.device))[there]
            of_pixel = there.flatten(1).sum(1)
            of_row = torch.bincount(rows, minlength=9 * self.channels)
            pixels = torch.arange(len(of_pixel), device=rows.device).repeat_interleave(of_pixel)
            pixels = pixels[rows.argsort(stable=True)]
            self._resized[size] = rows, of_pixel.cumsum(0) - of_pixel, pixels, of_row.cumsum(0) - of_row
        return self._resized[size]

    def hidden(self, norm: SPADEGroupNorm, size: Sequence[int]) -> torch.Tensor:
        convolution = norm.mlp_shared[0]
        table = convolution.weight.permute(2, 3, 1, 0).reshape(9 * self.channels, -1)
        looked_up = _LookUp.apply(table, *self.resized(size))
        hidden = norm.mlp_shared[1](looked_up + convolution.bias).to(self.dtype)
        return hidden.view(-1, *size, hidden.shape[1]).permute(0, 3, 1, 2)  # [N, 128, h, w], channels-last


class GuidedLayout:
    """A layout and the null layout side by side: one pass of the network yields both halves of guidance.

    The middle block and decoder see a batch of 2N, conditional first; the null layout has batch 1 and is shared.
    """

    passes = 2

    def __init__(self, conditional: Layout, null: Layout):
        self.conditional = conditional
        self.null = null

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor) -> torch.Tensor:
        conditional, null = x.chunk(2)
        if torch.is_grad_enabled():
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

    def modulation(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 + scale, shift), each [N, C, h, w], from the layout's hidden features; both by one convolution."""
        weight = torch.cat([self.mlp_gamma.weight, self.mlp_beta.weight])
        # The 1 of (1 + scale) rides on the bias. In float32, so that the sum is rounded only once.
        bias = torch.cat([self.mlp_gamma.bias.float() + 1.0, self.mlp_beta.bias.float()])
        return in_precision_of(F.conv2d, hidden, weight, bias, padding=1).chunk(2, dim=1)

    def forward(self, x: torch.Tensor, layout: Layout | GuidedLayout) -> torch.Tensor:
        return layout.modulate(self, self.param_free_norm(x))
