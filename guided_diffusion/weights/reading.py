"""Reading weights: ours, and those that other programs wrote."""

from __future__ import annotations

import pickle
from typing import Any

import safetensors
import safetensors.torch
import torch

from .files import CheckpointError, exists, open_file


def load(path: str) -> Any:
    """What `torch.save` wrote to `path` (local or a blobfile URL), on the CPU; only plain data is accepted. A
    .safetensors file is its tensors by name.

    :raises CheckpointError: missing, truncated, or no such file.
    """
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with open_file(path, "rb") as file:
            if path.endswith(".safetensors"):
                return safetensors.torch.load(file.read())
            return torch.load(file, map_location="cpu", weights_only=True)
    except (
        RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError, safetensors.SafetensorError
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({reason}). Was the copy or download cut short? Fetch it again."
        ) from error


def load_weights(path: str, key: str = "") -> dict[str, torch.Tensor]:
    """A network's state dict. :raises CheckpointError: see `load`; or it holds something else."""
    state = load(path)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a network's state dict (is it an opt file? use model or ema)")
    return state
