"""Pictures are written by a thread, while the next ones are made."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..data.pictures import save_png
from ..weights.store import CheckpointError

MOST_WAITING = 256  # pictures; whoever makes them faster than a disk takes them waits


class PictureWriter:
    """Writes PNG files in the order in which they come, each whole or not at all. Leaving a `with` waits for all.

    A picture that cannot be written is told at one of the next calls, or on leaving.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._waiting: list[Future] = []

    def save(self, picture: np.ndarray, path: str) -> None:
        """uint8 [H, W, 3], or ids [H, W]. :raises CheckpointError: an earlier one could not be written."""
        self._check(MOST_WAITING - 1)
        self._waiting.append(self._thread.submit(_save, picture, path))

    def wait(self) -> None:
        """Returns when all is written. :raises CheckpointError: something could not be."""
        self._check(0)

    def _check(self, most: int) -> None:
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.pop(0).result()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)  # what has come is written, whatever happens


def _save(picture: np.ndarray, path: str) -> None:
    try:
        save_png(picture, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; what is there is whole, start again to go on") from error
