"""Solvers that turn noise into images.

A solver is told the network's prediction at one noise level and returns x at a lower one; the lowest level, -1, is the
clean image. What a level means is its cumulative product alpha_bar, a float64 number of the diffusion's table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

DrawNoise = Callable[[], torch.Tensor]


class Denoised(NamedTuple):
    """p(x_{t-1} | x_t) as the network sees it: each [N, C, H, W], or broadcast to it. `pred_xstart` is the predicted
    image."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    pred_xstart: torch.Tensor


@dataclass(frozen=True)
class Move:
    """From one level of a diffusion to another: indices into its steps, -1 being the clean image."""

    start: int
    end: int


def alpha_bar(diffusion: Any, level: int) -> float:
    """The cumulative product at a level; 1 at the clean image."""
    return diffusion.alphas_cumprod[level] if level >= 0 else 1.0


class Solver(Protocol):
    """One run's state."""

    def reset(self) -> None:
        """Forgets the steps before: x goes on from somewhere else."""
        ...

    def step(self, x: torch.Tensor, p: Denoised, move: Move, draw_noise: DrawNoise) -> torch.Tensor:
        """x at level `move.start` and p(x_prev | x) there -> x at level `move.end`, which is lower."""
        ...


class DDPM:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2), with the network's variance where it has one."""

    def __init__(self, diffusion: Any, eta: float):
        del diffusion, eta  # mean and variance come from the network

    def reset(self) -> None:
        pass

    def step(self, x, p, move, draw_noise):
        if move.end != move.start - 1:
            raise ValueError(f"ddpm moves one level at a time; got {move.start} to {move.end}")
        if move.end < 0:
            return p.mean
        return torch.addcmul(p.mean, torch.exp(0.5 * p.log_variance), draw_noise())


class DDIM:
    """Song et al., arXiv 2010.02502, equation 12; eta 0 is deterministic, eta 1 as random as ancestral sampling."""

    def __init__(self, diffusion: Any, eta: float):
        self.diffusion, self.eta = diffusion, eta

    def reset(self) -> None:
        pass

    def step(self, x, p, move, draw_noise):
        here, target = alpha_bar(self.diffusion, move.start), alpha_bar(self.diffusion, move.end)
        noise = (x - math.sqrt(here) * p.pred_xstart) / math.sqrt(1 - here)
        # equation 16
        sigma = self.eta * math.sqrt((1 - target) / (1 - here) * (1 - here / target))
        x = math.sqrt(target) * p.pred_xstart + math.sqrt(max(1 - target - sigma**2, 0.0)) * noise
        return x + sigma * draw_noise() if sigma > 0 else x


class DPMSolverPP:
    """DPM-Solver++(2M): second order, multistep, predicting the image (Lu et al., arXiv 2211.01095, algorithm 2).

    The first step has no history and the last goes to zero noise, where the half log-SNR is infinite: both are of
    first order, which is DDIM.
    """

    def __init__(self, diffusion: Any, eta: float):
        del eta  # deterministic
        self.diffusion = diffusion
        self.reset()

    def reset(self) -> None:
        self.last: tuple[float, torch.Tensor] | None = None  # half log-SNR and predicted image of the step before

    @staticmethod
    def _half_log_snr(level: float) -> float:
        return 0.5 * math.log(level / (1 - level))

    def step(self, x, p, move, draw_noise):
        x_start = p.pred_xstart
        if move.end < 0:
            return x_start
        level, target = alpha_bar(self.diffusion, move.start), alpha_bar(self.diffusion, move.end)
        here = self._half_log_snr(level)
        h = self._half_log_snr(target) - here
        direction = x_start
        if self.last is not None:
            last, last_x_start = self.last
            r = (here - last) / h
            direction = torch.lerp(last_x_start, x_start, 1 + 1 / (2 * r))
        self.last = (here, x_start)
        sigma_ratio = math.sqrt((1 - target) / (1 - level))
        return sigma_ratio * x - math.sqrt(target) * math.expm1(-h) * direction


SAMPLERS: dict[str, Callable[[Any, float], Solver]] = {"ddpm": DDPM, "ddim": DDIM, "dpmsolver++": DPMSolverPP}


def dynamic_thresholding(percentile: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `denoised_fn` that clips each predicted image [N, ...] at that quantile of its own absolute values, where that
    exceeds 1, and divides by it (Saharia et al., arXiv 2205.11487, section 2.3).

    :raises ValueError: a percentile outside (0, 1].
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"dynamic_threshold must lie in (0, 1]; got {percentile}")

    def threshold(x_start: torch.Tensor) -> torch.Tensor:
        limit = torch.quantile(x_start.flatten(1).abs(), percentile, dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
        return torch.maximum(torch.minimum(x_start, limit), -limit) / limit

    return threshold
