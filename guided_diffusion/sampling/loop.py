"""The one loop that drives every sampler: a trajectory of moves between noise levels.

Levels are indices into the steps of a diffusion, 0 the least noisy; -1 is the clean image. Every image of a batch is
at the same level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from .external import make_solver
from .guidance import Predictor
from .solvers import Denoised, DrawNoise, Move, Solver, alpha_bar


class Process(Protocol):
    """What the loop asks of a diffusion."""

    num_timesteps: int
    alphas_cumprod: np.ndarray

    def denoised(self, predictor: Predictor, x: torch.Tensor, t: torch.Tensor, progress: float, **clipping) -> Denoised:
        """p(x_{t-1} | x_t) at timesteps t [N]."""
        ...


@dataclass
class Moment:
    """What is known after a move: `x` [N, C, H, W] at `level`, and the image that the network predicted last.

    `done` of `total` moves are made. Whoever iterates over the loop may put another x in its place before the next.
    """

    x: torch.Tensor
    pred_xstart: torch.Tensor
    level: int
    done: int
    total: int


Hook = Callable[[Moment], None]


def descent(num_timesteps: int) -> list[Move]:
    """The trajectory of a sample: from the noisiest level down to the image, one level at a time."""
    return [Move(level, level - 1) for level in reversed(range(num_timesteps))]


@torch.no_grad()
def run_moves(
    diffusion: Process,
    predictor: Predictor,
    x: torch.Tensor,
    solver: Solver,
    *,
    moves: Sequence[Move] | None = None,
    clip_denoised: bool = True,
    denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    draw_noise: DrawNoise | None = None,
    after: Hook | None = None,
    progress: bool = False,
) -> Iterator[Moment]:
    """Takes x [N, C, H, W] along a trajectory; yields the moment after each move.

    A move down is the solver's, from the network's prediction. A move up adds the noise that x would have at the higher
    level (Lugmayr et al., arXiv 2201.09865, equation 4), and solver and guidance forget their history.

    :param x: at the level where the first move starts: noise, for a whole descent.
    :param moves: the trajectory; by default the whole descent.
    :param denoised_fn: applied to each predicted image, before it is clipped to [-1, 1] (`clip_denoised`).
    :param draw_noise: source of fresh noise; torch's global one if not given.
    :param after: called after every move; it may replace the moment's `x`.
    """
    steps = diffusion.num_timesteps
    moves = descent(steps) if moves is None else list(moves)
    draw_noise = draw_noise or (lambda: torch.randn_like(x))
    solver.reset()
    predictor.guidance.reset()
    pred_xstart = x
    for done, move in enumerate(tqdm(moves, disable=not progress, desc="denoising", leave=False), start=1):
        if move.end > move.start:
            kept = alpha_bar(diffusion, move.end) / alpha_bar(diffusion, move.start)
            x = math.sqrt(kept) * x + math.sqrt(1 - kept) * draw_noise()
            solver.reset()
            predictor.guidance.reset()
        else:
            t = torch.full((x.shape[0],), move.start, device=x.device)
            p = diffusion.denoised(
                predictor, x, t, (steps - 1 - move.start) / steps, clip_denoised=clip_denoised, denoised_fn=denoised_fn
            )
            x, pred_xstart = solver.step(x, p, move, draw_noise), p.pred_xstart
        moment = Moment(x, pred_xstart, move.end, done, len(moves))
        if after is not None:
            after(moment)
        yield moment
        x = moment.x


def sample_loop(
    diffusion: Process,
    model: Any,
    noise: torch.Tensor,
    *,
    sampler: str = "ddpm",
    eta: float = 0.0,
    model_kwargs: dict[str, Any] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    **options: Any,
) -> Iterator[Moment]:
    """`run_moves` with the solver by its name (or another library's scheduler, see `external`) and the traditional
    arguments: a denoiser or a function as `model`, and `model_kwargs` (see `Predictor.from_kwargs`).

    :param guidance_interval: the part of the trajectory that is guided, 0 being pure noise and 1 the image.
    :raises ValueError: an unknown sampler, or an interval that is not 0 <= low < high <= 1.
    """
    solver = make_solver(sampler, diffusion, eta)
    predictor = Predictor.from_kwargs(model, model_kwargs, noise, guidance_interval)
    return run_moves(diffusion, predictor, noise, solver, **options)
