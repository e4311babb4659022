"""Which class of a checkpoint each class of new data starts from: by a map, by name, or from the mean of all."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..data.class_lists import plain_name
from ..data.json_text import parse_json
from ..settings import ConfigError

ClassMap = Mapping[str, "list[str] | None"]  # new class -> classes of the checkpoint; None: none
BY_MAP, BY_NAME, MEAN, NONE = "class map", "same name", "mean of all", "none, by the class map"


@dataclass(frozen=True)
class Row:
    """What one new class starts from.

    :param sources: ids of the checkpoint's classes, of which it takes the mean; empty: none of them.
    :param how: BY_MAP, BY_NAME, MEAN or NONE.
    """

    name: str
    sources: tuple[int, ...]
    how: str


def read_class_map(path: str) -> ClassMap:
    """The map in a JSON file: {"road": "street", "lawn": ["grass", "field"], "tumour": null}, from each new class to
    one class of the checkpoint, to several, or to none.

    :raises ConfigError: there is no such file, it is no such map, or a class stands in it twice.
    """
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read())
    except OSError as error:
        raise ConfigError(f"cannot read the class map {path} ({error.strerror or error}): see --class_map") from error
    except ValueError as error:
        raise ConfigError(f"the class map {path} is not valid: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"the class map {path} must hold one JSON object that says what new classes start from, such as "
            '{"road": "street", "lawn": ["grass", "field"], "tumour": null}'
        )
    result: dict[str, list[str] | None] = {}
    for name, value in content.items():
        names = [value] if isinstance(value, str) else value
        if names is not None and (not isinstance(names, list) or not all(isinstance(n, str) for n in names)):
            raise ConfigError(
                f"the class map {path}: {name!r} is given {value!r}; it must be the name of a class of the checkpoint "
                '(or its id as text, such as "7"), a list of them, or null'
            )
        if names == []:
            raise ConfigError(f"the class map {path}: {name!r} is given an empty list; write null for no source")
        result[name] = names
    return result


def match_classes(
    old: Sequence[str], new: Sequence[str], class_map: ClassMap | None = None, path: str = ""
) -> list[Row]:
    """What each class of `new` starts from: what the map says; else the class of `old` that has its name, case, spaces
    and punctuation aside; else the mean over all of `old`.

    Where several have its name, it takes their mean, but the first of as many in `new` the first, and so on. A class
    may be given by its id in place of its name. Names without a meaning ("class 7", for class 7) are no names in
    common.

    :param class_map: see `read_class_map`. :param path: its file, for messages.
    :raises ConfigError: no class is known by a name in the map, a class stands in it twice, or it leaves all without a
        source.
    """
    old_names, new_names = _Names(old), _Names(new)
    mapped: dict[int, tuple[int, ...] | None] = {}
    for name, sources in (class_map or {}).items():
        targets = new_names.find(name)
        if not targets:
            raise ConfigError(
                f"the class map {path}: the new data has no class {name!r}{_nearest(name, new)}"
                + ("; the checkpoint has: new classes stand on the left" if old_names.find(name) else "")
            )
        ids = None if sources is None else _ids(name, sources, old_names, new_names, path)
        for target in targets:
            if target in mapped:
                raise ConfigError(f"the class map {path}: the class {new[target]!r} stands in it twice; keep one")
            mapped[target] = ids
    rows = []
    for i, name in enumerate(new):
        if i in mapped:
            ids = mapped[i]
            rows.append(Row(name, ids or (), NONE if ids is None else BY_MAP))
        elif same := _same_name(i, new_names, old_names):
            rows.append(Row(name, same, BY_NAME))
        else:
            rows.append(Row(name, tuple(range(len(old))), MEAN))
    if all(row.how == NONE for row in rows):
        raise ConfigError(
            f"the class map {path} gives every class null, so that nothing would be known of layouts: name a source "
            "for one of them, or leave --class_map out"
        )
    return rows


def without_meaning(names: Sequence[str]) -> bool:
    """Whether no class has a name of its own."""
    return all(_is_generic(i, name) for i, name in enumerate(names))


def _is_generic(index: int, name: str) -> bool:
    """Whether it is the name that classes get which have none."""
    return name == f"class {index}"


class _Names:
    """Class names that are looked up: as written, else without case, spaces and punctuation, else as ids."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.exact, self.plain = {}, {}
        for i, name in enumerate(names):
            self.exact.setdefault(name, []).append(i)
            self.plain.setdefault(plain_name(name), []).append(i)

    def named(self, name: str) -> list[int]:
        return self.exact.get(name) or self.plain.get(plain_name(name), [])

    def find(self, name: str) -> list[int]:
        """The ids of a class in a map; empty: there is none."""
        is_id = re.fullmatch(r"0|[1-9][0-9]{0,5}", name) and int(name) < len(self.names)
        return self.named(name) or ([int(name)] if is_id else [])


def _same_name(index: int, new: _Names, old: _Names) -> tuple[int, ...]:
    """The old classes that have the name of the new class `index`; empty: none."""
    name = new.names[index]
    if _is_generic(index, name):
        return ()
    found = [i for i in old.named(name) if not _is_generic(i, old.names[i])]
    alike = new.exact[name]
    return (found[alike.index(index)],) if len(found) == len(alike) else tuple(found)


def _ids(name: str, sources: Iterable[str], old: _Names, new: _Names, path: str) -> tuple[int, ...]:
    ids: list[int] = []
    for source in sources:
        found = old.find(source)
        if not found:
            raise ConfigError(
                f"the class map {path}: {name!r} is given {source!r}, which is no class of the checkpoint"
                + _nearest(source, old.names)
                + ("; it is one of the new data: the checkpoint's stand on the right" if new.find(source) else "")
            )
        if twice := [i for i in found if i in ids]:
            raise ConfigError(f"the class map {path}: {name!r} is given {old.names[twice[0]]!r} twice; keep one")
        ids += found
    return tuple(ids)


def _nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message: the most similar names, or the first ones there are."""
    by_plain = {plain_name(candidate): candidate for candidate in known}
    near = [by_plain[match] for match in difflib.get_close_matches(plain_name(name), by_plain, n=3, cutoff=0.5)]
    if near:
        return f" (is {' or '.join(map(repr, near))} meant?)"
    shown = ", ".join(map(repr, known[:8]))
    return f" (it has {shown}{f' and {len(known) - 8} more' if len(known) > 8 else ''})"
