"""Finding a network's weights in what a training program saved: below the names of wrappers, beside other things."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .files import CheckpointError

ANCHOR = "input_blocks.0.0.weight"  # every U-Net of this family has it
# What PyTorch's wrappers put into names: DistributedDataParallel and averages; torch.compile; sharding; recomputation.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WITHIN = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, _WRAPPERS[1:]))})")
_DEEPEST = 4  # levels of wrappers
_SHOWN = 6


class SeveralWeightsError(CheckpointError):
    """A file holds several networks' weights, and none of them was chosen. `names`: what they are called."""

    def __init__(self, message: str, names: tuple[str, ...]):
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Found:
    """One network's weights in a file: where, under which prefix, and whether the names are those of our family."""

    name: str  # what --weights_key calls it
    place: tuple[str, ...]  # the wrappers that it is in
    state: dict[str, torch.Tensor]
    family: bool
    steps: tuple[str, ...] = ()  # what was unwrapped, in words
    beside: tuple[str, ...] = ()  # names of what the same place holds and no network needs


def unwrap(content: Any, path: str, key: str = "") -> tuple[dict[str, torch.Tensor], str]:
    """The weights in `content`, the content of the file `path`, and in words what was unwrapped (empty: nothing).

    :param key: the name of one of several, as the error lists them.
    :raises CheckpointError: there is none. :raises SeveralWeightsError: there are several, and `key` names none of
        them.
    """
    found = list(_walk(content))
    found = [one for one in found if one.family] or found
    if not found:
        raise CheckpointError(
            f"{path} does not hold a network's state dict{_held(content)} (is it an opt file? use model or ema)"
        )
    names = [one.name for one in found]
    if key:
        found = [one for one in found if one.name == key]
    if len(found) != 1:
        if names == ["."]:
            raise CheckpointError(f"{path} holds one network's weights and no {key!r}: leave weights_key out")
        raise SeveralWeightsError(
            f"{path} holds {'no ' + repr(key) if key else 'several sets of weights'}: choose one of "
            f"{', '.join(names)} with --weights_key NAME (weights_key= in Python); the averaged ones make the better "
            "pictures",
            tuple(names),
        )
    (one,) = found
    beside = [*one.beside, *(str(name) for name in content if str(name) != one.place[0])] if one.place else one.beside
    left = ", ".join(beside[:_SHOWN]) + (f" and {len(beside) - _SHOWN} more" if len(beside) > _SHOWN else "")
    return one.state, "; ".join([*one.steps, *([f"left out {left}"] if left else [])])


def _walk(part: Any, place: tuple[str, ...] = ()) -> Iterator[Found]:
    part = _as_mapping(part)
    if part is None or len(place) > _DEEPEST or "param_groups" in part:  # the last: an optimizer's state
        return
    tensors = {
        _WITHIN.sub("", name): value
        for name, value in part.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    prefixes = {name[: -len(ANCHOR)] for name in tensors if name == ANCHOR or name.endswith(f".{ANCHOR}")}
    inside = any(_WITHIN.search(name) for name in part if isinstance(name, str))
    if prefixes:
        yield from _families(part, tensors, prefixes, place, inside)
    elif tensors and len(tensors) == len(part):
        prefix = ""
        while all(name.startswith(f"{prefix}module.") for name in tensors):
            prefix += "module."
        state = {name[len(prefix) :]: value for name, value in tensors.items()}
        yield Found(".".join(place) or ".", place, state, False, _steps(place, prefix, inside))
    for name, child in part.items():
        if not isinstance(child, torch.Tensor):
            yield from _walk(child, (*place, str(name)))


def _families(part, tensors, prefixes, place, inside) -> Iterator[Found]:
    """One network for each prefix of names in one mapping."""

    def owner(name: str) -> str | None:
        return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)

    owners = {name: owner(name) for name in tensors}
    beside = [name for name, prefix in owners.items() if prefix is None]
    beside += [str(name) for name, value in part.items() if not isinstance(value, torch.Tensor)]
    for prefix in sorted(prefixes):
        state = {name[len(prefix) :]: value for name, value in tensors.items() if owners[name] == prefix}
        told = [word for word in prefix.split(".") if word and f"{word}." not in _WRAPPERS]
        name = ".".join([*place, *told]) or "."
        others = [f"{other}*" for other in sorted(prefixes) if other != prefix]
        yield Found(name, place, state, True, _steps(place, prefix, inside), (*beside, *others))


def _steps(place: tuple[str, ...], prefix: str, inside: bool) -> tuple[str, ...]:
    steps = [f"took the weights under {'.'.join(place)}"] if place else []
    steps += [f"took the prefix {prefix} off their names"] if prefix else []
    steps += ["took the names of PyTorch's wrappers out of theirs"] if inside else []
    return tuple(steps)


def _as_mapping(part: Any) -> Mapping[Any, Any] | None:
    """What a part of a file holds, by name; None: nothing that could hold weights."""
    if isinstance(part, torch.nn.Module):
        return part.state_dict()
    if isinstance(part, Mapping):
        return _module_state(part) if "_parameters" in part and "_modules" in part else part
    if isinstance(part, (list, tuple)) and not isinstance(part, torch.Size):
        return dict(enumerate(part))
    if isinstance(part, (str, bytes, int, float, type(None), torch.Tensor, type)):
        return None
    return getattr(part, "__dict__", None)


def _module_state(module: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The state dict of a module of which only the attributes are left (see `pickled_objects.StandIn`)."""
    state = {}
    for kind in ("_parameters", "_buffers"):
        entries = module.get(kind)
        state |= {n: v for n, v in entries.items() if v is not None} if isinstance(entries, Mapping) else {}
    children = module["_modules"] if isinstance(module["_modules"], Mapping) else {}
    for name, child in children.items():
        if isinstance(child, Mapping) and "_parameters" in child and "_modules" in child:
            state |= {f"{name}.{below}": value for below, value in _module_state(child).items()}
    return state


def _held(content: Any) -> str:
    if isinstance(content, Mapping):
        names = [str(name) for name in content]
        return f", but {', '.join(names[:_SHOWN])}" if names else ", but nothing"
    return f", but a {type(content).__name__}"
