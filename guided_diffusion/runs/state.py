"""What a training step changes: all that a checkpoint keeps of a training, and a start reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..fp16_util import BadSteps, MixedPrecisionTrainer
from ..resample import ScheduleSampler
from ..unet import UNetModel
from ..weights import store
from ..weights.transfer import Transfer
from .optimizers import to_cpu


@dataclass
class TrainingState:
    """A training at some step.

    :param emas: by rate, as written in the flag; in the order and the memory layout of the network's parameters.
    :param base: the checkpoint that the run began from, and its hash; empty where it began from new weights.
    :param transfer: what of a checkpoint's classes the run begins with; None where it did not, or goes on.
    :param step: optimizer steps taken or skipped; checkpoints carry this number.
    :param samples_seen: by all ranks. :param continues: the log directory's own run goes on.
    :param saved_step: the last step of which the log directory has a checkpoint; None: of none.
    """

    model: UNetModel
    emas: dict[str, list[torch.Tensor]]
    optimizer: torch.optim.Optimizer
    trainer: MixedPrecisionTrainer
    schedule_sampler: ScheduleSampler
    base: dict[str, str] = field(default_factory=dict)
    transfer: Transfer | None = None
    step: int = 0
    samples_seen: int = 0
    continues: bool = False
    saved_step: int | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self.trainer.parameters

    @property
    def bad_in_a_row(self) -> int:
        """How many of the last steps were not finite, and skipped. Reading it is a transfer from the device."""
        return self.trainer.bad_steps.read()[1]

    def finite(self) -> bool:
        """Whether all weights are. A transfer from the device."""
        return bool(torch.stack([torch.isfinite(p).all() for p in self.parameters]).all())

    def ema(self, rate: str) -> dict[str, torch.Tensor]:
        """The averaged weights by name: the tensors themselves, no copies."""
        return dict(zip((name for name, _ in self.model.named_parameters()), self.emas[rate], strict=True))

    def contents(self, with_optimizer: bool = True) -> dict[str, Callable[[], Any]]:
        """File name -> function that makes its content: one file's at a time is copied from the device."""
        contents = {store.model_name(self.step): lambda: to_cpu(self.model.state_dict())}
        for rate in self.emas:
            contents[store.ema_name(rate, self.step)] = lambda rate=rate: to_cpu(self.ema(rate))
        if with_optimizer:
            optimizer = self.optimizer
            contents[store.optimizer_name(self.step)] = lambda: {
                **to_cpu(optimizer.state_dict()),
                "trainer": self._rest(),
            }
        return contents

    def _rest(self) -> dict[str, Any]:
        history = {name: torch.from_numpy(value) for name, value in self.schedule_sampler.state_dict().items()}
        total, in_a_row, _ = self.trainer.bad_steps.read()
        counts = {"bad_steps": total, "bad_in_a_row": in_a_row}
        return {"precision": self.trainer.state_dict(), "schedule_sampler": history, **counts}

    def load_rest(self, rest: dict[str, Any], fresh_streak: bool) -> None:
        """What an optimizer's file holds under `trainer`: loss scale, history of losses, counts of bad steps.

        :param fresh_streak: bad steps in a row are counted from 0.
        """
        self.trainer.load_state_dict(rest["precision"])
        history = {name: value.numpy() for name, value in rest["schedule_sampler"].items()}
        if history:
            self.schedule_sampler.load_state_dict(history)
        device = self.parameters[0].device
        self.trainer.bad_steps = BadSteps(device, rest["bad_steps"], 0 if fresh_streak else rest["bad_in_a_row"])
