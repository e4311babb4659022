"""Reading JSON that people wrote or edited: what Python's reader lets pass, or fails at, becomes one kind of error."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64  # the files of this project nest 4 deep; Python's own limits depend on its version and on the caller


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text holds; bytes may be UTF-8, 16 or 32, with or without a byte order mark.

    :raises ValueError: it is not JSON, has a key twice in one object (of which Python would keep the last), or nests
        more than `MAX_DEPTH` deep. The message does not know the file: the caller names it.
    """
    try:
        value = json.loads(content, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for part in level for child in _children(part)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it nests more than {MAX_DEPTH} deep, which no file of this project does"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one of them")
    return content


def _children(part: Any) -> list[Any]:
    if isinstance(part, dict):
        return list(part.values())
    return part if isinstance(part, list) else []
