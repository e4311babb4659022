"""Likelihood terms for the learned variance (Nichol & Dhariwal, arXiv 2102.09672, section 3.1)."""

from __future__ import annotations

import math

import torch


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) per element, in nats; shapes broadcast."""
    variance_ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + variance_ratio + distance - 1.0)


def _approximate_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation that the published training uses; kept so that losses agree."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, *, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Log-likelihood, in nats per element, of 8-bit values `x` scaled to [-1, 1] under a rounded Gaussian.

    Each value owns the bin of width 2/255 around it; the outermost bins reach to infinity (Ho et al., arXiv 2006.11239,
    equation 13).
    """
    centered = x - means
    inverse_std = torch.exp(-log_scales)
    upper = _approximate_normal_cdf(inverse_std * (centered + 1.0 / 255.0))
    lower = _approximate_normal_cdf(inverse_std * (centered - 1.0 / 255.0))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
