"""Denoising: the network predicts what was added to an image (Ho et al., arXiv 2006.11239, equation 14)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..gaussian_diffusion import GaussianDiffusion
from .objective import Batch, Draws


class Denoising:
    """The objective of SDM: the losses of `GaussianDiffusion.training_losses`.

    Validation measures the mean squared error; where the variational bound is trained on alone (`use_kl`), that.
    """

    def __init__(self, diffusion: GaussianDiffusion):
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps
        self.measured = "loss" if diffusion.use_kl else "mse"
        self.measured_in_words = "variational bound" if diffusion.use_kl else ""

    def losses(self, network: Callable[..., torch.Tensor], batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        """`loss`, and where they exist its parts `mse` and `vb` (bits per dimension), [N] each."""
        return self.diffusion.training_losses(network, batch.image, draws.timesteps, {"y": batch.layout}, draws.noise)
