"""Files that cannot be used make way, and are kept."""

from __future__ import annotations

import itertools
import os


def set_aside(path: str, why: str) -> str:
    """Renames a file (or folder) to its own name with `.{why}-1` after it, or the first number that is free; returns
    the new path. :raises OSError: it cannot be renamed."""
    target = next(name for n in itertools.count(1) if not os.path.lexists(name := f"{path}.{why}-{n}"))
    os.rename(path, target)
    return target
