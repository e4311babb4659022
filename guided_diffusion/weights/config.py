"""What a `config.json` must hold to be believed: its parts, and every setting in its type."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..settings import ConfigError, DataConfig, DiffusionConfig, ModelConfig, TrainConfig, as_setting

# A hub folder's config says nothing of data and training. None: a group whose values are checked where they are used.
_NEEDED = {"model": ModelConfig, "diffusion": DiffusionConfig}
_OPTIONAL = {"data": DataConfig, "training": TrainConfig, "dataset_json": None, "start": None}


def checked_config(content: Any) -> dict[str, Any]:
    """The parts of a config by name; those that are null are left out, as if they were not there.

    :raises KeyError: `model` or `diffusion` is missing. :raises TypeError: a part is no group of settings.
    :raises ValueError: a setting of another type. Their messages do not know the file: the caller names it.
    """
    if not isinstance(content, dict):
        raise TypeError("it is no JSON object")
    if library := other_library(content):
        raise ValueError(f"it describes a model of {library}")
    config = {name: part for name, part in content.items() if part is not None}
    for name, kind in (_NEEDED | _OPTIONAL).items():
        if name in config or name in _NEEDED:
            config[name] = _checked_part(name, kind, config[name])
    if "data" not in config and "dataset_json" in config:  # only data of one's own has that part
        config["data"] = {"dataset_mode": "custom"}
    return config


def other_library(content: Any) -> str:
    """The library whose model a `config.json` describes, where it is a known one other than this; else empty."""
    if not isinstance(content, dict):
        return ""
    if "_class_name" in content or "_diffusers_version" in content:
        return f"diffusers ({content.get('_class_name', 'unnamed')})"
    if "architectures" in content or "model_type" in content:
        return f"transformers ({content.get('model_type', content.get('architectures'))})"
    return ""


def _checked_part(name: str, kind: type | None, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise TypeError(f"{name} is {part!r}, not a group of settings")
    part = dict(part)
    for field in dataclasses.fields(kind) if kind else ():
        if field.name in part:
            try:
                part[field.name] = as_setting(field.name, field.default, part[field.name])
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from None
    return part
