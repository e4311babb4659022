"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..data.own_files import temporary_path
from .files import CheckpointError


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole or not at all.

    Written under a temporary name in the same folder, synced and renamed.
    :raises CheckpointError: the disk is full, the folder read-only, ...; `path` is as it was.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # torch.save turns a failed write into RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            raise CheckpointError(
                f"cannot write {path}: {error} (is the disk full or the folder read-only?); what was there is unharmed"
            ) from error
        raise


def sync(path: str) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, content: Any) -> None:
    """Writes `content` whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def publish(source: str, target: str) -> None:
    """Gives the file `source` the second name `target` at once: a hard link where the file system can, else a copy.

    :raises CheckpointError: `target` cannot be written; it is as it was.
    """
    temporary = temporary_path(target)
    try:
        os.link(source, temporary)
        # Onto another name of the same file a rename does nothing, and would leave the temporary name.
        if os.path.exists(target) and os.path.samefile(source, target):
            os.remove(temporary)
        else:
            os.replace(temporary, target)
        sync(os.path.dirname(target) or ".")
    except OSError:
        with open(source, "rb") as original, atomic_write(target) as copy:
            shutil.copyfileobj(original, copy)
