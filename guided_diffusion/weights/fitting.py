"""Whether weights fit a network, name by name and shape by shape."""

from __future__ import annotations

import torch

from .architecture import LAYOUT, check_family
from .files import CheckpointError


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
    if LAYOUT in own:
        check_family(state, path)
    parts = []
    layout = LAYOUT
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
