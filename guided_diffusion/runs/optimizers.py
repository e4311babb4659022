"""The optimizer of a training, whole in every rank or spread over them: made, read from a file, gathered for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..dist_util import World


def make_optimizer(
    parameters: list[torch.nn.Parameter], *, lr: float, weight_decay: float, shard: bool, world: World
) -> torch.optim.Optimizer:
    """AdamW with fused kernels; with `shard` and several ranks, each keeps a part of its state."""
    options = dict(lr=lr, weight_decay=weight_decay, fused=True)
    if shard and world.size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here, as importing it takes seconds

        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **options)
    return torch.optim.AdamW(parameters, **options)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, with every average in the memory layout of its parameter.

    The fused kernels read both as flat memory: with layouts that differ they would pair the wrong elements. Which
    kernels are used stays as it was: a file of another program names none, and the default's would be slow.
    """
    kernels = [{key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, kernels, strict=True):
        group.update(kept)
    # ZeroRedundancyOptimizer keeps what it works with in an optimizer of its own, and a second copy beside it.
    sharded = hasattr(optimizer, "optim")
    if sharded:
        optimizer.state.clear()
    for parameter, values in (optimizer.optim if sharded else optimizer).state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
            else:  # the step count
                values[name] = value.to(parameter.device)


def is_spread(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each rank has a part of its state only."""
    return hasattr(optimizer, "consolidate_state_dict")


@contextlib.contextmanager
def gathered(optimizer: torch.optim.Optimizer, world: World) -> Iterator[None]:
    """Within it, `optimizer.state_dict()` is whole on rank 0, also where it is spread over the ranks. A collective.

    In place of ZeroRedundancyOptimizer's `consolidate_state_dict`, which sends each part to every GPU in one piece, and
    while packing it keeps the interpreter from anything else: for minutes at the published size, in which the rank
    would pass for dead.
    """
    sharded = is_spread(optimizer)
    if sharded:
        optimizer._all_state_dicts = world.collect_trees(to_cpu(optimizer.optim.state_dict()))
    yield
    if sharded:
        optimizer._all_state_dicts = []


def to_cpu(tree: Any) -> Any:
    """Nested dicts and lists with their tensors copied to the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu().contiguous()
    if isinstance(tree, dict):
        return {key: to_cpu(value) for key, value in tree.items()}
    return [to_cpu(value) for value in tree] if isinstance(tree, list) else tree
