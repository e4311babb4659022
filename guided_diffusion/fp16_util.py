"""Training in float32, float16 or bfloat16: one path for all three.

The weights stay in float32 (they are the master weights) and every layer casts them to the precision it computes in,
so gradients arrive in float32. float16 gradients need a loss scale (Micikevicius et al., arXiv 1710.03740, section
3.2), which grows slowly and halves whenever gradients overflow; the other two use none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

INITIAL_LOG_LOSS_SCALE = 20.0


class StepResult(NamedTuple):
    """What one optimizer step did: whether it was applied, and the gradient's norm (float32 scalar, on the device)."""

    applied: bool
    grad_norm: torch.Tensor


def global_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all tensors together, a scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


class MixedPrecisionTrainer:
    """Scales losses, and takes optimizer steps that are skipped as a whole where a gradient is not finite.

    :param precision: a key of PRECISIONS.
    :param scale_growth: by how much log2 of the loss scale grows with every step taken in fp16.
    :param max_grad_norm: gradients are shortened to this norm; 0: never.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "fp32",
        scale_growth: float = 1e-3,
        max_grad_norm: float = 0.0,
    ):
        self.parameters = parameters
        self.optimizer = optimizer
        self.scale_growth = scale_growth
        self.max_grad_norm = max_grad_norm
        self.scaled = precision == "fp16"
        self.log_loss_scale = INITIAL_LOG_LOSS_SCALE if self.scaled else 0.0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward() on."""
        return loss * 2.0**self.log_loss_scale if self.scaled else loss

    def step(self) -> StepResult:
        """Unscales and, where asked, clips the gradients of all parameters, and steps the optimizer.

        The one transfer from the device is whether the gradients are finite.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaled:
            torch._foreach_mul_(gradients, 2.0**-self.log_loss_scale)
        norm = global_norm(gradients)
        if not bool(torch.isfinite(norm)):
            # Not below 1: gradients that are not finite then are not the scale's fault, and small ones would vanish.
            self.log_loss_scale = max(0.0, self.log_loss_scale - 1.0)
            return StepResult(False, norm)
        if self.max_grad_norm > 0:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.log_loss_scale += self.scale_growth if self.scaled else 0.0
        return StepResult(True, norm)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, float]:
        return {"log_loss_scale": self.log_loss_scale, "scaled": self.scaled}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.scaled and state["scaled"]:  # a run that changes to fp16 starts with the initial scale
            self.log_loss_scale = float(state["log_loss_scale"])
