"""The numbers of neighbourhoods against `torch.unique` over the neighbourhoods themselves, cut out one by one."""

import doctest

import numpy as np
import pytest
import torch

from guided_diffusion.layouts import neighbourhoods
from guided_diffusion.layouts.neighbourhoods import NONE, Numbered, neighbours, number, number_fives, number_threes


def cut(values: torch.Tensor, side: int, outside: int) -> torch.Tensor:
    """[N, K, h, w] -> [N * h * w, K * side * side]: the square around each pixel, `outside` beyond the map."""
    samples, kinds, height, width = values.shape
    reach = side // 2
    padded = torch.full((samples, kinds, height + 2 * reach, width + 2 * reach), outside)
    padded[:, :, reach : reach + height, reach : reach + width] = values
    return torch.stack(
        [
            padded[n, :, i : i + side, j : j + side].flatten()
            for n in range(samples)
            for i in range(height)
            for j in range(width)
        ]
    )


def assert_same_groups(found: Numbered, rows: torch.Tensor) -> None:
    """Two pixels have one number if and only if their rows are equal; and `order`, `firsts`, `counts` say where."""
    distinct, expected, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    ids = found.ids.flatten()
    assert found.count == len(distinct) and sorted(set(ids.tolist())) == list(range(len(distinct)))
    pairs = torch.unique(torch.stack([ids, expected]), dim=1)
    assert pairs.shape[1] == len(distinct)  # a bijection between the numbers and the distinct rows
    assert found.counts[pairs[0]].tolist() == counts[pairs[1]].tolist()
    assert found.order.tolist() == sorted(range(len(ids)), key=lambda pixel: (int(ids[pixel]), pixel))
    assert found.first_pixels.tolist() == [ids.tolist().index(i) for i in range(found.count)]


def draw(rng: np.random.Generator, smallest: int) -> tuple[torch.Tensor, int]:
    """A map of random size, classes, blocks, with or without edges, samples dropped or not: (`ones`, channels)."""
    samples, classes, edges = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 200])), bool(rng.integers(2))
    height, width, block = (int(side) for side in (*rng.integers(smallest, 10, 2), rng.integers(1, 5)))
    label = torch.from_numpy(rng.integers(0, classes, (samples, 1, -(-height // block), -(-width // block))))
    ones = [label.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width]]
    if edges:
        ones.append(torch.where(torch.from_numpy(rng.random(ones[0].shape) < rng.choice([0.05, 0.5])), classes, NONE))
    dropped = torch.from_numpy(rng.random(samples) < 0.3)
    return torch.cat(ones, dim=1).masked_fill(dropped.view(-1, 1, 1, 1), NONE), classes + edges


@pytest.mark.parametrize("seed", range(6))
def test_equal_numbers_are_equal_neighbourhoods(seed):
    """Three hundred random maps of 1 to 9 pixels a side; from 2 on also 5x5.

    What the second convolution sees of a 5x5 neighbourhood is its pixels, and which of the inner nine lie outside the
    map: there it finds no hidden features at all, but those of an empty layout in a dropped sample.
    """
    rng = np.random.default_rng(seed)
    shared = 0
    for _ in range(50):
        ones, channels = draw(rng, smallest=1)
        threes = number_threes(ones, channels)
        assert_same_groups(threes, cut(ones, 3, NONE))
        if min(ones.shape[2:]) > 1:
            fives = number_fives(threes)
            inside = cut(torch.ones_like(ones[:, :1]), 3, 0)
            assert_same_groups(fives, torch.cat([cut(ones, 5, NONE), inside], dim=1))
            shared += fives.ids.numel() - fives.count
    assert shared > 100  # there is something to tell apart and something to join


def test_neighbours_are_those_around_each_pixel():
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 99, (2, 4, 5)))
    assert torch.equal(neighbours(values, outside=-7), cut(values[:, None], 3, -7))


def test_numbers_follow_the_size_of_what_they_stand_for():
    numbered = number(torch.tensor([[5, -3], [5, 900]]))
    assert numbered.ids.tolist() == [[1, 0], [1, 2]]
    assert numbered.order.tolist() == [1, 0, 2, 3] and numbered.counts.tolist() == [1, 2, 1]


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (1, 1)])
def test_a_map_one_pixel_wide_has_no_diagonal_neighbours(size):
    threes = number_threes(torch.zeros(1, 1, *size, dtype=torch.long), 1)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels"):
        number_fives(threes)


def test_the_worked_example_is_true():
    result = doctest.testmod(neighbourhoods)
    assert result.attempted >= 8 and result.failed == 0
