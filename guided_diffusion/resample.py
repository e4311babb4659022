"""Which timesteps are trained on."""

from __future__ import annotations

import numpy as np

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class ScheduleSampler:
    """Every timestep equally often.

    Timesteps are chosen from uniform numbers that the caller draws, so that a sample's timestep can be made to depend
    on its position in the run alone.
    """

    needs_losses = False

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def probabilities(self) -> np.ndarray:
        """float64 [T], adding up to 1."""
        return np.full(self.num_timesteps, 1.0 / self.num_timesteps)

    def sample(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Uniform numbers in [0, 1) [N] -> timesteps int64 [N] and weights float32 [N], mean 1 in expectation."""
        probabilities = self.probabilities()
        cumulative = np.cumsum(probabilities)
        t = np.searchsorted(cumulative, uniform * cumulative[-1], side="right").clip(max=self.num_timesteps - 1)
        return t, (1.0 / (self.num_timesteps * probabilities[t])).astype(np.float32)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        pass


class LossSecondMomentSampler(ScheduleSampler):
    """Timesteps in proportion to the root mean square of their last losses (arXiv 2102.09672, equation 18).

    Until every timestep has `history` losses, it is uniform.
    """

    needs_losses = True

    def __init__(self, num_timesteps: int, history: int = 10, uniform_share: float = 0.001):
        super().__init__(num_timesteps)
        self.uniform_share = uniform_share
        self.losses = np.zeros((num_timesteps, history))
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def probabilities(self) -> np.ndarray:
        if (self.counts < self.losses.shape[1]).any():
            return super().probabilities()
        weights = np.sqrt((self.losses**2).mean(axis=1)) + 1e-12  # all zero: uniform
        weights /= weights.sum()
        return weights * (1 - self.uniform_share) + self.uniform_share / self.num_timesteps

    def update(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Records the losses [M] of timesteps [M], those of all ranks, in the same order on each."""
        for step, loss in zip(t, losses, strict=True):
            self.losses[step, self.counts[step] % self.losses.shape[1]] = loss  # a ring: the mean ignores the order
            self.counts[step] += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        losses = np.asarray(state["losses"])
        if losses.shape != self.losses.shape:
            raise ValueError(f"loss history {losses.shape} is not for {self.losses.shape[0]} timesteps")
        self.losses, self.counts = losses.copy(), np.asarray(state["counts"]).copy()


def create_schedule_sampler(name: str, num_timesteps: int) -> ScheduleSampler:
    """:raises ValueError: a name not in SCHEDULE_SAMPLERS."""
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(f"unknown schedule_sampler {name!r}: choose one of {', '.join(SCHEDULE_SAMPLERS)}")
    return ScheduleSampler(num_timesteps) if name == "uniform" else LossSecondMomentSampler(num_timesteps)
