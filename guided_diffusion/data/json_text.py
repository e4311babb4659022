"""Reading JSON that people wrote or edited: what Python's reader lets pass, or fails at, becomes one kind of error."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64  # the files of this project nest 4 deep; Python's own limits depend on its version and on the caller


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text holds; bytes may be UTF-8, 16 or 32, with or without a byte order mark.

    :raises ValueError: it is not JSON, has a key twice in one object (of which Python would keep the last), or nests
        more than `MAX_DEPTH` deep. The message does not know the file: the caller names it.
    """
    try:
        if isinstance(content, bytes):
            content = content.decode(json.detect_encoding(content), "surrogatepass")
        value = json.loads(content.removeprefix("\ufeff"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(_explained(error)) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for part in level for child in _children(part)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_MISTAKES = (  # what stands where Python's reader stops: the reason
    (r"//|/\*|#", "JSON has no comments; remove it"),
    (r",\s*[}\]]", "no comma may stand after the last entry; remove it"),
    (r"'", 'text stands in double quotes ("), not in single ones'),
    (r"True\b|False\b|None\b", "JSON writes true, false and null"),
)


def _explained(error: json.JSONDecodeError) -> str:
    """The reader's error with the line, and in words of files for the mistakes that are most often made."""
    text, place = error.doc, error.pos
    place += len(text[place:]) - len(text[place:].lstrip())
    comma = re.search(r",\s*$", text[:place])
    if comma and text[place : place + 1] in ("}", "]"):  # older readers stop after the comma
        place = comma.start()
    for pattern, reason in _MISTAKES:
        if re.match(pattern, text[place:]):
            return f"line {text.count(chr(10), 0, place) + 1}: {reason}"
    return f"line {error.lineno}: {error.msg} (column {error.colno})"


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
