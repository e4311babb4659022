"""Checkpoints: their names, and how they are written, checked and found again.

A training run keeps, for each saved step, one set:
    model{step:06d}.pt  ema_{rate}_{step:06d}.pt ...  opt{step:06d}.pt  checkpoint{step:06d}.json
The last is the manifest, with the size and hash of the others; it is written after them, and a set without it, or
whose files differ from it, does not count. Beside the sets stand `model.pt` (the latest weights),
`ema_{rate}_best.pt` and `config.json`, which says how to build the network. Files are plain state dicts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from typing import Any

import blobfile
import torch

from ..data.own_files import is_temporary, plain_names
from .atomic import atomic_write, publish, write_json
from .config import CONFIG_NAME, read_config
from .files import CheckpointError, exists, file_hash, join, read_json
from .fitting import load_state_into
from .folder_lock import LOCK_NAME, lock
from .reading import load, load_weights

__all__ = [  # what callers know as the store's, wherever in this room it is written
    "CONFIG_NAME",
    "LOCK_NAME",
    "MODEL_NAME",
    "CheckpointError",
    "atomic_write",
    "check_vacant",
    "damage",
    "ema_name",
    "exists",
    "file_hash",
    "join",
    "load",
    "load_state_into",
    "load_weights",
    "lock",
    "manifest_name",
    "manifest_steps",
    "model_name",
    "newest_complete",
    "note_divergence",
    "optimizer_name",
    "prune",
    "publish",
    "read_config",
    "read_json",
    "read_manifest",
    "recorded_config",
    "remove_leftovers",
    "save_set",
    "step_of",
    "write_json",
]

MODEL_NAME = "model.pt"
_MANIFEST = re.compile(r"checkpoint(\d+)\.json$")


# -- names ------------------------------------------------------------------------------------------------------------


def model_name(step: int) -> str:
    return f"model{step:06d}.pt"


def ema_name(rate: str, step: int | str) -> str:
    return f"ema_{rate}_{step if isinstance(step, str) else f'{step:06d}'}.pt"


def optimizer_name(step: int) -> str:
    return f"opt{step:06d}.pt"


def manifest_name(step: int) -> str:
    return f"checkpoint{step:06d}.json"


def step_of(path: str) -> int | None:
    """The step in a name like .../model010000.pt; None for model.pt, which has none."""
    match = re.fullmatch(r"model(\d+)\.pt", os.path.basename(path))
    return int(match.group(1)) if match else None


# -- writing ----------------------------------------------------------------------------------------------------------


def save_set(folder: str, step: int, contents: dict[str, Callable[[], Any]], manifest: dict[str, Any]) -> None:
    """Writes `contents` (file name -> function that makes an object for `torch.save`) and then the manifest of `step`.

    :param manifest: what else it shall hold.
    :raises CheckpointError: nothing of this set counts, and its files are removed; older sets are unharmed.
    """
    manifest_path = os.path.join(folder, manifest_name(step))
    files = {}
    # Names what is being written, so that the next start can remove what a kill leaves of it.
    intent = os.path.join(folder, f".{manifest_name(step)}.part")
    with contextlib.suppress(OSError), open(intent, "w", encoding="utf-8") as file:
        json.dump({"files": list(contents)}, file)
    try:
        for name, content in contents.items():
            path = os.path.join(folder, name)
            made = content()
            with atomic_write(path) as file:
                torch.save(made, file)
            files[name] = {"size": os.path.getsize(path), "sha256": file_hash(path)}
        write_json(manifest_path, {"step": step, "files": files, **manifest})
    except BaseException:
        for path in (manifest_path, *(os.path.join(folder, name) for name in contents)):
            with contextlib.suppress(OSError):
                os.remove(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(intent)


def prune(folder: str, keep: int, newest: int) -> None:
    """Removes the sets before the `keep` that end with step `newest`; 0 keeps all.

    `model.pt` and the best EMAs are names of their own and stay; so do later sets (damaged ones that the run passed
    over), which must not count among the kept.
    """
    steps = [step for step in manifest_steps(folder) if step <= newest]
    for step in steps[:-keep] if keep > 0 else []:
        names = _set_files(read_json(join(folder, manifest_name(step))), step)
        # The manifest first, as a set that is half removed must not count; it stays as the note of what is to go.
        note = os.path.join(folder, f".{manifest_name(step)}.part")
        os.replace(os.path.join(folder, manifest_name(step)), note)
        for path in (*(os.path.join(folder, name) for name in names), note):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _set_files(manifest: dict[str, Any], step: int) -> list[str]:
    """The names in a manifest, or in the note of a save that has begun, that can be files of the set of `step`: a
    manifest that was edited must not have files removed that no save wrote, here or in another folder."""
    return [name for name in plain_names(manifest.get("files")) if re.fullmatch(rf".*\D{step:06d}\.pt", name)]


def remove_leftovers(folder: str) -> None:
    """Removes what writers that were killed have left: temporary files, and the files of a set without its manifest. A
    folder that is not there has none."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        manifest = name.removeprefix(".").removesuffix(".part")
        match = _MANIFEST.fullmatch(manifest) if name == f".{manifest}.part" else None
        if match:
            begun = {} if os.path.exists(os.path.join(folder, manifest)) else read_json(os.path.join(folder, name))
            for part in _set_files(begun, int(match.group(1))):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(folder, part))
        if match or is_temporary(name):  # those of atomic_write and of save_png
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


# -- finding ----------------------------------------------------------------------------------------------------------


def manifest_steps(folder: str) -> list[int]:
    """The steps of all sets that have a manifest, in order."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(match.group(1)) for name in os.listdir(folder) if (match := _MANIFEST.fullmatch(name)))


def damage(folder: str, step: int, whole: bool = True) -> str | None:
    """What is wrong with the set of `step`; None where it is complete.

    :param whole: False for a set of another run, of which parts, or the manifest, may have been left behind.
    """
    manifest = read_manifest(folder, step)
    if "files" not in manifest:
        return f"{manifest_name(step)} cannot be read" if whole else None
    for name, expected in manifest["files"].items():
        path = join(folder, name)
        try:
            if not exists(path):
                if not whole:
                    continue
                return f"{name} is missing"
            size = blobfile.stat(path).size if "://" in path else os.path.getsize(path)
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if file_hash(path) != expected["sha256"]:
                return f"the content of {name} has changed since it was saved"
        except (OSError, blobfile.Error) as error:
            return f"{name} cannot be read: {error}"
    return None


def newest_complete(folder: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The manifest of the newest set in `folder` that is whole; None where there is none.

    Damaged ones are passed over with a warning that names what is wrong; so are those of a training that had diverged,
    where there is an older one.
    """
    diverged = None
    for step in reversed(manifest_steps(folder)):
        problem = damage(folder, step)
        manifest = read_manifest(folder, step) | {"step": step}
        if problem is not None:
            warn(f"warning: the checkpoint of step {step} in {folder} is damaged ({problem}); trying the one before")
        elif manifest.get("diverged"):
            warn(f"note: when step {step} was saved in {folder}, the training was diverging; trying the one before")
            diverged = diverged or manifest
        else:
            return manifest
    return diverged


def note_divergence(folder: str) -> int | None:
    """Notes in the manifests of the sets since the last good one that training diverged. Returns its step; None: there
    is none.

    :raises CheckpointError: one cannot be written.
    """
    for step in reversed(manifest_steps(folder)):
        manifest = read_manifest(folder, step)
        if manifest and manifest.get("good", True):
            return step
        if manifest:
            write_json(os.path.join(folder, manifest_name(step)), manifest | {"diverged": True})
    return None


def check_vacant(folder: str) -> None:
    """:raises CheckpointError: a new run in `folder` would write over the weights of another one."""
    if steps := manifest_steps(folder):
        raise CheckpointError(
            f"no checkpoint in {folder} is whole, and a new run would replace its weights: restore the files that the "
            f"warnings name, or give another --logdir, with --resume_checkpoint {join(folder, model_name(steps[-1]))} "
            "or any other weights that are left (files beside it that are missing start fresh)"
        )
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if foreign := [name for name in names if name == MODEL_NAME or re.fullmatch(r"ema_.*_best\.pt", name)]:
        raise CheckpointError(
            f"{folder} holds {', '.join(foreign)}, but no manifest ({manifest_name(0)} or later) of a run that could "
            "go on: a new run would replace these weights; give another --logdir"
        )


def read_manifest(folder: str, step: int) -> dict[str, Any]:
    """The manifest of `step`; empty where there is none (a checkpoint of another program), or it is not one."""
    manifest = read_json(join(folder, manifest_name(step)))
    files = manifest.get("files")
    whole = isinstance(files, dict) and all(
        isinstance(file, dict) and type(file.get("size")) is int and isinstance(file.get("sha256"), str)
        for file in files.values()
    )
    return manifest if whole else {}


def recorded_config(
    logdir: str, resume_checkpoint: str, note: Callable[[str], None] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """The settings that a new start is bound to, and the file they stand in: those of the run in `logdir`, else those
    beside the checkpoint to start from, else none."""
    if manifest_steps(logdir):
        return read_config(os.path.join(logdir, MODEL_NAME)), os.path.join(logdir, CONFIG_NAME)
    if resume_checkpoint:
        if not exists(resume_checkpoint):
            raise CheckpointError(f"there is no checkpoint {resume_checkpoint} (--resume_checkpoint)")
        return read_config(resume_checkpoint, note), f"{CONFIG_NAME} beside {resume_checkpoint}"
    return None, ""
