"""The ranks of a run have one command between them."""

from __future__ import annotations

from typing import Any

from ..dist_util import World
from ..settings import ConfigError


def check_same_flags(world: World, flags: dict[str, Any]) -> None:
    """Before anything else that the ranks do together, as one that ends sooner would keep the others waiting. A
    collective.

    :param flags: what this rank's command gave, by name.
    :raises ConfigError: on all ranks, where one of them was given something else than rank 0 was.
    """
    first, *others = world.gather({name: repr(value) for name, value in flags.items()})
    for rank, other in enumerate(others, start=1):
        for name in (*first, *(name for name in other if name not in first)):
            ours, theirs = (f"--{name} {given[name]}" if name in given else "none" for given in (first, other))
            if ours != theirs:
                raise ConfigError(
                    f"the ranks were started with different settings: of {name}, rank 0 has {ours} and rank {rank} has "
                    f"{theirs}; give all ranks the same command"
                )
