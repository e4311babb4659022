"""Class names and colours beside a checkpoint: how a training records them, and what older records come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .specs import DATASET_MODES, DataError, DatasetSpec, get_spec, json_classes

CLASSES_KEY = "classes"  # of config.json


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
