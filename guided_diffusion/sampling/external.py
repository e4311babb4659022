"""Another library's scheduler as a solver: an object with the interface that diffusers' schedulers have.

No library is imported here; the object is asked for what it can do. It is given noise levels of ours, whatever its own
were: the levels that a run visits are a diffusion of that many steps, of which the scheduler takes every one. It is
told the predicted image, in which guidance and clipping are done already.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .solvers import SAMPLERS, Denoised, DrawNoise, Move, Solver, alpha_bar

# Options that decide the noise levels, or what is done to the predicted image, are ours. Each is set where the
# scheduler has it; its other options stay.
_LEVELS = {
    "beta_schedule": "linear",  # a valid value; trained_betas takes its place
    "timestep_spacing": "trailing",  # of as many steps as there are levels: every one
    "timestep_type": "discrete",
    "interpolation_type": "linear",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "rescale_betas_zero_snr": False,
    "lambda_min_clipped": -math.inf,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
_IMAGE = {"clip_sample": False, "thresholding": False}
_COMPUTED = ("trained_betas", "num_train_timesteps", "prediction_type", "beta_start", "beta_end")


class SchedulerSampler(str):
    """The name of a scheduler, with the object itself as `scheduler`: text wherever settings are recorded."""

    scheduler: Any

    def __new__(cls, name: str, scheduler: Any = None) -> SchedulerSampler:
        sampler = super().__new__(cls, name)
        sampler.scheduler = scheduler
        return sampler

    def __deepcopy__(self, memo: dict) -> SchedulerSampler:
        return self


def as_sampler(sampler: Any) -> Any:
    """A scheduler under its name, with those of its options that differ from their defaults; anything else as it is.

    :raises ValueError: a scheduler that cannot run over the noise levels of this project's diffusion; says why.
    """
    if isinstance(sampler, (str, type)) or not all(hasattr(sampler, name) for name in ("step", "set_timesteps")):
        return sampler
    kind, config = type(sampler).__name__, getattr(sampler, "config", None)
    if not isinstance(config, Mapping) or "trained_betas" not in config or not hasattr(sampler, "alphas_cumprod"):
        flow = " (it is made for flow matching)" if "flow" in kind.lower() else ""
        raise ValueError(
            f"sampler: {kind} takes no betas{flow}, and the networks here were trained with betas; take another one, "
            "as DPMSolverMultistepScheduler or UniPCMultistepScheduler"
        )
    unfit = {
        "prediction_type": (("flow_prediction",), "flow matching"),
        "use_flow_sigmas": ((True,), "flow matching"),
        "use_dynamic_shifting": ((True,), "flow matching"),
        "variance_type": (("learned", "learned_range"), 'a learned variance, which sampler="ddpm" here knows of'),
    }
    for option, (values, purpose) in unfit.items():
        if config.get(option) in values:
            raise ValueError(f"sampler: {kind} with {option}={config[option]!r} is made for {purpose}; change it")
    if "original_inference_steps" in config:
        raise ValueError(f"sampler: {kind} is made for networks that were distilled for it; take another one")
    if "tau_func" in config:  # a function of timesteps, which are numbered otherwise here
        raise ValueError(f"sampler: {kind} is random at certain numbers of timesteps; take another one")
    defaults = inspect.signature(type(sampler).__init__).parameters
    own = [
        f"{name}={value!r}"
        for name, value in config.items()
        if name in defaults and value != defaults[name].default and name not in (*_LEVELS, *_IMAGE, *_COMPUTED)
    ]
    return SchedulerSampler(f"{kind}({', '.join(own)})", sampler)


def make_solver(sampler: str, diffusion: Any, eta: float) -> Solver:
    """The solver of that name, or of that scheduler (an object, or what `as_sampler` made of it).

    :raises ValueError: an unknown name, or a scheduler that does not take these steps.
    """
    sampler = as_sampler(sampler)
    if isinstance(sampler, SchedulerSampler):
        return ExternalSolver(sampler.scheduler, diffusion, eta)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler](diffusion, eta)


class ExternalSolver:
    """A copy of a scheduler, with its class and its own options, over the levels of `diffusion`.

    Some schedulers hold x scaled by 1 / sqrt(alpha_bar), so that its noise has the deviation sigma (Karras et al.,
    arXiv 2206.00364); they show it by the input that they give the network. The last move, to the clean image, is
    ours: to zero noise, each of them gives the predicted image.

    :raises ValueError: it visits other levels than those, or cannot be told the image or the noise.
    """

    def __init__(self, scheduler: Any, diffusion: Any, eta: float):
        self.kind, self.eta, self.diffusion = type(scheduler).__name__, eta, diffusion
        self.steps = len(diffusion.alphas_cumprod)
        self.accepts = inspect.signature(scheduler.step).parameters
        reasons = []
        for self.prediction in ("sample", "epsilon"):
            try:
                self.scheduler = self._copy(scheduler)
                self._check_levels()
                self._try()
                break
            except (ValueError, TypeError, NotImplementedError, AttributeError, IndexError) as error:
                reasons.append(str(error).partition("\n")[0])
        else:
            raise ValueError(f"sampler: {self.kind} cannot take {self.steps} steps here: {reasons[-1]}")
        self.reset()

    def _copy(self, scheduler: Any) -> Any:
        config = scheduler.config
        ours = _LEVELS | _IMAGE | {"prediction_type": self.prediction, "num_train_timesteps": self.steps}
        ours = {name: value for name, value in ours.items() if name in config}
        copy = type(scheduler).from_config(config, trained_betas=self.diffusion.betas, **ours)
        # The product of float32 betas loses digits where few steps take a beta near 1.
        copy.alphas_cumprod = torch.from_numpy(np.asarray(self.diffusion.alphas_cumprod)).float()
        return copy

    def reset(self) -> None:
        listed = "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters
        if listed and "timestep_spacing" not in self.scheduler.config:
            self.scheduler.set_timesteps(timesteps=list(reversed(range(self.steps))))
        else:
            self.scheduler.set_timesteps(self.steps)
        self.generators: list[torch.Generator] | None = None

    def _check_levels(self) -> None:
        self.reset()
        timesteps = [float(t) for t in self.scheduler.timesteps]
        if len(timesteps) > self.steps:
            raise ValueError("it asks the network more than once for a step, and the loop here asks once")
        if timesteps != list(reversed(range(self.steps))):
            raise ValueError("it chooses noise levels of its own")
        first = float(self.scheduler.scale_model_input(torch.ones(1), self.scheduler.timesteps[0]))
        signal = math.sqrt(alpha_bar(self.diffusion, self.steps - 1))
        self.scaled = abs(first - 1) > abs(first - signal)
        if abs(first - (signal if self.scaled else 1)) > 1e-3 * signal:
            raise ValueError("it scales the network's input in a way that is not known here")

    def _try(self) -> None:
        """Steps on zeros, so that what cannot be is found before the network is asked; whether they are random."""
        x, self.random = torch.zeros(1, 1, 2, 2), True
        results = []
        for noise in (x, x + 1):
            self.reset()
            if self.steps > 1:  # the move to the image is not the scheduler's
                move = Move(self.steps - 1, self.steps - 2)
                results.append(self.step(x, Denoised(x, x, x, x), move, lambda noise=noise: noise))
        self.random = bool(results) and not torch.equal(*results)

    def _scale(self, level: int) -> float:
        return math.sqrt(alpha_bar(self.diffusion, level)) if self.scaled else 1.0

    def step(self, x: torch.Tensor, p: Denoised, move: Move, draw_noise: DrawNoise) -> torch.Tensor:
        if move.end != move.start - 1:
            raise ValueError(f"{self.kind} moves one level at a time; got {move.start} to {move.end}")
        if move.end < 0:
            return p.pred_xstart
        timestep = self.scheduler.timesteps[self.steps - 1 - move.start]
        sample = x / self._scale(move.start)
        self.scheduler.scale_model_input(sample, timestep)  # some take note of the step here
        output = p.pred_xstart
        if self.prediction == "epsilon":
            level = alpha_bar(self.diffusion, move.start)
            output = (x - math.sqrt(level) * output) / math.sqrt(1 - level)
        options = {"eta": self.eta} if "eta" in self.accepts else {}
        options |= self._noise(draw_noise)
        result = self.scheduler.step(output, timestep, sample, return_dict=False, **options)[0]
        return (result * self._scale(move.end)).to(x.dtype)

    def _noise(self, draw_noise: DrawNoise) -> dict[str, Any]:
        """Where a step's randomness comes from: of each image its own, so that it is the same in any batch."""
        if not self.random:
            return {}
        if "variance_noise" in self.accepts:
            return {"variance_noise": draw_noise()}
        if "generator" not in self.accepts:
            return {}
        if self.generators is None:  # seeded by bits of each image's own noise
            noise = draw_noise()
            bits = noise.float().flatten(1)[:, :2].contiguous().view(torch.int32).tolist()
            self.generators = [
                torch.Generator(noise.device).manual_seed((a & 0xFFFFFFFF) << 32 | (b & 0xFFFFFFFF)) for a, b in bits
            ]
        return {"generator": self.generators if len(self.generators) > 1 else self.generators[0]}
