"""What is done for a training when a failure ends it: its last step is saved before the failure is told.

Who saves depends on who knows of the failure.

- Every rank has raised at the same place (`World.together`, `World.on_main`): all save together, as they always do.
- One rank alone has failed, in its forward pass, say. The others wait in the exchange of gradients, which cannot be
  ended without harm: on a GPU, steps that would take half-exchanged gradients may be queued behind it. But weights,
  averages and the optimizer's state are the same on all ranks, so the failing one saves them by itself, where it sees
  the log directory; the others are told afterwards, and end.
- A rank is gone without a word. On a CPU nothing is queued, so rank 0, whose collective has failed, saves by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..dist_util import RemoteError, World, in_words
from ..hosts.rank_monitor import lost_contact
from ..logger import Logger
from .optimizers import is_spread
from .saving import Saving
from .state import TrainingState


class NothingSaved(Exception):
    """Why nothing is saved, in words."""


class Rescue:
    """Saves `state` when a failure ends what happens within `at_any_end`."""

    def __init__(self, state: TrainingState, saving: Saving, *, world: World, logger: Logger):
        self.state, self.saving, self.world, self.logger = state, saving, world, logger
        self._first_step = state.step
        self._whole = True

    @contextlib.contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Within it, weights and averages are partly of one step and partly of the next; for good, where it fails."""
        self._whole = False
        yield
        self._whole = True

    @contextlib.contextmanager
    def at_any_end(self, but: type[Exception]) -> Iterator[None]:
        """Within it, a failure saves what there is, and goes on; not `but`, which says that there is nothing good.

        Should several ranks fail by themselves, the first to come here saves.
        """
        try:
            yield
        except but:
            raise
        except Exception as error:  # whatever it is
            if self.world.all_heard(error):
                self._save_and_tell(error, alone=False)
            elif self._may_act_alone(error):
                with self.world.acting_alone() as first:
                    if first:
                        self._save_and_tell(error, alone=True)
            raise

    def _may_act_alone(self, error: Exception) -> bool:
        """Of ranks that are whole and see the log directory, the failing one; if it is gone, rank 0 on a CPU."""
        if not self._whole:
            return False
        if lost_contact(error):
            return self.world.is_main and self.world.device.type == "cpu"
        return self.saving.reaches_directory()

    def _save_and_tell(self, error: Exception, alone: bool) -> None:
        """Raises nothing: `error` is what shall be told in the end. A collective, unless `alone`."""
        reason = in_words(error)
        if isinstance(error, RemoteError):
            reason = str(error)
        elif alone and lost_contact(error):
            reason = f"rank {self.world.rank} has lost contact with another rank, which had not saved"
        elif self.world.size > 1:
            reason = f"rank {self.world.rank}: {reason}"
        try:
            told = self._save(reason, alone)
        except NothingSaved as why:
            told = f"nothing is saved: {why}"
        except Exception as problem:
            told = f"nothing could be saved ({in_words(problem)})"
        text = f"ended at step {self.state.step}; {told}. The reason: {reason}"
        with contextlib.suppress(OSError):  # the disk is full, perhaps
            if alone and not self.world.is_main:
                self.logger.add_line(text)
            else:
                self.logger.log(text)

    def _save(self, reason: str, alone: bool) -> str:
        """What was done, in words. :raises NothingSaved: why it was not."""
        step = self.state.step
        if step in (self.state.saved_step, self._first_step):
            return f"nothing was trained since step {step}, and nothing had to be saved"
        if not self._whole:
            raise NothingSaved("it came while the weights were being changed")
        if not self.state.finite():
            raise NothingSaved("the weights are not finite")
        if not alone:
            self.saving.save(emergency=reason)
            return "all is saved"
        self.saving.save_alone(reason)
        spread = is_spread(self.state.optimizer)
        return "all is saved" + " but the optimizer's state, which was spread over the ranks" * spread
