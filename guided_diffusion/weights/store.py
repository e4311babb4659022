"""Checkpoints: their names, and how they are written, checked and found again.

A training run keeps, for each saved step, one set:
    model{step:06d}.pt  ema_{rate}_{step:06d}.pt ...  opt{step:06d}.pt  checkpoint{step:06d}.json
The last is the manifest, with the size and hash of the others; it is written after them, and a set without it, or
whose files differ from it, does not count. Beside the sets stand `model.pt` (the latest weights),
`ema_{rate}_best.pt` and `config.json`, which says how to build the network. Files are plain state dicts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO

import blobfile
import torch

from ..data.json_text import parse_json
from ..data.own_files import is_temporary, plain_names, temporary_path
from .config import checked_config

CONFIG_NAME = "config.json"
MODEL_NAME = "model.pt"
LOCK_NAME = ".lock"
_MANIFEST = re.compile(r"checkpoint(\d+)\.json$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and the remedy."""


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


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole or not at all.

    Written under a temporary name in the same folder, synced and renamed.
    :raises CheckpointError: the disk is full, the folder read-only, ...; `path` is as it was.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # torch.save turns a failed write into RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            raise CheckpointError(
                f"cannot write {path}: {error} (is the disk full or the folder read-only?); what was there is unharmed"
            ) from error
        raise


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, content: Any) -> None:
    """Writes `content` whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def publish(source: str, target: str) -> None:
    """Gives the file `source` the second name `target` at once: a hard link where the file system can, else a copy.

    :raises CheckpointError: `target` cannot be written; it is as it was.
    """
    temporary = temporary_path(target)
    try:
        os.link(source, temporary)
        # Onto another name of the same file a rename does nothing, and would leave the temporary name.
        if os.path.exists(target) and os.path.samefile(source, target):
            os.remove(temporary)
        else:
            os.replace(temporary, target)
        _sync_folder(os.path.dirname(target) or ".")
    except OSError:
        with open(source, "rb") as original, atomic_write(target) as copy:
            shutil.copyfileobj(original, copy)


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


def file_hash(path: str) -> str:
    """The SHA-256 of a file (local or a blobfile URL)."""
    digest = hashlib.sha256()
    with _open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


def lock(folder: str, flag: str = "logdir", look: bool = False) -> IO[str] | None:
    """Takes the folder for this process, as long as the returned file is open; None where locks are not to be had.

    :param flag: which gives the folder. :param look: only see whether another process has it; writes nothing.
    :raises CheckpointError: another process has it (the message names that process), or `.lock` is not a lock file.
    """
    try:
        import fcntl
    except ImportError:
        return None
    path = os.path.join(folder, LOCK_NAME)
    if look and not os.path.lexists(path):
        return None
    file = _open_lock(path, flag, look)
    try:
        # A record lock is the process's own: workers that outlive a killed run do not hold it.
        fcntl.lockf(file, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise CheckpointError(
            f"{folder} is in use by another run ({file.read().strip() or 'unknown'}): stop it, or give another --{flag}"
        ) from error
    except OSError:  # a file system without locks
        return None
    if look:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _open_lock(path: str, flag: str, look: bool) -> IO[str]:
    """The lock file, made where it is missing (not to `look`). What is there may be somebody's own file, by a link or
    by this very name: a CheckpointError then, as its content would be replaced."""
    refusal = CheckpointError(f"{path} is a link, or no lock file of ours: move it away, or give another --{flag}")
    if os.path.islink(path) or os.path.isdir(path):
        raise refusal
    access = os.O_RDONLY if look else os.O_RDWR | os.O_CREAT | os.O_APPEND
    descriptor = os.open(path, access | getattr(os, "O_NOFOLLOW", 0), 0o666)
    status, begin = os.fstat(descriptor), b"process "
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and os.read(descriptor, len(begin)) in (b"", begin):
        return os.fdopen(descriptor, "r" if look else "r+", encoding="utf-8")
    os.close(descriptor)
    raise refusal


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


# -- reading ----------------------------------------------------------------------------------------------------------


def manifest_steps(folder: str) -> list[int]:
    """The steps of all sets that have a manifest, in order."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(match.group(1)) for name in os.listdir(folder) if (match := _MANIFEST.fullmatch(name)))


def _open(path: str, mode: str) -> IO:
    """A file on this machine or, by blobfile, an object in a bucket (which takes a colon in a name for a URL)."""
    return blobfile.BlobFile(path, mode) if "://" in path else open(path, mode)


def exists(path: str) -> bool:
    """Whether there is such a file, local or a blobfile URL."""
    return blobfile.exists(path) if "://" in path else os.path.exists(path)


def read_json(path: str) -> dict[str, Any]:
    """The object that a JSON file holds; empty where there is none."""
    try:
        with _open(path, "rb") as file:
            content = parse_json(file.read())
    except (OSError, ValueError, blobfile.Error):
        return {}
    return content if isinstance(content, dict) else {}


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


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, local or a blobfile URL."""
    return blobfile.join(folder, name) if "://" in folder else os.path.join(folder, name)


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


def load(path: str) -> Any:
    """What `torch.save` wrote to `path` (local or a blobfile URL), on the CPU; only plain data is accepted.

    :raises CheckpointError: missing, truncated, or no such file.
    """
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with _open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({reason}). Was the copy or download cut short? Fetch it again."
        ) from error


def load_weights(path: str) -> dict[str, torch.Tensor]:
    """A network's state dict. :raises CheckpointError: see `load`; or it holds something else."""
    state = load(path)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a network's state dict (is it an opt file? use model or ema)")
    return state


def load_state_into(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Loads weights after checking every name and shape.

    :raises CheckpointError: says how the checkpoint differs from the network that the flags describe.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    differing = [
        f"{n}: {list(state[n].shape)} in the file, {list(own[n].shape)} in the network"
        for n in own.keys() & state.keys()
        if state[n].shape != own[n].shape
    ]
    if not (missing or extra or differing):
        # assign: a network on the meta device takes the tensors as they are
        model.load_state_dict(state, assign=next(model.parameters()).is_meta)
        return
    layout = "middle_block.0.in_norm.mlp_shared.0.weight"
    parts = []
    if layout in state and layout in own and state[layout].shape[1] != own[layout].shape[1]:
        parts.append(
            f"it was trained with {state[layout].shape[1]} layout channels, the flags give {own[layout].shape[1]} "
            "(num_classes, plus 1 unless no_instance is True)"
        )
    first = "input_blocks.0.0.weight"
    if first in state and state[first].shape != own[first].shape:
        parts.append(
            f"its first convolution has {state[first].shape[0]} channels, not {own[first].shape[0]} (num_channels)"
        )
    if missing:
        parts.append(f"{len(missing)} weights are missing, for example {missing[0]}")
    if extra:
        parts.append(f"{len(extra)} weights are not known to the network, for example {extra[0]}")
    if differing:
        parts.append(f"{len(differing)} shapes differ, for example {sorted(differing)[0]}")
    raise CheckpointError(f"{path} does not fit the network that the flags describe: {'; '.join(parts)}")


def read_config(checkpoint: str) -> dict[str, Any] | None:
    """The config that stands beside a checkpoint; None where there is none (a published checkpoint).

    :raises CheckpointError: it is there, but damaged (see `checked_config`).
    """
    path = join(os.path.dirname(checkpoint), CONFIG_NAME)
    if not exists(path):
        return None
    try:
        with _open(path, "rb") as file:
            return checked_config(parse_json(file.read()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the config of a training run ({type(error).__name__}: {error}); restore it, or remove it "
            "and give all flags"
        ) from error


def read_manifest(folder: str, step: int) -> dict[str, Any]:
    """The manifest of `step`; empty where there is none (a checkpoint of another program), or it is not one."""
    manifest = read_json(join(folder, manifest_name(step)))
    files = manifest.get("files")
    whole = isinstance(files, dict) and all(
        isinstance(file, dict) and type(file.get("size")) is int and isinstance(file.get("sha256"), str)
        for file in files.values()
    )
    return manifest if whole else {}


def recorded_config(logdir: str, resume_checkpoint: str) -> tuple[dict[str, Any] | None, str]:
    """The settings that a new start is bound to, and the file they stand in: those of the run in `logdir`, else those
    beside the checkpoint to start from, else none."""
    if manifest_steps(logdir):
        return read_config(os.path.join(logdir, MODEL_NAME)), os.path.join(logdir, CONFIG_NAME)
    if resume_checkpoint:
        if not exists(resume_checkpoint):
            raise CheckpointError(f"there is no checkpoint {resume_checkpoint} (--resume_checkpoint)")
        return read_config(resume_checkpoint), f"{CONFIG_NAME} beside {resume_checkpoint}"
    return None, ""
