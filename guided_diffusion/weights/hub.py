"""A network that is handed on: a folder with weights, config, model card and example, on a disk or on a hub.

    model.safetensors  config.json  README.md  example.png  example_layout.png (example_instances.png)

`config.json` is that of a training run (`config.checked_config`), without what concerns that run alone, and with
`library_name` and `format`, by which it is known as ours. A hub is reached through `huggingface_hub`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from ..data.class_lists import CLASSES_KEY
from ..data.json_text import parse_json
from ..data.own_files import temporary_path
from ..settings import DiffusionConfig, ModelConfig
from . import store
from .atomic import sync
from .config import other_library
from .store import CheckpointError

WEIGHTS_NAME = "model.safetensors"
LIBRARY = "semantic-diffusion-model"
FORMAT = 1
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def folder_config(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    record: Mapping[str, Any],
    *,
    names: Sequence[str] | None,
    palette: np.ndarray | None,
    grey: bool,
    precision: str,
) -> dict[str, Any]:
    """The content of a folder's `config.json`.

    :param record: the config of the training. What its ids mean (`dataset_json`, the mode) goes along, and whether it
        dropped layouts; its folders and the rest of its settings do not.
    :param names: of the classes, with their colours uint8 [num_classes, 3] in `palette`; None where unknown.
    :param precision: to be used; empty: any.
    """
    config: dict[str, Any] = {"library_name": LIBRARY, "format": FORMAT}
    config |= {"precision": precision} if precision else {}
    # How the training was made to fit, and which steps were sampled, is no property of what is handed on.
    config["model"] = dataclasses.asdict(dataclasses.replace(model, use_fp16=False, use_checkpoint=False))
    config["diffusion"] = dataclasses.asdict(dataclasses.replace(diffusion, timestep_respacing=""))
    for group, name in (("data", "dataset_mode"), ("training", "drop_rate")):
        if name in (record.get(group) or {}):
            config[group] = {name: record[group][name]}
    meaning = record.get("dataset_json")
    if meaning is not None or grey:
        config["dataset_json"] = {**(meaning or {}), **({"grey": True} if grey else {})}
    if names is not None and palette is not None:
        colors = palette.tolist()
        config[CLASSES_KEY] = [{"name": n, "color": c} for n, c in zip(names, colors, strict=True)]
    return config


# -- writing ----------------------------------------------------------------------------------------------------------


def vacant(folder: str | os.PathLike) -> str:
    """The real path of a folder that is not there yet, or empty. :raises CheckpointError: it is neither."""
    path = os.path.realpath(folder)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path} is a file; name a new folder for the model")
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    if WEIGHTS_NAME in names:
        raise CheckpointError(f"{path} holds another model ({WEIGHTS_NAME}): give a new folder, or remove that one")
    if names:
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        raise CheckpointError(f"{path} holds {', '.join(names[:3])}{more}: give a new or an empty folder for the model")
    return path


def write_folder(
    folder: str, weights: Mapping[str, torch.Tensor], config: dict[str, Any], others: Mapping[str, Callable[[IO], Any]]
) -> None:
    """Makes the folder, whole or not at all: under another name beside it, which is then its own.

    :param weights: of any floating-point type; written as float32. :param others: by name, what writes each file.
    :raises CheckpointError: it cannot be written, or holds something.
    """
    path = vacant(folder)
    temporary = temporary_path(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(temporary)
        with open(os.path.join(temporary, store.CONFIG_NAME), "x", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(tensors, os.path.join(temporary, WEIGHTS_NAME), metadata={"format": "pt"})
        # The library makes files for their owner alone.
        shutil.copymode(os.path.join(temporary, store.CONFIG_NAME), os.path.join(temporary, WEIGHTS_NAME))
        for name, write in others.items():
            with open(os.path.join(temporary, name), "xb") as file:
                write(file)
        for name in (*os.listdir(temporary), os.curdir, os.pardir):
            sync(os.path.join(temporary, name))
        os.rename(temporary, path)  # onto an empty folder at most
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        if isinstance(error, (OSError, safetensors.SafetensorError)):
            raise CheckpointError(
                f"cannot write {path}: {error} (is the disk full or the folder read-only?); nothing was left there"
            ) from error
        raise


# -- reading ----------------------------------------------------------------------------------------------------------


def locate(source: str | os.PathLike, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """The weights' file of a folder, or of a repository on a hub (fetched into its cache), and the folder's config.

    :param revision: a branch, tag or commit of the repository.
    :raises CheckpointError: there is no such folder or repository, it cannot be reached, or is not of this project.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        raise CheckpointError(f"{source} is a file: give its folder, or use SDMPipeline.from_checkpoint")
    if os.path.isdir(source):
        if revision:
            raise CheckpointError(f"{source} is a folder, which has no revision {revision!r}: leave the revision out")
        config = os.path.join(source, store.CONFIG_NAME)
        return os.path.join(source, WEIGHTS_NAME), folder_config_of(config, f"the folder {source}")
    if not _HUB_ID.fullmatch(source) or set(source) == {"."}:
        raise CheckpointError(f"there is no folder {source}, and it is no id of a model on a hub (OWNER/NAME)")
    where = f"{source} (no folder here, so taken for a model on a hub)"
    # The config first: a model of another kind is refused before its weights are fetched.
    config = _fetch(source, store.CONFIG_NAME, revision, where)
    content = folder_config_of(config, where)
    commit = os.path.basename(os.path.dirname(config))  # the weights of that very commit, whatever is pushed meanwhile
    return _fetch(source, WEIGHTS_NAME, commit, where), content


def folder_config_of(path: str, where: str) -> dict[str, Any]:
    """The config of a folder that was handed on. :raises CheckpointError: it is missing, damaged or another's."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{where} has no {store.CONFIG_NAME}; is it a model of this project?")
    with open(path, "rb") as file, contextlib.suppress(ValueError):  # what is no JSON is refused below
        if library := other_library(parse_json(file.read())):
            raise CheckpointError(f"{where} is a model of {library}, not of this project: use that library")
    config = store.read_config(path) or {}
    if config.get("library_name") != LIBRARY:
        raise CheckpointError(
            f"{where} is no folder that was handed on (no library_name {LIBRARY} in its {store.CONFIG_NAME}). If it is "
            "the log directory of a training: SDMPipeline.from_checkpoint(... its ema_*_best.pt), or "
            "scripts/export_model.py makes such a folder of it"
        )
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{where} has format {config.get('format')!r}, and this version of the package knows {FORMAT}: update it"
        )
    return config


# -- hubs -------------------------------------------------------------------------------------------------------------


def library() -> ModuleType:
    """`huggingface_hub`. :raises CheckpointError: it is not installed."""
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError(
            'models on a hub need the package huggingface_hub: pip install "huggingface_hub", or this project\'s '
            "extra [hub]; a folder needs nothing"
        ) from error
    return huggingface_hub


def _fetch(source: str, name: str, revision: str | None, where: str) -> str:
    hub = library()
    try:
        return hub.hf_hub_download(source, name, revision=revision, library_name=LIBRARY)
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{where}: {name} cannot be fetched ({type(error).__name__}: {reason}). Is the name right, and is the hub "
            "within reach? A private model needs `hf auth login`; with HF_HUB_OFFLINE=1 only what was fetched before "
            "is there."
        ) from error


def check_repository(repo_id: str) -> None:
    """:raises CheckpointError: no id of a model on a hub, or no library to reach one."""
    if not _HUB_ID.fullmatch(repo_id) or os.path.isdir(repo_id):
        raise CheckpointError(f"{repo_id!r} is no id of a model on a hub (OWNER/NAME, and no folder here)")
    library()


def push_folder(folder: str, repo_id: str, *, private: bool | None, message: str) -> str:
    """Uploads the folder as one commit; makes the repository where it is missing. Returns the commit's address.

    :raises CheckpointError: the hub cannot be reached, or refuses.
    """
    hub = library()
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{repo_id} cannot be pushed ({type(error).__name__}: {reason}). `hf auth login`, or HF_TOKEN, with the "
            "right to write there?"
        ) from error
    return commit.commit_url
