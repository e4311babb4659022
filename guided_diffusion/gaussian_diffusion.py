"""Gaussian diffusion: schedules, the maths of q and p, the training loss.

After Ho et al. (arXiv 2006.11239), with the learned variance and hybrid loss of Nichol & Dhariwal (arXiv 2102.09672)
and classifier-free guidance (arXiv 2207.12598) as SDM uses it (arXiv 2207.00050, equation 9). Schedules are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .sampling.guidance import Level, Predictor
from .sampling.loop import sample_loop
from .sampling.prediction import Prediction, PredictsImage, PredictsNoise, PredictsVelocity
from .sampling.solvers import Denoised

Model = Callable[..., torch.Tensor]
ModelArguments = dict[str, Any]


def get_named_beta_schedule(name: str, num_steps: int) -> np.ndarray:
    """The betas [num_steps], float64, of the schedule "linear" (arXiv 2006.11239) or "cosine" (arXiv 2102.09672).

    :raises ValueError: another name, or a number of steps that the schedule cannot be spread over.
    """
    if num_steps < 1:
        raise ValueError(f"diffusion_steps must be at least 1; got {num_steps}")
    if name == "linear":
        scale = 1000 / num_steps  # so that the end points mean the same for any number of steps
        if scale * 0.02 >= 1:  # the last step would leave nothing of the image: no sampler can divide by what is left
            raise ValueError(
                f"diffusion_steps {num_steps} with noise_schedule 'linear': the last beta would be {scale * 0.02:g}, "
                "and must be below 1; give more than 20 diffusion_steps, or noise_schedule cosine"
            )
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if name == "cosine":
        # equation 17 of arXiv 2102.09672, beta at most 0.999
        times = np.arange(num_steps + 1, dtype=np.float64) / num_steps
        alpha_bar = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"unknown noise schedule {name!r}: choose linear or cosine")


class GaussianDiffusion:
    """A diffusion process of T steps and what is computed with it.

    :param betas: float64 [T].
    :param predict_xstart: the network predicts x_0, not the noise.
    :param predict_v: it predicts the velocity sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, arXiv
        2202.00512, appendix D).
    :param learn_sigma: its output has 2C channels; the second half interpolates the log-variance between its bounds.
    :param use_kl: the loss is the variational bound alone; else the (hybrid) mean squared error.
    :param rescale_learned_sigmas: the bound's term in the hybrid loss is scaled by T / 1000.
    :param rescale_timesteps: the network sees timesteps scaled to 0..1000.
    :param loss_weighting: "none", or "min_snr": the squared error of a sample is weighted by min(SNR, gamma) in units
        of the x_0 error (Hang et al., arXiv 2303.09556, section 3.4).

    Timesteps `t` are int64 [N], counted from 0; images [N, C, H, W] in [-1, 1].
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        predict_xstart: bool = False,
        predict_v: bool = False,
        learn_sigma: bool = False,
        use_kl: bool = False,
        rescale_learned_sigmas: bool = False,
        rescale_timesteps: bool = False,
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas < 1)).all():
            got = f"{betas.min():g} to {betas.max():g}, of shape {list(betas.shape)}" if betas.size else "none"
            raise ValueError(f"betas must be one row of numbers above 0 and below 1; got {got}")
        if loss_weighting not in ("none", "min_snr"):
            raise ValueError(f"unknown loss_weighting {loss_weighting!r}: choose none or min_snr")
        if predict_xstart and predict_v:
            raise ValueError("predict_xstart and predict_v exclude each other: the network predicts one thing")
        self.prediction: Prediction = (
            PredictsImage() if predict_xstart else PredictsVelocity() if predict_v else PredictsNoise()
        )
        self.learn_sigma = learn_sigma
        self.use_kl = use_kl
        self.rescale_learned_sigmas = rescale_learned_sigmas
        self.rescale_timesteps = rescale_timesteps
        self.betas = betas
        self.num_timesteps = len(betas)
        self.original_num_steps = self.num_timesteps

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        # q(x_t | x_0), arXiv 2006.11239 equation 4, and its inverse
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)
        # q(x_{t-1} | x_t, x_0), equations 6 and 7
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        # It is 0 at the first step: its logarithm takes the next value there.
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        self.log_betas = np.log(betas)
        # Without a learned variance: beta, but the posterior's value at the first step.
        self.fixed_log_variance = np.log(np.append(first, betas[1:]))
        snr = self.alphas_cumprod / np.maximum(1.0 - self.alphas_cumprod, 1e-20)
        self.loss_weights = np.ones_like(snr)
        if loss_weighting == "min_snr":
            self.loss_weights = np.minimum(snr, min_snr_gamma) / self.prediction.image_error(snr)
        self._on_device: dict[tuple[str, torch.device], torch.Tensor] = {}

    # -- tables -------------------------------------------------------------------------------------------------------

    def _at(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """The table `name` at t [N], as float32 [N, 1, 1, 1]; each table is uploaded once."""
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(getattr(self, name)).float().to(t.device)
        return self._on_device[key][t].view(-1, 1, 1, 1)

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The timesteps [N] as the network is given them."""
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    # -- q ------------------------------------------------------------------------------------------------------------

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0)."""
        variance = self._at("sqrt_one_minus_alphas_cumprod", t) ** 2
        return self._at("sqrt_alphas_cumprod", t) * x_start, variance, variance.log()

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t from x_0 and Gaussian noise (drawn if not given)."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return self._at("sqrt_alphas_cumprod", t) * x_start + self._at("sqrt_one_minus_alphas_cumprod", t) * noise

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("posterior_mean_coef1", t) * x_start + self._at("posterior_mean_coef2", t) * x_t
        return mean, self._at("posterior_variance", t), self._at("posterior_log_variance_clipped", t)

    # -- p ------------------------------------------------------------------------------------------------------------

    def level(self, x: torch.Tensor, t: torch.Tensor, progress: float = 0.0) -> Level:
        """x_t at timesteps t [N] as guidance sees it."""
        return Level(x, progress, self.prediction, lambda name: self._at(name, t))

    def model_output(
        self, model: Model, x: torch.Tensor, t: torch.Tensor, model_kwargs: ModelArguments | None
    ) -> torch.Tensor:
        """What the network says of x_t, guided where `model_kwargs["s"]` > 1: [N, C or 2C, H, W].

        `model_kwargs["y"]` is a tensor, or what the network has encoded (see `Predictor.from_kwargs`).
        :raises ValueError: an encoded layout without its null layout, or a layout of another size than x.
        """
        return Predictor.from_kwargs(model, model_kwargs, x)(self.model_timesteps(t), self.level(x, t))

    def p_mean_variance(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        model_kwargs: ModelArguments | None = None,
    ) -> dict[str, torch.Tensor]:
        """p(x_{t-1} | x_t): `mean`, `variance`, `log_variance`, and the predicted x_0 as `pred_xstart`.

        `denoised_fn` is applied to the predicted x_0 before it is clipped to [-1, 1] (`clip_denoised`).
        """
        output = self.model_output(model, x, t, model_kwargs)
        return self._p_from_output(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)._asdict()

    def denoised(
        self,
        predictor: Predictor,
        x: torch.Tensor,
        t: torch.Tensor,
        progress: float,
        *,
        clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Denoised:
        """`p_mean_variance` as the sampling loop asks for it; `progress` goes from 0 at pure noise towards 1."""
        output = predictor(self.model_timesteps(t), self.level(x, t, progress))
        return self._p_from_output(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)

    def _p_from_output(self, output, x, t, *, clip_denoised, denoised_fn=None) -> Denoised:
        channels = x.shape[1]
        expected = 2 * channels if self.learn_sigma else channels
        if output.shape[1] != expected:
            raise ValueError(
                f"the network returned {output.shape[1]} channels, but learn_sigma={self.learn_sigma} needs {expected}"
            )
        if self.learn_sigma:
            # equation 15 of arXiv 2102.09672, with the output in [-1, 1] in place of v in [0, 1]
            output, v = output.chunk(2, dim=1)
            low, high = self._at("posterior_log_variance_clipped", t), self._at("log_betas", t)
            log_variance = low + (v + 1) / 2 * (high - low)
        else:
            log_variance = self._at("fixed_log_variance", t).expand_as(x)
        pred_xstart = self.level(x, t).image(output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return Denoised(mean, log_variance.exp(), log_variance, pred_xstart)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def p_sample_loop(
        self,
        model: Model,
        shape: tuple[int, ...],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cond_fn: None = None,
        model_kwargs: ModelArguments | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Ancestral sampling, all T steps, with the traditional arguments. Returns x_0 [N, C, H, W].

        :raises ValueError: a `cond_fn`: SDM is guided by its layout, not by a classifier.
        """
        if cond_fn is not None:
            raise ValueError("cond_fn: there is no classifier guidance here; SDM takes model_kwargs=dict(y=y, s=1.5)")
        kwargs = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, **kwargs}
        kwargs |= {"model_kwargs": model_kwargs, "progress": progress}
        sample = None
        for step in self.sample_loop_progressive(model, shape, noise, device, **kwargs):
            sample = step["sample"]
        return sample

    def ddim_sample_loop(self, *args: Any, eta: float = 0.0, **kwargs: Any) -> torch.Tensor:
        """DDIM sampling, all T steps; arguments as `p_sample_loop`. Returns x_0 [N, C, H, W]."""
        return self.p_sample_loop(*args, sampler="ddim", eta=eta, **kwargs)

    def sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        noise: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields each step's `sample` and `pred_xstart`, from noise to image; `sampling.loop.sample_loop` has the
        other arguments. `shape` and `device` matter where `noise` is not given."""
        if noise is None:
            if device is None:
                parameters = getattr(model, "parameters", lambda: iter(()))()
                device = next((p.device for p in parameters), torch.device("cpu"))
            noise = torch.randn(*shape, device=device)
        for moment in sample_loop(self, model, noise, **kwargs):
            yield {"sample": moment.x, "pred_xstart": moment.pred_xstart}

    # -- training -----------------------------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: ModelArguments | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of each sample, [N] each: `loss`, and where they exist its parts `mse` and `vb` (bits per dim).

        Hybrid: mean squared error, plus the variational bound with gradients into the variance alone
        (arXiv 2102.09672, equation 16).
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.use_kl:
            return {"loss": self._bound_term(output, x_start, x_t, t) * self.num_timesteps}
        channels = x_start.shape[1]
        prediction = output[:, :channels]
        target = self.prediction.target(x_start, noise, lambda name: self._at(name, t))
        terms = {"mse": mean_flat((target - prediction) ** 2)}
        terms["loss"] = terms["mse"] * self._at("loss_weights", t).flatten()
        if self.learn_sigma:
            frozen = torch.cat([prediction.detach(), output[:, channels:]], dim=1)
            terms["vb"] = self._bound_term(frozen, x_start, x_t, t)
            if self.rescale_learned_sigmas:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
            terms["loss"] = terms["loss"] + terms["vb"]
        return terms

    def _bound_term(self, output, x_start, x_t, t) -> torch.Tensor:
        """One term of the variational bound, in bits per dimension [N]: the KL, or the likelihood where t is 0."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self._p_from_output(output, x_t, t, clip_denoised=False)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, p.mean, p.log_variance))
        likelihood = mean_flat(
            discretized_gaussian_log_likelihood(x_start, means=p.mean, log_scales=0.5 * p.log_variance)
        )
        return torch.where(t == 0, -likelihood, kl) / math.log(2.0)
