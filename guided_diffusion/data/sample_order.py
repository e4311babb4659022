"""In which order samples are drawn: from the seed and the global position alone."""

from collections.abc import Iterator

import numpy as np

_ORDER, _BALANCE = 1, 2  # keep the streams of random numbers apart from each other; 0 would equal no third number


class Positions:
    """Endless batches of (item, global position) for one rank."""

    def __init__(self, count: int, seed: int, batch_size: int, rank: int, world_size: int, start: int, weights):
        self.count, self.seed, self.batch_size = count, seed, batch_size
        self.rank, self.world_size, self.start, self.weights = rank, world_size, start, weights

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        position = self.start + self.rank * self.batch_size
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                if p // self.count != epoch:
                    epoch = p // self.count
                    order = epoch_order(self.count, self.seed, epoch, self.weights)
                batch.append((int(order[p % self.count]), p))
            yield batch
            position += self.world_size * self.batch_size


def epoch_order(count: int, seed: int, epoch: int, weights: np.ndarray | None) -> np.ndarray:
    """The items of an epoch, [count]: a permutation, or in proportion to weights by systematic resampling."""
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(count)
    if weights is None:
        return order
    expected = weights / weights.sum() * count
    ticks = np.random.default_rng([seed, epoch, _BALANCE]).random() + np.arange(count)
    drawn = np.searchsorted(np.cumsum(expected[order]), ticks).clip(max=count - 1)
    return order[drawn][np.random.default_rng([seed, epoch, _ORDER, _BALANCE]).permutation(count)]
