"""Layouts as integers: SPADE's convolutions, made once for each neighbourhood that occurs.

A label map is piecewise constant, so most of its neighbourhoods occur again and again: of the 5x5 neighbourhoods at
256 pixels, which decide their pixels' scale and shift, one in eight to one in thirty is distinct (on the real maps of
`benchmarks/RESULTS.md`). What SPADE convolves is computed for those and handed to their pixels. The same numbers as
`Layout` of the one-hot map, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..nn import in_precision_of
from .neighbourhoods import NONE, neighbours, number_fives, number_threes
from .spade import SPADEGroupNorm

# Where a larger share of a map's 3x3 neighbourhoods is distinct, the convolution over all pixels is about as fast, and
# takes less memory.
MOST_DISTINCT = 0.5
LONGEST_SUM = 256  # rows; longer sums are split, so that one large region does not keep a single core busy


class _Sums(NamedTuple):
    """Which rows of a table to add up: entry i is the sum of rows[starts[i] : starts[i + 1]].

    `joints`, where long sums were split, says likewise which of the sums then make up an entry.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    joints: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, counts: torch.Tensor) -> _Sums:
        """Entry i sums the next counts[i] of `rows`."""
        starts = counts.cumsum(0) - counts
        if counts.max() <= LONGEST_SUM:
            return cls(rows, starts, None)
        pieces = (counts + LONGEST_SUM - 1) // LONGEST_SUM
        joints = pieces.cumsum(0) - pieces
        nth_piece = torch.arange(int(pieces.sum()), device=rows.device) - joints.repeat_interleave(pieces)
        return cls(rows, starts.repeat_interleave(pieces) + LONGEST_SUM * nth_piece, joints)

    def __call__(self, table: torch.Tensor) -> torch.Tensor:
        """[R, C] -> [entries, C]."""
        sums = F.embedding_bag(self.rows, table.detach(), self.starts, mode="sum")  # gradients take their own way
        if self.joints is None:
            return sums
        return F.embedding_bag(torch.arange(len(sums), device=sums.device), sums, self.joints, mode="sum")


class _Gather(NamedTuple):
    """Sums of a table's rows, and the sums that carry their gradient back: each row collects from its entries."""

    forth: _Sums
    back: _Sums

    @classmethod
    def of(cls, rows: torch.Tensor, table_rows: int) -> _Gather:
        """`rows` [entries, K]: each entry sums its K rows, less those that are NONE."""
        there = rows != NONE
        rows, counts = rows[there], there.sum(1)
        entries = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
        of_row = torch.bincount(rows, minlength=table_rows)
        return cls(_Sums.of(rows, counts), _Sums.of(entries[rows.argsort(stable=True)], of_row))


class _SumRows(torch.autograd.Function):
    """table [R, C] -> the sums [entries, C] of `gather`."""

    @staticmethod
    def forward(ctx, table: torch.Tensor, gather: _Gather) -> torch.Tensor:
        ctx.back = gather.back
        return gather.forth(table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.back(grad.contiguous()), None


class _Modulate(torch.autograd.Function):
    """x [P, C] times its pixels' scales plus their shifts, from tables [U, C] of them; pixel p reads row ids[p].

    Backward reads the table again, so that no scale is kept per pixel.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, ids: torch.Tensor, pixels: _Sums
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, ids)
        ctx.pixels = pixels
        return torch.addcmul(shift.index_select(0, ids), x, scale.index_select(0, ids))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, ids = ctx.saved_tensors
        grad = grad.contiguous()
        to_x = scale.index_select(0, ids).mul_(grad)
        return to_x, ctx.pixels(grad * x), ctx.pixels(grad), None, None


@dataclass(frozen=True)
class _Map:
    """The layout at one resolution, as what is to be looked up.

    `hidden` gathers the hidden features of each spot from the first convolution's weights, laid out as a table. A spot
    is a pixel; or, where it pays, a distinct 3x3 neighbourhood. Only then, `products` gathers the scale and shift of
    each distinct 5x5 neighbourhood from the spots' products with the second convolution's nine weights, `ids` [P] is
    the neighbourhood of each pixel, and `pixels` sums over the pixels of each.
    """

    hidden: _Gather
    products: _Gather | None = None
    ids: torch.Tensor | None = None
    pixels: _Sums | None = None


class LabelLayout:
    """A layout of integers, for a training step: a `Modulation`.

    The convolution over a one-hot map is a sum of nine weights (and nine more where there are edges), which are looked
    up. The convolution of scale and shift that follows is made once for each 5x5 neighbourhood that occurs, at those
    resolutions where at most `MOST_DISTINCT` of the 3x3 neighbourhoods are distinct; elsewhere at every pixel.

    :param label: class ids [N, 1, H, W], all below `num_classes` (the loader has seen to that).
    :param edge: bool [N, 1, H, W], for a network with the edge channel, and only for one.
    :param num_classes: of the network. :param drop: bool [N]; these samples have the null layout.
    :param dtype: what the network computes in.
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
        # The layout channels that are 1 at a pixel: its class and, on an edge, the last one.
        ones = [label.long().masked_fill(drop, NONE)]
        if edge is not None:
            ones.append(torch.where(edge & ~drop, num_classes, NONE))
        self.ones = torch.cat(ones, dim=1)
        self.channels, self.dtype = num_classes + len(ones) - 1, dtype
        self._maps: dict[tuple[int, ...], _Map] = {}

    def prepare(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Numbers the neighbourhoods of every size."""
        for size in sizes:
            self.at(size)

    def at(self, size: Sequence[int]) -> _Map:
        """The layout at (height, width) `size`, by nearest neighbour."""
        size = tuple(size)
        if size not in self._maps:
            self._maps[size] = self._make_map(size)
        return self._maps[size]

    def _make_map(self, size: tuple[int, ...]) -> _Map:
        ones = F.interpolate(self.ones.double(), size=size, mode="nearest").long()
        threes = number_threes(ones, self.channels)
        worth_it = min(size) > 1 and threes.count <= MOST_DISTINCT * len(threes.order)
        spots = threes.first_pixels if worth_it else slice(None)
        around = torch.stack([neighbours(channel, NONE) for channel in ones.unbind(1)], dim=1)[spots]  # [spots, 1|2, 9]
        # The table's first L rows, of L layout channels, are for the first neighbour, and so on.
        rows = around + self.channels * torch.arange(9, device=around.device)
        hidden = _Gather.of(rows.masked_fill_(around == NONE, NONE).flatten(1), 9 * self.channels)
        if not worth_it:
            return _Map(hidden)
        fives, outside = number_fives(threes), threes.count  # outside the map: one more spot, without features
        around = neighbours(threes.ids, outside)[fives.first_pixels]
        rows = (9 * around + torch.arange(9, device=around.device)).masked_fill_(around == outside, NONE)
        pixels = _Sums.of(fives.order, fives.counts)
        return _Map(hidden, _Gather.of(rows, 9 * threes.count), ids=fives.ids.flatten(), pixels=pixels)

    def _hidden_rows(self, norm: SPADEGroupNorm, gather: _Gather) -> torch.Tensor:
        convolution, activation = norm.mlp_shared
        # contiguous: of channels-last weights this is a view whose rows are strided
        table = convolution.weight.permute(2, 3, 1, 0).reshape(9 * self.channels, -1).contiguous()
        return activation(_SumRows.apply(table, gather) + convolution.bias).to(self.dtype)

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, C, h, w], already normalized, scaled and shifted for each pixel by the layout (into `out`)."""
        modulated = self._modulated(norm, x)
        return modulated if out is None else out.copy_(modulated)

    def _modulated(self, norm: SPADEGroupNorm, x: torch.Tensor) -> torch.Tensor:
        here = self.at(x.shape[2:])
        hidden = self._hidden_rows(norm, here.hidden)  # [spots, 128]
        if here.products is None:
            hidden = hidden.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)  # [N, 128, h, w], channels-last
            scale, shift = norm.modulation(hidden)
            return torch.addcmul(shift, x, scale)
        weight, bias = norm.modulation_weights()
        table = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])  # [9 * 2C, 128]
        products = in_precision_of(F.linear, hidden, table).view(-1, len(weight))  # [spots * 9, 2C]
        scale, shift = (_SumRows.apply(products, here.products) + bias).to(x.dtype).chunk(2, dim=1)
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # no copy where x is channels-last
        rows = _Modulate.apply(rows, scale.contiguous(), shift.contiguous(), here.ids, here.pixels)
        return rows.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
