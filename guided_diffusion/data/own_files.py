"""Which files are ours: names for what is half written, and names from records that may be trusted."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from typing import Any

# Short, whatever the file is called: a name may fill the 255 bytes that file systems allow.
_OURS = re.compile(r"\.sdm-[0-9a-f]{12}\.part")
# Those of logs, and as earlier versions of this program called the others.
_BEFORE = re.compile(r".+\.(pt|json|jsonl|csv)\.tmp\d+|\..+\.png\.[a-z0-9_]{8}\.part")


def temporary_path(path: str | os.PathLike) -> str:
    """A new name in the folder of `path`, under which it can be written and then renamed."""
    return os.path.join(os.path.dirname(os.path.abspath(path)), f".sdm-{secrets.token_hex(6)}.part")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a writer of this program that was killed has left."""
    return bool(_OURS.fullmatch(name) or _BEFORE.fullmatch(name))


def plain_names(names: Any) -> list[str]:
    """Those of the names in a record that stay inside its folder: no separators, no `..`, nothing but text."""
    if not isinstance(names, Iterable) or isinstance(names, str):
        return []
    return [name for name in names if isinstance(name, str) and is_plain(name)]


def is_plain(name: str) -> bool:
    """Whether `name` is that of an entry in a folder, and not a way to another place."""
    return name not in ("", os.curdir, os.pardir) and "\0" not in name and os.path.basename(name) == name
