"""The memory of the host: how much is free, and how the C library keeps it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from pathlib import Path, PurePosixPath

import torch

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


def available_memory() -> int:
    """Bytes that this process can still take, of the host's and of its control group's."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(min(int(fields["MemAvailable"].split()[0]) * 1024, _free_in_group()))
    except (OSError, KeyError):
        return 4 * 2**30  # not Linux: a careful guess


def _free_in_group(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """Bytes left under the limit of this process's control group (a container's, a SLURM job's); inf without one."""
    with contextlib.suppress(OSError, ValueError):
        with open(own, encoding="ascii") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
        # Version 2 has one group per process, version 1 one per resource; a group's limit holds for those within it.
        names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
        places = [
            (f"{root}/{kind}/{part}", *names[kind])
            for _, kind, path in lines
            if kind in names
            for part in (path, *map(str, PurePosixPath(path).parents))
        ]
        return min((_left(*place) for place in places), default=math.inf)
    return math.inf


def _left(folder: str, limit: str, usage: str) -> float:
    """A group's limit less its usage; cached files count as free. inf without a limit."""
    try:
        most, used = (int(Path(folder, name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        return most - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return math.inf


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device (what PyTorch holds unused counts as free)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory()
