"""Class names and colours beside a checkpoint: how a training records them, and what older records come to."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .specs import DATASET_MODES, DataError, DatasetSpec, get_spec, json_classes

CLASSES_KEY = "classes"  # of config.json
_SHOWN = 3  # differences of one kind in a message


def class_record(spec: DatasetSpec) -> list[dict[str, Any]]:
    """A data set's classes in the form of `classes` in `dataset.json`: class i is the i-th, with name and color."""
    colors = spec.palette.tolist()
    return [{"name": name, "color": color} for name, color in zip(spec.class_names, colors, strict=True)]


def recorded_classes(
    config: Mapping[str, Any] | None, num_classes: int, source: str
) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Names and palette (uint8 [num_classes, 3]) of the classes that a checkpoint's network knows.

    From the part `classes` of its config; without it (older trainings) from `dataset_json`, else from the class list of
    the recorded `dataset_mode`. None where the config (or there is none) does not say. Raises DataError, naming
    `source`, where what is recorded cannot be.
    """
    config = config or {}
    mode = (config.get("data") or {}).get("dataset_mode")
    if CLASSES_KEY in config:
        entries, where = config[CLASSES_KEY], f"{CLASSES_KEY} in {source}"
        names, colors = json_classes(where, entries if isinstance(entries, list) else [entries])
        if not len(names) == len(colors) == num_classes:
            raise DataError(
                f"{where}: {len(names)} classes, {len(colors)} of them with a color, for a network of {num_classes}; "
                "restore the file, or remove that part of it"
            )
        return tuple(names), np.array([colors[i] for i in range(num_classes)], dtype=np.uint8)
    if "dataset_json" in config:
        spec = get_spec("custom", None, num_classes, config["dataset_json"])
    elif mode in DATASET_MODES and mode != "custom":
        spec = get_spec(mode, None, num_classes)
    else:
        return None
    return spec.class_names, spec.palette


def check_same_meaning(recorded: dict[str, Any], now: dict[str, Any], num_classes: int | None, where: str) -> None:
    """Compares `dataset.json` as a training recorded it (`dataset_json` of its config) with one that its network is to
    be used with, `where` naming the latter. Other names and colours for display are welcome.

    Raises DataError where ids, colours or pictures mean something else than they did, or where one of them is wrong.
    """
    differences = changed_meaning(
        get_spec("custom", None, num_classes, recorded), get_spec("custom", None, num_classes, now)
    )
    if differences:
        raise DataError(
            f"{where} contradicts the training of the checkpoint, whose config.json has another dataset_json: "
            f"{'; '.join(differences)}; give the data the meaning that it had in training, or use another checkpoint"
        )


def changed_meaning(before: DatasetSpec, now: DatasetSpec) -> list[str]:
    """How the meaning of label maps and photographs differs between two records of one network's data: a phrase for
    each difference, [] where there is none. An id or colour without a meaning in one of them (an error where it
    occurs) is no difference; neither is a new name for a class, but a name that has moved to another one is."""
    differences = []
    # Of panoptic maps the categories' ids count, as the ids of other maps do.
    encodings = ["ids" if spec.label_colors is None else "colors" for spec in (before, now)]
    if encodings[0] != encodings[1]:
        differences.append(f"label_encoding: {encodings[0]} then, {encodings[1]} now")
    elif now.label_colors is None:
        old, new = (spec.lookup_table(1 << 16) for spec in (before, now))
        moved = np.flatnonzero((old != new) & (old >= 0) & (new >= 0))
        differences += [f"remap: the stored id {i} meant class {old[i]}, now {new[i]}" for i in moved[:_SHOWN]]
    else:
        old, new = ({tuple(c): i for i, c in enumerate(spec.label_colors.tolist())} for spec in (before, now))
        moved = [color for color in old if new.get(color, old[color]) != old[color]]
        differences += [f"color {color} meant class {old[color]}, now {new[color]}" for color in moved[:_SHOWN]]
    if before.ignore_class != now.ignore_class:
        ignored = ["none" if spec.ignore_class is None else spec.ignore_class for spec in (before, now)]
        differences.append(f"ignore_id: unlabelled pixels were class {ignored[0]}, now {ignored[1]}")
    differences += moved_classes(before.class_names, now.class_names)
    if before.grey != now.grey:
        differences.append(f"grey: {before.grey} then, {now.grey} now")
    return differences


def plain_name(name: str) -> str:
    """A name without case, spaces and punctuation; the name itself where nothing else is in it."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(character for character in folded if character.isalnum()) or name


def moved_classes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """A phrase for each class name (up to a few) that both lists have once, case, spaces and punctuation aside, and
    that stands for another id in the second."""
    old, new = ([plain_name(name) for name in names] for names in (before, now))
    shared = [name for name in old if old.count(name) == new.count(name) == 1]
    moved = [(now[new.index(name)], old.index(name), new.index(name)) for name in shared]
    return [f"classes: {name!r} was class {i}, now {j}" for name, i, j in moved if i != j][:_SHOWN]
