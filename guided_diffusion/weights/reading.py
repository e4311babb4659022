"""Reading weights, whatever file they are in: ours, and those that other programs wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import blobfile
import safetensors
import safetensors.torch
import torch

from .file_kinds import SAFETENSORS, ZIP, check_archive, check_path, kind_of, why_unreadable
from .files import CheckpointError, exists, open_file
from .unwrapping import unwrap

Note = Callable[[str], None]
WEIGHTS = torch.float32


def load(path: str, read: Callable[[IO[bytes]], Any] | None = None) -> Any:
    """What torch.save wrote to `path` (local or a blobfile URL), or the tensors of a safetensors file, on the CPU; the
    content says which of both, not the name. Only plain data is accepted.

    :param read: reads a file of torch.save in another way.
    :raises CheckpointError: there is no such file; or it is truncated, damaged or something else; or it holds objects.
    """
    check_path(path)
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with open_file(path, "rb") as file:
            kind = kind_of(file, path)
            if kind == SAFETENSORS:
                return _load_safetensors(file, path)
            if kind == ZIP:
                check_archive(file, path)
            content, error = _attempt(read or _load_plain, file)
            if error is None:
                return content
            # Not in the handler of that error: PyTorch's advice to switch its protection off would be shown with it.
            raise why_unreadable(path, kind, error)
    except (OSError, blobfile.Error) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load_plain(file: IO[bytes]) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _attempt(read: Callable[[IO[bytes]], Any], file: IO[bytes]) -> tuple[Any, Exception | None]:
    try:
        return read(file), None
    except CheckpointError:
        raise
    except Exception as error:  # a file can be broken in any way; a length that it gives can exceed all memory
        return None, error


def _load_safetensors(file: IO[bytes], path: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(file.read()) if "://" in path else safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error


def load_weights(path: str, key: str = "", note: Note | None = None) -> dict[str, torch.Tensor]:
    """A network's state dict, in float32 on the CPU.

    Weights below the names of wrappers (`module.`, `{"state_dict": ...}` and the like) are found there; those in
    another floating-point type are converted.

    :param key: which of several, as the error lists them. :param note: is told in one line what was done.
    :raises CheckpointError: see `load`; or it holds something else, several of them, or values that are not finite.
    """
    return plain_weights(load(path), path, key, note)


def plain_weights(content: Any, path: str, key: str = "", note: Note | None = None) -> dict[str, torch.Tensor]:
    """`load_weights`, of a content that has been read already."""
    state, done = unwrap(content, path, key)
    steps = [done] if done else []
    kinds = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    for name, value in state.items():
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            what = "no values" if value.is_meta else f"{kinds[name]} values" + " in a sparse form" * value.is_sparse
            raise CheckpointError(f"{path}: {name} has {what}, and weights are floating-point numbers")
    if other := sorted({kind for kind in kinds.values() if kind != "float32"}):
        steps.append(f"converted {' and '.join(other)} to float32")
    state = {name: value.detach().to(WEIGHTS) for name, value in state.items()}
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        count = int((~torch.isfinite(state[broken[0]])).sum())
        raise CheckpointError(
            f"{path}: {count} of the {state[broken[0]].numel()} values of {broken[0]} are not finite"
            f"{f' (and some of {len(broken) - 1} other weights)' * (len(broken) > 1)}: the training that wrote it had "
            "diverged, or its numbers left their type's range; take an earlier checkpoint"
        )
    if note and steps:
        note(f"{path}: {'; '.join(steps)}")
    return state
