"""One process at a time in a folder: a lock that ends with its process, whatever ends that."""

from __future__ import annotations

import os
import socket
import stat
from typing import IO

from .files import CheckpointError

LOCK_NAME = ".lock"


def lock(folder: str, flag: str = "logdir", look: bool = False) -> IO[str] | None:
    """Takes the folder for this process, as long as the returned file is open; None where locks are not to be had.

    :param flag: which gives the folder. :param look: only see whether another process has it; writes nothing.
    :raises CheckpointError: another process has it (the message names that process), or `.lock` is not a lock file.
    """
    try:
        import fcntl
    except ImportError:
        return None
    path = os.path.join(folder, LOCK_NAME)
    if look and not os.path.lexists(path):
        return None
    file = _open_lock(path, flag, look)
    try:
        # A record lock is the process's own: workers that outlive a killed run do not hold it.
        fcntl.lockf(file, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise CheckpointError(
            f"{folder} is in use by another run ({file.read().strip() or 'unknown'}): stop it, or give another --{flag}"
        ) from error
    except OSError:  # a file system without locks
        return None
    if look:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _open_lock(path: str, flag: str, look: bool) -> IO[str]:
    """The lock file, made where it is missing (not to `look`). What is there may be somebody's own file, by a link or
    by this very name: a CheckpointError then, as its content would be replaced."""
    refusal = CheckpointError(f"{path} is a link, or no lock file of ours: move it away, or give another --{flag}")
    if os.path.islink(path) or os.path.isdir(path):
        raise refusal
    access = os.O_RDONLY if look else os.O_RDWR | os.O_CREAT | os.O_APPEND
    descriptor = os.open(path, access | getattr(os, "O_NOFOLLOW", 0), 0o666)
    status, begin = os.fstat(descriptor), b"process "
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and os.read(descriptor, len(begin)) in (b"", begin):
        return os.fdopen(descriptor, "r" if look else "r+", encoding="utf-8")
    os.close(descriptor)
    raise refusal
