"""What a checkpoint calls its classes, by what lies beside it; and whether its network reads the instance edge."""

from __future__ import annotations

import os

from ..data.class_lists import recorded_classes
from ..data.specs import DATASET_MODES, get_spec, read_classes, read_dataset_json
from ..settings import ModelConfig
from . import store
from .class_map import without_meaning


def known_classes(checkpoint: str, layout_channels: int) -> tuple[tuple[str, ...], bool]:
    """The names of a checkpoint's classes ("class 0" and so on where they are not known), and whether its network reads
    the instance edge.

    From the config.json beside it, else from a dataset.json beside it, else from the benchmark that has as many.

    :param layout_channels: that its weights read.
    :raises CheckpointError: the number of classes is not to be found out, or what is recorded does not fit.
    """
    folder = os.path.dirname(checkpoint)
    config = store.read_config(checkpoint)
    if config is None:
        return _unrecorded_classes(checkpoint, layout_channels)
    source = f"{store.CONFIG_NAME} beside {checkpoint}"
    model = ModelConfig(**{k: v for k, v in config["model"].items() if k in ("num_classes", "no_instance")})
    if model.layout_channels() != layout_channels:
        raise store.CheckpointError(
            f"{checkpoint} reads {layout_channels} layout channels, but the {source} says {model.layout_channels()} "
            f"(num_classes {model.num_classes}, no_instance {model.no_instance}); they do not belong together"
        )
    found = recorded_classes(config, model.num_classes, source)
    names = found[0] if found else _generic(model.num_classes)
    if without_meaning(names):
        names = _names_beside(folder, model.num_classes) or names
    if without_meaning(names) and not (config.get("data") or {}).get("dataset_mode"):
        names = next((listed for listed in _benchmarks().values() if len(listed) == len(names)), names)
    return names, not model.no_instance


def _names_beside(folder: str, num_classes: int | None = None) -> tuple[str, ...] | None:
    """Those of a dataset.json in the checkpoint's folder; None where there is none. :raises DataError: it is wrong."""
    settings = read_dataset_json(folder or ".")
    if not settings.get("classes"):
        return None
    return get_spec("custom", None, num_classes, settings).class_names


def _unrecorded_classes(checkpoint: str, channels: int) -> tuple[tuple[str, ...], bool]:
    """For weights without a config: the names' number says whether the last channel is the edge."""
    folder = os.path.dirname(checkpoint)
    beside = _names_beside(folder)
    lists = {"dataset.json": beside} if beside else _benchmarks()
    for edge in (False, True):
        for names in lists.values():
            if len(names) + edge == channels:
                return names, edge
    counts = ", ".join(f"{name} {len(names)}" for name, names in lists.items())
    raise store.CheckpointError(
        f"{checkpoint} reads {channels} layout channels, and what they are is not recorded: there is no config.json "
        f"beside it, and no list of classes has so many, with or without the instance edge ({counts}); put a "
        'dataset.json beside it, {"classes": ["sky", "road", ...]}'
    )


def _benchmarks() -> dict[str, tuple[str, ...]]:
    """Class names by dataset mode; no two have as many, with or without the edge."""
    return {mode: read_classes(mode)[0] for mode in DATASET_MODES if mode != "custom"}


def _generic(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))
