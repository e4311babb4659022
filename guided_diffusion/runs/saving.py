"""Saving a training: when it opens its log directory, at every checkpoint, and what it tells of them."""

from __future__ import annotations

from typing import Any

from ..dist_util import World
from ..logger import Logger
from .log_directory import LogDirectory
from .optimizers import gathered, is_spread
from .resume import changed_settings
from .state import TrainingState
from .validation import Validation, ValidationFailed


class Saving:
    """Writes checkpoints of `state` into `directory`, with the validation loss that decides the best averages.

    :param validation: None: the latest averages count as the best.
    :param record: the settings to save as config.json beside the checkpoints.
    """

    def __init__(
        self,
        state: TrainingState,
        directory: LogDirectory,
        validation: Validation | None,
        *,
        world: World,
        logger: Logger,
        record: dict[str, Any],
    ):
        self.state, self.directory, self.validation = state, directory, validation
        self.world, self.logger = world, logger
        self.record = record | {"start": state.base}
        self._mark: tuple[int, ...] | None = None

    def open(self) -> None:
        """Everything that could be refused has been checked: from here on there are files. A collective.

        :raises CheckpointError: the log directory cannot be written, or another run is using it.
        """
        self._mark = self.world.on_main(self._open)

    def _open(self) -> tuple[int, ...] | None:
        self.directory.open()
        with self.directory.writing():
            self.logger.open(self.state.step)
            if self.state.transfer is not None:
                self.state.transfer.write(self.directory.folder)
        if self.state.continues:  # the run may have been killed between writing the set and publishing it
            if changes := changed_settings(self.directory.config(), self.record):
                self.logger.log(f"note: changed since the run was saved: {', '.join(changes)}")
            self.directory.publish(self.state.step, list(self.state.emas), note=self.logger.log)
        return self.directory.mark()

    def reaches_directory(self) -> bool:
        """Whether this rank sees the log directory of rank 0, and not one of the same name on another host."""
        return self.world.is_main or (self._mark is not None and self._mark == self.directory.mark())

    def save(self, measure_first: bool = True, emergency: str = "") -> None:
        """Writes this step's checkpoint set, model.pt and, where it is better, ema_{rate}_best.pt. A collective.

        :param measure_first: False: the validation loss comes after the writing, as who sent a signal may not wait.
        :param emergency: what has ended the training; the manifest says so, and nothing is measured.
        :raises CheckpointError: nothing that was there before is harmed.
        """
        losses = self._measure() if measure_first and not emergency else {}
        with gathered(self.state.optimizer, self.world):
            self.world.on_main(lambda: self._write(losses, emergency))
        self.state.saved_step = self.state.step  # known to every rank
        if not measure_first and not emergency and (losses := self._measure()):
            rates, note = list(self.state.emas), self.logger.log
            self.world.on_main(lambda: self.directory.publish(self.state.step, rates, losses, note=note))

    def save_alone(self, emergency: str) -> None:
        """The same by this rank alone, which cannot reach the others. An optimizer's state that is spread over them is
        left out, and then no older set gives way to this one.

        :raises CheckpointError: nothing that was there before is harmed.
        """
        self._write({}, emergency, with_optimizer=not is_spread(self.state.optimizer))

    def _measure(self) -> dict[str, float]:
        """The validation loss by EMA rate; empty where there is nothing to measure on, or it failed. A collective."""
        if self.validation is None:
            return {}
        state = self.state
        try:
            losses = {rate: self.validation.loss(state.model, state.ema(rate)) for rate in state.emas}
        except ValidationFailed as error:
            self.logger.log(f"warning: no validation loss of step {state.step}: {error}")
            return {}
        row = {"step": state.step} | {f"val_loss_{rate}": loss for rate, loss in losses.items()}
        self.world.on_main(lambda: self.logger.row(row))
        return losses

    def _write(self, losses: dict[str, float], emergency: str, with_optimizer: bool = True) -> None:
        step, rates, note = self.state.step, list(self.state.emas), self.logger.log
        good = self.state.bad_in_a_row == 0
        manifest = {
            "samples_seen": self.state.samples_seen,
            "world_size": self.world.size,
            "validation_loss": losses,
            "measure": self.validation.measure if self.validation is not None else None,
            "good": good,
            "best": self.directory.best(rates, note),
        }
        if emergency:
            manifest["emergency"] = emergency
        self.directory.write(step, self.state.contents(with_optimizer), manifest, self.record)
        self.state.saved_step = step
        best = self.directory.publish(step, rates, note=note)
        if good and with_optimizer:  # else the older ones are better
            self.directory.prune(step)
        figures = ", ".join(f"EMA {rate}: {loss:.5f}" for rate, loss in losses.items())
        self.logger.log(
            f"saved step {step} in {self.directory.folder}"
            + ("" if good else "; the last step was not finite, so nothing older gives way to it")
            + (f"; validation loss of {figures}" if figures else "")
            + (f"; new best: {', '.join(best)}" if best and losses else "")
        )
