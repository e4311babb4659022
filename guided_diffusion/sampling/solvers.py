"""Solvers that turn noise into images, and the one loop that drives them.

A solver is told the network's prediction at one noise level and returns x at the next lower one; the last level is the
clean image. Levels are cumulative products alpha_bar, float64 numbers from the diffusion's tables; every image of a
batch is at the same level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from tqdm import tqdm

DrawNoise = Callable[[], torch.Tensor]


class Solver(Protocol):
    """One run's state. `step` is called with indices num_timesteps - 1 ... 0."""

    def step(self, x: torch.Tensor, p: dict[str, torch.Tensor], index: int, draw_noise: DrawNoise) -> torch.Tensor:
        """x at level `index` and p(x_prev | x) there -> x at level `index - 1` (the image, where index is 0)."""
        ...


class DDPM:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2), with the network's variance where it has one."""

    def __init__(self, diffusion: Any, eta: float):
        del diffusion, eta  # mean and variance come from the network

    def step(self, x, p, index, draw_noise):
        if index == 0:
            return p["mean"]
        return torch.addcmul(p["mean"], torch.exp(0.5 * p["log_variance"]), draw_noise())


class DDIM:
    """Song et al., arXiv 2010.02502, equation 12; eta 0 is deterministic, eta 1 as random as ancestral sampling."""

    def __init__(self, diffusion: Any, eta: float):
        self.alpha_bar = diffusion.alphas_cumprod
        self.alpha_bar_prev = diffusion.alphas_cumprod_prev
        self.eta = eta

    def step(self, x, p, index, draw_noise):
        alpha_bar, previous = self.alpha_bar[index], self.alpha_bar_prev[index]
        x_start = p["pred_xstart"]
        noise = (x - math.sqrt(alpha_bar) * x_start) / math.sqrt(1 - alpha_bar)
        # equation 16
        sigma = self.eta * math.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
        x = math.sqrt(previous) * x_start + math.sqrt(max(1 - previous - sigma**2, 0.0)) * noise
        return x + sigma * draw_noise() if sigma > 0 else x


class DPMSolverPP:
    """DPM-Solver++(2M): second order, multistep, predicting the image (Lu et al., arXiv 2211.01095, algorithm 2).

    The first step has no history and the last goes to zero noise, where the half log-SNR is infinite: both are of
    first order, which is DDIM.
    """

    def __init__(self, diffusion: Any, eta: float):
        del eta  # deterministic
        self.alpha_bar = diffusion.alphas_cumprod
        self.alpha_bar_prev = diffusion.alphas_cumprod_prev
        self.last: tuple[float, torch.Tensor] | None = None  # half log-SNR and predicted image of the step before

    @staticmethod
    def _half_log_snr(alpha_bar: float) -> float:
        return 0.5 * math.log(alpha_bar / (1 - alpha_bar))

    def step(self, x, p, index, draw_noise):
        x_start = p["pred_xstart"]
        if index == 0:
            return x_start
        alpha_bar, target = self.alpha_bar[index], self.alpha_bar_prev[index]
        here = self._half_log_snr(alpha_bar)
        h = self._half_log_snr(target) - here
        direction = x_start
        if self.last is not None:
            last, last_x_start = self.last
            r = (here - last) / h
            direction = torch.lerp(last_x_start, x_start, 1 + 1 / (2 * r))
        self.last = (here, x_start)
        sigma_ratio = math.sqrt((1 - target) / (1 - alpha_bar))
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


def sample_loop(
    diffusion: Any,
    model: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    *,
    sampler: str = "ddpm",
    eta: float = 0.0,
    model_kwargs: dict[str, Any] | None = None,
    clip_denoised: bool = True,
    denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    draw_noise: DrawNoise | None = None,
    progress: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Takes noise [N, C, H, W] through every step of `diffusion`; yields `sample` and `pred_xstart` after each.

    :param model_kwargs: `y`, the layout, and `s`, the guidance scale (above 1: guided).
    :param guidance_interval: the part of the trajectory that is guided, 0 being pure noise and 1 the image; outside,
        the null pass is skipped (Kynkäänniemi et al., arXiv 2404.07724).
    :param draw_noise: source of the solver's own noise; torch's global one if not given.
    :raises ValueError: an unknown sampler, or an interval that is not 0 <= low < high <= 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    low, high = guidance_interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance_interval must be LOW,HIGH with 0 <= LOW < HIGH <= 1; got {low},{high}")
    return _sample_steps(
        diffusion,
        model,
        noise,
        SAMPLERS[sampler](diffusion, eta),
        dict(model_kwargs or {}),
        dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn),
        (low, high),
        draw_noise or (lambda: torch.randn_like(noise)),
        progress,
    )


@torch.no_grad()
def _sample_steps(diffusion, model, x, solver, model_kwargs, p_kwargs, interval, draw_noise, progress):
    steps = diffusion.num_timesteps
    for done in tqdm(range(steps), disable=not progress, desc="denoising", leave=False):
        index = steps - 1 - done
        t = torch.full((x.shape[0],), index, device=x.device)
        kwargs = model_kwargs
        if "s" in kwargs and not interval[0] <= done / steps < interval[1]:
            kwargs = {**kwargs, "s": 1.0}
        p = diffusion.p_mean_variance(model, x, t, model_kwargs=kwargs, **p_kwargs)
        x = solver.step(x, p, index, draw_noise)
        yield {"sample": x, "pred_xstart": p["pred_xstart"]}
