"""Signals that ask a run to save its state and end."""

from __future__ import annotations

import signal
import time
from typing import Any

# SIGUSR1 is what SLURM is commonly told to send before a time limit (--signal=USR1@120); Windows has no such signal.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
SECOND_SIGNAL_SECONDS = 3.0
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
