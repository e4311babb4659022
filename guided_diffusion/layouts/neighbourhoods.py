"""Numbers for the neighbourhoods of a map: equal neighbourhoods get equal numbers. Integers only, no features.

SPADE's hidden features at a pixel follow from its 3x3 neighbourhood in the map. Its scale and shift, which a second 3x3
convolution makes of those features, follow from its 5x5 neighbourhood. `lookup` computes both once for each
neighbourhood that occurs.

Nine or twenty-five pixels are never compared at once: two numbers below `kinds` become one, first * kinds + second, and
sorting renumbers what occurs from 0 on without gaps, so that the next product stays small. Worked through on a map of
2 rows and 7 columns, class 0 except for the last column, which is class 1:

>>> ones = torch.tensor([[0, 0, 0, 0, 0, 0, 1],
...                      [0, 0, 0, 0, 0, 0, 1]]).view(1, 1, 2, 7)

3x3. Outside the map nothing is 1. With this as 0, class 0 as 1 and class 1 as 2, three pixels one above the other
become one number, here those around the first row and those around the second:

>>> first_row = [9 * 0 + 3 * 0 + 0, 9 * 0 + 3 * 1 + 1, 9 * 0 + 3 * 2 + 2]  # outside the map, class 0, class 1
>>> second_row = [9 * 0 + 3 * 0 + 0, 9 * 1 + 3 * 1 + 0, 9 * 2 + 3 * 2 + 0]
>>> number(torch.tensor([first_row, second_row])).ids
tensor([[0, 1, 2],
        [0, 3, 4]])

Three such columns side by side make the neighbourhood of the middle one. Pixels 1 to 4 of a row see the same:

>>> threes = number_threes(ones, channels=2)
>>> threes.ids[0]
tensor([[0, 2, 2, 2, 2, 3, 4],
        [1, 5, 5, 5, 5, 6, 7]])
>>> threes.count, threes.first_pixels.tolist()  # of each number, counted along the rows
(8, [0, 7, 1, 5, 6, 8, 12, 13])

5x5. The 3x3 neighbourhoods of the four pixels diagonally next to a pixel cover its 5x5 neighbourhood. With 8 for
outside the map, these are 8, 8, 1, 5 for pixel 1 of the first row, 8, 8, 5, 5 for pixels 2 and 3, and 8, 8, 5, 6 for
pixel 4. So pixels 2 and 3 stay equal, and their neighbours, which see an end of the row, are others now:

>>> fives = number_fives(threes)
>>> fives.ids[0]
tensor([[11,  6,  7,  7,  8,  9, 10],
        [ 5,  0,  1,  1,  2,  3,  4]])
>>> fives.order.tolist(), fives.counts.tolist()  # pixels in the order of their numbers, and how many have each
([8, 9, 10, 11, 12, 13, 7, 1, 2, 3, 4, 5, 6, 0], [1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

NONE = -1  # in place of a layout channel's number: nothing is 1 here


class Numbered(NamedTuple):
    """What `number` returns. P is the number of entries (pixels of all samples), U that of distinct ones.

    `ids`: the numbers, 0 to U - 1, in the shape of what was numbered. `order` [P]: the entries, counted through the
    flattened shape, sorted by number and among equals by place. `firsts` [U]: where in `order` each number begins.
    """

    ids: torch.Tensor
    order: torch.Tensor
    firsts: torch.Tensor

    @property
    def count(self) -> int:
        """How many numbers there are, U."""
        return len(self.firsts)

    @property
    def first_pixels(self) -> torch.Tensor:
        """[U] The first entry that has each number."""
        return self.order[self.firsts]

    @property
    def counts(self) -> torch.Tensor:
        """[U] How many entries have each number."""
        return torch.diff(self.firsts, append=self.firsts.new_tensor([len(self.order)]))


def number(keys: torch.Tensor) -> Numbered:
    """Equal entries of `keys` (integers of any shape) get equal numbers, in the order of their size, without gaps."""
    values, order = keys.flatten().sort(stable=True)
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[1:] = values[1:] != values[:-1]
    ids = torch.empty_like(order)
    ids[order] = begins.cumsum(0) - 1
    return Numbered(ids.view_as(keys), order, begins.nonzero()[:, 0])


def neighbours(values: torch.Tensor, outside: int) -> torch.Tensor:
    """[N, h, w] -> [N * h * w, 9]: the values around each pixel and its own, row by row; `outside` beyond the map."""
    return F.pad(values, (1, 1, 1, 1), value=outside).unfold(1, 3, 1).unfold(2, 3, 1).reshape(-1, 9)


def number_threes(ones: torch.Tensor, channels: int) -> Numbered:
    """Numbers the 3x3 neighbourhoods of a map.

    :param ones: int64 [N, 1 or 2, h, w], the layout channels that are 1 at each pixel, or NONE. Beyond the map: NONE.
    :param channels: the layout's channels; entries of `ones` are below.
    :return: ids [N, h, w].
    """
    ones = F.pad(ones, (1, 1, 1, 1), value=NONE)
    kinds = channels + 1
    keys = ones[:, 0] + 1
    for channel in ones[:, 1:].unbind(1):
        keys = keys * kinds + channel + 1
    pixels, kinds = _number(keys)
    columns, kinds = _number((pixels[:, :-2] * kinds + pixels[:, 1:-1]) * kinds + pixels[:, 2:])
    pairs, _ = _number(columns[:, :, :-2] * kinds + columns[:, :, 1:-1])
    return number(pairs * kinds + columns[:, :, 2:])


def number_fives(threes: Numbered) -> Numbered:
    """Numbers the 5x5 neighbourhoods of the map whose 3x3 neighbourhoods are `threes`.

    Pixels are equal where the 3x3 neighbourhoods of the nine pixels around them are, and the same of the nine lie
    outside the map (where there are no hidden features, unlike at a pixel at which nothing is 1). The diagonal four of
    the nine tell all of that, if the map is at least two pixels high and wide.

    :return: ids [N, h, w]. :raises ValueError: if the map is one pixel high or wide.
    """
    if min(threes.ids.shape[1:]) < 2:
        height, width = threes.ids.shape[1:]
        raise ValueError(f"a map of {height} x {width} pixels: its 5x5 neighbourhoods need 2 x 2 pixels or more")
    around = F.pad(threes.ids, (1, 1, 1, 1), value=threes.count)
    pairs, kinds = _number(around[:, :, :-2] * (threes.count + 1) + around[:, :, 2:])
    return number(pairs[:, :-2] * kinds + pairs[:, 2:])


def _number(keys: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The numbers alone, and how many there are."""
    numbered = number(keys)
    return numbered.ids, numbered.count
