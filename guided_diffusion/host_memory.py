"""How the C library keeps memory."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_ON_HEAP = 32 << 20  # glibc takes no more


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed for the next use; whether it will (elsewhere than on Linux with glibc: no).

    A training step on a CPU frees a gigabyte and asks for it again in the next one. By default much of it goes back to
    the system in between, and every page of it must be faulted in and cleared anew.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
