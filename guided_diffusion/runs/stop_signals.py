"""Signals that ask a run to save its state and end, and the signal that a process which loads data has died."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from ..data.specs import DataError
from ..dist_util import World

# SIGUSR1 is what SLURM is commonly told to send before a time limit (--signal=USR1@120); Windows has no such signal.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
SECOND_SIGNAL_SECONDS = 3.0
ASKING_SECONDS = 1.0  # between two questions to the ranks whether a signal has come
# The exit status of a program that a signal ended before its work was done: "try again" in sysexits.h (EX_TEMPFAIL).
EXIT_UNFINISHED = 75


class StopSignals:
    """Within it, a first signal is noted in `received` and nothing else happens; a second Ctrl-C, seconds later,
    raises KeyboardInterrupt.

    (`mpiexec` passes on a Ctrl-C that the terminal has already sent to every process: that is not a second one.)
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0

    @property
    def number(self) -> int:
        """The signal's number; 0: none has come."""
        return 0 if self.received is None else int(self.received)

    def _note(self, number: int, _: Any) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SECOND_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class LoaderDeaths:
    """Within it, the death of a process that loads data raises where batches are waited for, and nowhere else.

    PyTorch's loader raises from its handler of SIGCHLD, wherever the program happens to be: in the midst of an
    optimizer step, or of a save.
    """

    def __init__(self) -> None:
        self._waiting = self._noted = False
        self._before: Any = None

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True
        if self._waiting:
            self._tell(number, frame)

    def _tell(self, number: int, frame: Any) -> None:
        self._noted = False
        if callable(self._before):
            self._before(number, frame)

    def next_of(self, batches: Iterator[Any]) -> Any:
        """Waits for the next batch. :raises DataError: a process has died by now, or dies meanwhile."""
        try:
            with self._raised():
                return next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that loads data has died ({error}): is the host's memory full? --num_workers gives "
                "their number"
            ) from error

    @contextlib.contextmanager
    def _raised(self) -> Iterator[None]:
        self._waiting = True
        try:
            if self._noted:
                self._tell(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> LoaderDeaths:
        if hasattr(signal, "SIGCHLD"):
            self._before = signal.signal(signal.SIGCHLD, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, self._before or signal.SIG_DFL)


class StopRequests:
    """Tells every rank at the same step that a signal has come to one of them.

    To ask each other, the ranks must wait for the slowest. So they do it after as many steps as take about
    `ASKING_SECONDS` (by the slowest rank's measure, and at most twice as many as the time before), or after every step
    where one takes longer: a signal is obeyed after about that time, and the step under way. One process alone looks
    after every step.
    """

    def __init__(self, signals: StopSignals, world: World):
        self.signals, self.world = signals, world
        self.interval = 1  # steps from one question to the next, the same on all ranks
        self._steps, self._asked = 0, time.monotonic()

    def after_step(self) -> int:
        """A signal's number; 0: none has come, or it is not yet time to ask. A collective, after every step."""
        if self.world.size == 1:
            return self.signals.number
        self._steps += 1
        if self._steps < self.interval:
            return 0
        seconds_per_step = (time.monotonic() - self._asked) / self._steps
        numbers, seconds = zip(*self.world.gather((self.signals.number, seconds_per_step)), strict=True)
        self.interval = max(1, min(2 * self.interval, int(ASKING_SECONDS / max(*seconds, 1e-6))))
        self._steps, self._asked = 0, time.monotonic()
        return max(numbers)
