"""What a network predicts of a noisy image, and what follows from it.

x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, so that noise, image and velocity are linear in each other. The
loss, the sampling loop and guidance ask these objects and never which of the three it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

Tables = Callable[[str], torch.Tensor]
"""The diffusion's table of a name at the timesteps in question, float32 [N, 1, 1, 1]."""


class Prediction(Protocol):
    """Tensors are [N, C, H, W]; `output` is the network's, without the half for the variance."""

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, at: Tables) -> torch.Tensor:
        """The output that would be right for x_t made of this image and noise."""
        ...

    def image(self, output: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        """The image x_0 that an output at x_t = `x` means."""
        ...

    def output(self, image: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        """The output at x_t = `x` that means this image: the inverse of `image`."""
        ...

    def image_error(self, snr: np.ndarray) -> np.ndarray:
        """The squared error of the output in units of the squared error of the image, at signal-to-noise ratios [T]."""
        ...


class PredictsNoise:
    """The noise (Ho et al., arXiv 2006.11239)."""

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, at: Tables) -> torch.Tensor:
        return noise

    def image(self, output: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        return at("sqrt_recip_alphas_cumprod") * x - at("sqrt_recipm1_alphas_cumprod") * output

    def output(self, image: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        return (at("sqrt_recip_alphas_cumprod") * x - image) / at("sqrt_recipm1_alphas_cumprod")

    def image_error(self, snr: np.ndarray) -> np.ndarray:
        return snr


class PredictsVelocity:
    """sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, arXiv 2202.00512, appendix D)."""

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, at: Tables) -> torch.Tensor:
        return at("sqrt_alphas_cumprod") * noise - at("sqrt_one_minus_alphas_cumprod") * x_start

    def image(self, output: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        return at("sqrt_alphas_cumprod") * x - at("sqrt_one_minus_alphas_cumprod") * output

    def output(self, image: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        return (at("sqrt_alphas_cumprod") * x - image) / at("sqrt_one_minus_alphas_cumprod")

    def image_error(self, snr: np.ndarray) -> np.ndarray:
        return snr + 1


class PredictsImage:
    """The image itself."""

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, at: Tables) -> torch.Tensor:
        return x_start

    def image(self, output: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        return output

    def output(self, image: torch.Tensor, x: torch.Tensor, at: Tables) -> torch.Tensor:
        return image

    def image_error(self, snr: np.ndarray) -> np.ndarray:
        return np.ones_like(snr)
