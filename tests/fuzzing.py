"""What the property tests share: odd values for settings and JSON files, made from their declarations.

`flags(ConfigClass)` makes command lines from a dataclass of settings; `broken(example)` makes from a valid content of a
JSON file others that are wrong in every way a person, an editor or a full disk may make them. `in_one_sentence` is the
property: success, or one of the expected errors with a sentence of one line. To put another file under test (a
config.json, a manifest), give its valid content and its reader to `JSON_FILES` in `tests/test_properties.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = float(os.environ.get("FUZZ_FACTOR", "1"))  # 100 times as many cases: FUZZ_FACTOR=100


def cases(count: int) -> Any:
    """The decorator of a property that is tried `count` times, in the same way in every run."""
    return settings(
        max_examples=max(1, round(count * FACTOR)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


# -- values ----------------------------------------------------------------------------------------------------------

WHOLE = st.sampled_from([0, 1, 2, 3, 8, 16, 32, 64, 255, 256, 65535, 65536, -1, -7, 2**31, 2**63, 2**64, 10**30])
ODD_TEXT = st.sampled_from(
    [
        *["", " ", "x", "two\nlines", "\ud800", "\udcff", "\0", "²", "٧", "07", "7", "-1", "nan", "1e400"],
        *["s3://b/x", "../x.png", "/x.png", "a/../../x.png"],
    ]
)
TEXT = ODD_TEXT | st.text(max_size=6)
NUMBERS = st.sampled_from([0.0, -0.5, 0.25, 1.0, 1e-320, 1e300, math.nan, math.inf, -math.inf])
SCALARS = st.none() | st.booleans() | WHOLE | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def flag_text(field: dataclasses.Field) -> st.SearchStrategy[str]:
    """What might be written behind a flag: values of its kind, the words of its help line, and anything else."""
    words = st.sampled_from([str(field.default), *re.findall(r"[\w.,+:/-]+", field.metadata["help"])])
    number = (WHOLE | NUMBERS).map(str)
    lists = st.lists(WHOLE.map(str) | NUMBERS.map(str), min_size=1, max_size=4).map(",".join)
    kind = {
        bool: st.sampled_from(["True", "no", "0", "maybe"]),
        int: number,
        float: number,
        tuple: lists,
    }.get(type(field.default), words | lists)
    return kind | kind | words | TEXT.filter(lambda text: "\0" not in text)  # no command line holds a zero


def flags(cls: type, most: int = 3) -> st.SearchStrategy[list[str]]:
    """Command lines with up to `most` flags of a dataclass of settings."""
    fields = st.sampled_from(dataclasses.fields(cls))
    one = fields.flatmap(lambda field: flag_text(field).map(lambda text: f"--{field.name}={text}"))
    return st.lists(one, min_size=1, max_size=most)


# -- JSON files ------------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value, its own included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


def _changed(value: Any, path: tuple, new: Any) -> Any:
    """A copy with the value at `path` replaced, or left out where `new` is `...`."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = _changed(value[path[0]], path[1:], new)
    return copy


def _like(value: Any, words: list[str]) -> st.SearchStrategy[Any]:
    """Values of the same kind, which get further than those of another kind."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 12) | WHOLE
    if isinstance(value, float):
        return NUMBERS
    if isinstance(value, str):
        return ODD_TEXT | st.sampled_from(words)
    if isinstance(value, list) and value:
        return st.lists(st.sampled_from(value), max_size=6)
    if isinstance(value, dict) and value:
        keys = st.sampled_from([*value, "0", "1", "255"]) | ODD_TEXT
        return st.dictionaries(keys, st.sampled_from(list(value.values())), max_size=4)
    return JSON


@st.composite
def contents(draw: Any, example: dict[str, Any], words: tuple[str, ...] = ()) -> Any:
    """A JSON value like `example`, with up to three values replaced, left out or added, at any depth."""
    value: Any = example
    known = [*words, *(part for part in _values(example) if isinstance(part, str)), *example]
    for _ in range(draw(st.sampled_from([1, 2, 3, 3]))):
        path = draw(st.sampled_from([place for place in _places(value) if place] or [()]))
        found = _at(value, path)
        new = draw(st.sampled_from(["like", "like", "like", "other", "gone", "added"]))
        if new == "added" and isinstance(value, dict):
            value = value | {draw(st.sampled_from(known) | ODD_TEXT): draw(_like(found, known) | JSON)}
        elif new == "like":
            value = _changed(value, path, draw(_like(found, known)))
        else:
            value = _changed(value, path, ... if new == "gone" else draw(JSON))
    return value


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _values(value: Any) -> list[Any]:
    return [_at(value, path) for path in _places(value)]


@st.composite
def broken(draw: Any, example: dict[str, Any], words: tuple[str, ...] = ()) -> bytes:
    """The bytes of a file: a content like the example, or these bytes cut, overwritten or in another encoding.

    words: text that the file's format knows, for instance the values of its keys.
    """
    harm = draw(st.sampled_from([*[""] * 16, "cut", "overwrite", "bom", "utf-16", "any value", "any bytes"]))
    value = draw(JSON) if harm == "any value" else draw(contents(example, words))
    content = json.dumps(value, indent=draw(st.sampled_from([None, 2]))).encode()
    place = draw(st.integers(0, max(len(content) - 1, 0))) if harm in ("cut", "overwrite") else 0
    if harm == "cut":
        return content[:place]
    if harm == "overwrite":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + 8 :]
    if harm == "bom":
        return b"\xef\xbb\xbf" + content
    if harm == "utf-16":
        return content.decode().encode("utf-16")
    return draw(st.binary(max_size=40)) if harm == "any bytes" else content


# -- the property ----------------------------------------------------------------------------------------------------


def in_one_sentence(call: Callable[[], Any], expected: tuple[type[BaseException], ...]) -> Any:
    """What the call returns, or None where it failed as it may: an expected error that says one line of text."""
    try:
        return call()
    except expected as error:
        said = str(error)
        assert said.strip() and "\n" not in said and "Traceback" not in said, repr(said)
        return None


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
