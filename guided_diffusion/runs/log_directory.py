"""A run's log directory: one process writes in it, and finds in it what it has written before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from ..data.listing import printable
from ..weights import publishing, store


class LogDirectory:
    """The checkpoints of one run; used by rank 0 alone.

    `newest` finds the last whole set, `write` adds one, `publish` gives it the names that others look for. Nothing is
    created before `open`, so that a start which is refused leaves nothing behind.

    :param keep: how many sets stay; 0: all.
    :param reads_only: it is looked at and no more, also where another run is using it.
    """

    def __init__(self, folder: str, keep: int = 0, reads_only: bool = False):
        self.folder = folder
        self.keep = keep
        self.reads_only = reads_only
        self._lock: IO[str] | None = None

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The manifest of the newest whole set; None where there is none. Damaged ones are passed over with a warning.

        :raises CheckpointError: another run is using the directory.
        """
        # A run that is just saving its last step must not be read before it has.
        if os.path.isdir(self.folder) and not self.reads_only:
            self._take()
        return store.newest_complete(self.folder, lambda line: warn(printable(line)))  # it quotes what a manifest says

    def open(self) -> None:
        """Makes the directory where it is missing, and removes what a killed run left half written.

        :raises CheckpointError: another run is using it, or it cannot be written.
        """
        self._take()
        with self.writing():
            store.remove_leftovers(self.folder)

    def mark(self) -> tuple[int, ...] | None:
        """What this run's lock file looks like to every process that sees the folder; None: there is none."""
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(self.folder, store.LOCK_NAME))
            return status.st_ino, status.st_mtime_ns, status.st_size
        return None

    def write(
        self, step: int, contents: dict[str, Callable[[], Any]], manifest: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """Adds the set of `step`, whole or not at all, and config.json.

        :param contents: file name -> function that makes what `torch.save` shall write; called one after the other.
        :param manifest: what checkpoint{step}.json shall hold; `publish` reads `validation_loss`, `measure` and `good`
            there.
        :raises CheckpointError: the disk is full, say; older sets are unharmed.
        """
        store.write_json(os.path.join(self.folder, store.CONFIG_NAME), config)
        store.save_set(self.folder, step, contents, manifest)

    def publish(
        self,
        step: int,
        rates: Sequence[str],
        late_losses: dict[str, float] | None = None,
        *,
        note: Callable[[str], None],
    ) -> list[str]:
        """Makes the set of `step` the latest, and of each EMA rate the best where its loss is. Returns the rates whose
        best was updated. Doing it again changes nothing.

        :param late_losses: validation losses that were measured after the set was written.
        :raises CheckpointError: a file cannot be written; it is as it was.
        """
        with self.writing():
            if late_losses:
                return publishing.add_losses(self.folder, step, rates, late_losses, note)
            return publishing.publish_set(self.folder, step, rates, note)

    def best(self, rates: Sequence[str], note: Callable[[str], None]) -> dict[str, dict[str, Any]]:
        """The best average of each rate so far: its step, loss and measure. :raises CheckpointError: see `publish`."""
        with self.writing():
            return publishing.read_best(self.folder, rates, note)

    def note_divergence(self) -> int | None:
        """The sets since the last good one are not gone on from by themselves. Returns its step; None: there is none.

        :raises CheckpointError: that cannot be written.
        """
        return store.note_divergence(self.folder)

    def prune(self, newest: int) -> None:
        """Removes all sets but the last `keep` that end with step `newest`."""
        store.prune(self.folder, self.keep, newest)

    def config(self) -> dict[str, Any]:
        """What config.json holds; empty where there is none.

        :raises CheckpointError: it is damaged.
        """
        return store.read_config(os.path.join(self.folder, store.MODEL_NAME)) or {}

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within it, a failure to write names the directory and the remedy. :raises CheckpointError: in its place."""
        try:
            yield
        except OSError as error:
            raise store.CheckpointError(
                f"cannot write to the log directory {self.folder} ({error}): give another --logdir"
            ) from error

    def _take(self) -> None:
        with self.writing():
            os.makedirs(self.folder, exist_ok=True)
            self._lock = self._lock or store.lock(self.folder)
