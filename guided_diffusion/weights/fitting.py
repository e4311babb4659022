"""Whether weights fit a network, name by name and shape by shape."""

from __future__ import annotations

import torch

from .architecture import FIRST, LAYOUT, check_family
from .files import CheckpointError


def load_state_into(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Loads weights after checking every name and shape.

    :raises CheckpointError: says how the checkpoint differs from the network that the flags describe.
    """
    own = model.state_dict()
    # In the order of the network: the first that differs tells most.
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    differing = [
        f"{n}: {list(state[n].shape)} in the file, {list(own[n].shape)} in the network"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if not (missing or extra or differing):
        # assign: a network on the meta device takes the tensors as they are
        model.load_state_dict(state, assign=next(model.parameters()).is_meta)
        return
    if LAYOUT in own:
        check_family(state, path)
    parts = []
    if LAYOUT in own and state[LAYOUT].shape[1] != own[LAYOUT].shape[1]:
        parts.append(
            f"it was trained with {state[LAYOUT].shape[1]} layout channels, the flags give {own[LAYOUT].shape[1]} "
            "(num_classes, plus 1 unless no_instance is True)"
        )
    if FIRST in own and state[FIRST].shape != own[FIRST].shape:
        parts.append(
            f"its first convolution has {state[FIRST].shape[0]} channels, not {own[FIRST].shape[0]} (num_channels)"
        )
    if missing:
        parts.append(f"{len(missing)} weights are missing, the first is {missing[0]}")
    if extra:
        parts.append(f"{len(extra)} weights are not known to the network, the first is {extra[0]}")
    if differing:
        parts.append(f"{len(differing)} shapes differ, the first is {differing[0]}")
    raise CheckpointError(f"{path} does not fit the network that the flags describe: {'; '.join(parts)}")
