"""What a training step minimises, as an object that the training loop and the validation are given.

Neither knows which objective it is: they hand over the network, what it reads, and the random numbers of these samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Batch:
    """N samples as the network reads them, on its device.

    :param image: float32 [N, 3, H, W] in [-1, 1].
    :param layout: float [N, L, H, W], or a layout that is already encoded: what the network takes as `y`.
    """

    image: torch.Tensor
    layout: Any


@dataclass(frozen=True)
class Draws:
    """The random numbers of N samples, on the network's device; drawn outside, so that a run can be repeated.

    :param timesteps: int64 [N], from 0 to `Objective.num_timesteps` - 1.
    :param noise: standard normal, float32 [N, 3, H, W].
    """

    timesteps: torch.Tensor
    noise: torch.Tensor


class Objective(Protocol):
    """The losses of samples at timesteps 0 ... `num_timesteps` - 1.

    `measured` is the term that a validation averages, and that decides the best weights. `measured_in_words` is its
    name where it is another than the mean squared error of the prediction, for which it is empty: averages of terms
    with different names do not compare.
    """

    num_timesteps: int
    measured: str
    measured_in_words: str

    def losses(self, network: Callable[..., torch.Tensor], batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        """`loss`, which a training step minimises, and its parts by name: one number for each sample, [N]."""
        ...
