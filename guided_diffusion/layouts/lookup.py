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
from .spade import SPADEGroupNorm

NONE = -1  # in a list of layout channels: nothing is 1 here
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

    passes = 1

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
        around = F.pad(ones, (1, 1, 1, 1), value=NONE)
        threes, order, firsts = _number_neighbourhoods(around, self.channels)
        worth_it = min(size) > 1 and len(firsts) <= MOST_DISTINCT * len(order)
        spots = order[firsts] if worth_it else slice(None)
        around = around.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, ones.shape[1], 9)[spots]
        # The table's first L rows, of L layout channels, are for the first neighbour, and so on.
        rows = around + self.channels * torch.arange(9, device=around.device)
        hidden = _Gather.of(rows.masked_fill_(around == NONE, NONE).flatten(1), 9 * self.channels)
        if not worth_it:
            return _Map(hidden)
        threes = F.pad(threes, (1, 1, 1, 1), value=len(firsts))  # outside the map: one more spot, without features
        fives, order, first_fives = _number_corners(threes, len(firsts) + 1)
        around = threes.unfold(1, 3, 1).unfold(2, 3, 1).reshape(-1, 9)[order[first_fives]]
        rows = (9 * around + torch.arange(9, device=around.device)).masked_fill_(around == len(firsts), NONE)
        counts = torch.diff(first_fives, append=first_fives.new_tensor([len(order)]))
        return _Map(hidden, _Gather.of(rows, 9 * len(firsts)), ids=fives.flatten(), pixels=_Sums.of(order, counts))

    def _hidden_rows(self, norm: SPADEGroupNorm, gather: _Gather) -> torch.Tensor:
        convolution, activation = norm.mlp_shared
        # contiguous: of channels-last weights this is a view whose rows are strided
        table = convolution.weight.permute(2, 3, 1, 0).reshape(9 * self.channels, -1).contiguous()
        return activation(_SumRows.apply(table, gather) + convolution.bias).to(self.dtype)

    def modulate(self, norm: SPADEGroupNorm, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, h, w], already normalized, scaled and shifted for each pixel by the layout."""
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


def _number(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equal entries of `key` get equal numbers, from 0 on without gaps.

    :return: the numbers, in the shape of `key`; the places of `key`, flattened, ordered by number; where in that order
        each number begins.
    """
    values, order = key.flatten().sort(stable=True)
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[1:] = values[1:] != values[:-1]
    numbers = torch.empty_like(order)
    numbers[order] = begins.cumsum(0) - 1
    return numbers.view_as(key), order, begins.nonzero()[:, 0]


def _number_neighbourhoods(ones: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 3x3 neighbourhoods within `ones` [N, 1 or 2, h + 2, w + 2], numbered as by `_number`, [N, h, w]."""
    kinds = channels + 1
    pixels = ones[:, 0] + 1
    for channel in ones[:, 1:].unbind(1):
        pixels = pixels * kinds + channel + 1
    pixels, _, firsts = _number(pixels)
    kinds = len(firsts)
    columns, _, firsts = _number((pixels[:, :-2] * kinds + pixels[:, 1:-1]) * kinds + pixels[:, 2:])
    kinds = len(firsts)
    pairs, _, firsts = _number(columns[:, :, :-2] * kinds + columns[:, :, 1:-1])
    return _number(pairs * kinds + columns[:, :, 2:])


def _number_corners(threes: torch.Tensor, kinds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 5x5 neighbourhoods, numbered as by `_number`, [N, h, w], from the 3x3 ones around them [N, h + 2, w + 2],
    which are numbers below `kinds`.

    Those at its four corners make up a 5x5 neighbourhood, and tell how much of it is outside (the highest number); so
    no more than these are compared.
    """
    pairs, _, firsts = _number(threes[:, :, :-2] * kinds + threes[:, :, 2:])
    return _number(pairs[:, :-2] * len(firsts) + pairs[:, 2:])
