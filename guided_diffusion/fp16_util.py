"""Training in float32, float16 or bfloat16: one path for all three.

The weights stay in float32 (they are the master weights) and every layer casts them to the precision it computes in,
so gradients arrive in float32. float16 gradients need a loss scale (Micikevicius et al., arXiv 1710.03740, section
3.2), which grows slowly and halves whenever gradients overflow; the other two use none.

Whether a step is skipped is decided on the device: asking for it would make the host wait until the device has done all
that it was given, in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

INITIAL_LOG_LOSS_SCALE = 20.0


class StepResult(NamedTuple):
    """What one optimizer step did: whether it was applied (bool), and the gradient's norm (float32). Scalars on the
    device."""

    applied: torch.Tensor
    grad_norm: torch.Tensor


def global_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all tensors together, a scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


class BadSteps:
    """Counts the steps that were skipped, on the device; reading is a transfer.

    :param total: of all steps so far. :param in_a_row: those that ended with the last step.
    """

    def __init__(self, device: torch.device, total: int = 0, in_a_row: int = 0):
        self.counts = torch.tensor([total, in_a_row, 0], device=device)  # the last: the most in a row, as steps came

    def add(self, skipped: torch.Tensor) -> None:
        """One more step, and whether it was skipped (a bool scalar on the device)."""
        total, in_a_row, most = self.counts.unbind()
        total.add_(skipped)
        in_a_row.add_(1).mul_(skipped)
        torch.maximum(most, in_a_row, out=most)  # a row that has ended before anybody looked counts too

    def read(self) -> tuple[int, int, int]:
        """All; in a row until now; the most in a row that were reached since this object was made."""
        total, in_a_row, most = self.counts.tolist()
        return total, in_a_row, most


class MixedPrecisionTrainer:
    """Scales losses, and takes optimizer steps that are skipped as a whole where a gradient is not finite.

    With an optimizer whose kernels can skip a step themselves (PyTorch's fused ones, alone or sharded) nothing is read
    from the device; with another one, each step reads whether it is to be skipped.

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
        device = parameters[0].device
        # float64: growth by 1e-3 would be rounded in float32
        self._log_loss_scale = torch.full((), INITIAL_LOG_LOSS_SCALE * self.scaled, dtype=torch.float64, device=device)
        self.bad_steps = BadSteps(device)

    @property
    def log_loss_scale(self) -> float:
        """log2 of the loss scale. Reading it is a transfer from the device."""
        return float(self._log_loss_scale)

    @log_loss_scale.setter
    def log_loss_scale(self, value: float) -> None:
        self._log_loss_scale.fill_(value)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward() on."""
        return loss * torch.exp2(self._log_loss_scale).float() if self.scaled else loss

    def step(self) -> StepResult:
        """Unscales and, where asked, clips the gradients of all parameters, and steps the optimizer."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaled:
            torch._foreach_mul_(gradients, torch.exp2(-self._log_loss_scale).float())
        norm = global_norm(gradients)
        applied = torch.isfinite(norm)
        if self.max_grad_norm > 0:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        stepping = getattr(self.optimizer, "optim", self.optimizer)  # the one within a ZeroRedundancyOptimizer
        if getattr(stepping, "_step_supports_amp_scaling", False):
            stepping.found_inf = as_found_inf(applied)
            self.optimizer.step()
        elif bool(applied):
            self.optimizer.step()
        if self.scaled:
            # Not below 1: gradients that are not finite then are not the scale's fault, and small ones would vanish.
            smaller = (self._log_loss_scale - 1.0).clamp(min=0.0)
            self._log_loss_scale = torch.where(applied, self._log_loss_scale + self.scale_growth, smaller)
        self.bad_steps.add(~applied)
        return StepResult(applied, norm)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, float]:
        return {"log_loss_scale": self.log_loss_scale, "scaled": self.scaled}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.scaled and state["scaled"]:  # a run that changes to fp16 starts with the initial scale
            self.log_loss_scale = float(state["log_loss_scale"])


def as_found_inf(applied: torch.Tensor) -> torch.Tensor:
    """The flag of PyTorch's fused kernels, float32, 1 where they shall leave everything as it is."""
    return (~applied).float()
