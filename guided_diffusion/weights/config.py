"""What a `config.json` must hold to be believed: its parts, and every setting in its type."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from ..data.json_text import parse_json
from ..settings import ConfigError, DataConfig, DiffusionConfig, ModelConfig, TrainConfig, as_setting
from .files import CheckpointError, exists, join, open_file

CONFIG_NAME = "config.json"

# A hub folder's config says nothing of data and training. None: a group whose values are checked where they are used.
_NEEDED = {"model": ModelConfig, "diffusion": DiffusionConfig}
_OPTIONAL = {"data": DataConfig, "training": TrainConfig, "dataset_json": None, "start": None}


def read_config(checkpoint: str, note: Callable[[str], None] | None = None) -> dict[str, Any] | None:
    """The config that stands beside a checkpoint; None where there is none (a published checkpoint), or that of another
    library, as `note` is told.

    :raises CheckpointError: it is there, but damaged (see `checked_config`).
    """
    path = join(os.path.dirname(checkpoint), CONFIG_NAME)
    if not exists(path):
        return None
    try:
        with open_file(path, "rb") as file:
            content = parse_json(file.read())
        if other := other_library(content):
            if note:
                note(f"{path} was written by another library ({other}), and is not read")
            return None
        return checked_config(content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the config of a training run ({type(error).__name__}: {error}); restore it, or remove it "
            "and give all flags"
        ) from error


def checked_config(content: Any) -> dict[str, Any]:
    """The parts of a config by name; those that are null are left out, as if they were not there.

    :raises KeyError: `model` or `diffusion` is missing. :raises TypeError: a part is no group of settings.
    :raises ValueError: a setting of another type. Their messages do not know the file: the caller names it.
    """
    if not isinstance(content, dict):
        raise TypeError("it is no JSON object")
    config = {name: part for name, part in content.items() if part is not None}
    for name, kind in (_NEEDED | _OPTIONAL).items():
        if name in config or name in _NEEDED:
            config[name] = _checked_part(name, kind, config[name])
    if "data" not in config and "dataset_json" in config:  # only data of one's own has that part
        config["data"] = {"dataset_mode": "custom"}
    return config


def other_library(content: Any) -> str:
    """The library whose model a `config.json` describes, where it is a known one other than this; else empty."""
    if not isinstance(content, dict) or any(content.get(name) for name in _NEEDED):
        return ""
    if "_class_name" in content or "_diffusers_version" in content:
        return f"diffusers ({content.get('_class_name', 'unnamed')})"
    if content.keys() & {"architectures", "model_type", "transformers_version"}:
        return f"transformers ({content.get('model_type', content.get('architectures', 'unnamed'))})"
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
