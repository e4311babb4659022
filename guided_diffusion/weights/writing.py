"""Writing weights as safetensors: plain tensors and text, which no reader can be made to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch


def write_safetensors(file: BinaryIO, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a state dict and the metadata, and waits until the disk has them (a full one shows by then).

    :param file: of `atomic.atomic_write`. :raises OSError: the disk is full, ...
    """
    plain, seen = {}, set()
    for name, value in state.items():
        storage = value.untyped_storage()
        # The format knows no views: tensors that lie in one storage, or in a part of one, become their own.
        whole = value.is_contiguous() and storage.nbytes() == value.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        plain[name] = value.detach() if whole else value.detach().clone(memory_format=torch.contiguous_format)
    file.write(safetensors.torch.save(plain, {"format": "pt", **metadata}))
    file.flush()
    os.fsync(file.fileno())


def read_metadata(path: str) -> dict[str, str]:
    """The metadata of a local safetensors file; empty where it is none."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return {}
