"""Pickled Python objects in checkpoints: which ones, and what they hold, without running any of their code.

A pickle names functions and classes, and calls them as it is read. Here they are only listed (`globals_in`), or inert
objects stand in for them (`load_inert`): they keep what the pickle would have given to the real ones.
"""

from __future__ import annotations

import _codecs
import collections
import functools
import io
import pickle
import pickletools
import re
import types
from typing import IO, Any

import torch

from .files import CheckpointError

# What plain tensors and containers are pickled with.
_PLAIN = re.compile(
    r"torch\.\w+|torch\.(cuda|storage)\.\w+Storage|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.nn\.parameter\.Parameter|collections\.OrderedDict|_codecs\.encode|(__)?builtins?(__)?\.(set|frozenset)"
)
CONVERT = "python scripts/convert_checkpoint.py"
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of the storages: then their bytes


class PickledObjectsError(CheckpointError):
    """A checkpoint pickles objects, and reading it would run code that it names; `names` lists them."""

    def __init__(self, path: str, objects: list[str]):
        self.names = ", ".join(objects[:5]) + (f" and {len(objects) - 5} more" if len(objects) > 5 else "")
        super().__init__(
            f"{path} pickles Python objects ({self.names}), and reading them would run code that the file names, so "
            f"they are not read. {CONVERT} {path} OUT.safetensors takes the weights out of it without running anything"
        )


class CutPickleError(ValueError):
    """A pickle ends before its end."""


def globals_in_stream(file: IO[bytes]) -> list[str]:
    """Those of a file as torch.save wrote it before version 1.6. :raises CutPickleError: see `globals_in`."""
    return list(dict.fromkeys(name for _ in range(_LEGACY_PICKLES) for name in _globals(file)))


def globals_in(content: bytes) -> list[str]:
    """The functions and classes, as "module.name", that a pickle names, each once, in order.

    :raises CutPickleError: it has no end. :raises ValueError: it is no pickle.
    """
    return _globals(io.BytesIO(content))


def _globals(file: IO[bytes]) -> list[str]:
    names: dict[str, None] = {}
    texts: list[str] = []  # on the stack, as far as they matter: the names of a STACK_GLOBAL are its last two
    memo: dict[int, Any] = {}
    last: Any = None  # what the opcode before has put on the stack, if text
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                names[argument.replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL":
                names[".".join(texts[-2:])] = None
            elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                memo[len(memo) if argument is None else argument] = last
                continue
            last = memo.get(argument) if opcode.name in ("BINGET", "LONG_BINGET", "GET") else argument
            last = last if isinstance(last, str) else None
            if last is not None:
                texts.append(last)
    except ValueError as error:
        if file.read(1) == b"" and re.search(r"exhausted|not enough|remain|no newline", str(error)):
            raise CutPickleError("its pickle has no end") from None
        raise
    return list(names)


def foreign_objects(names: list[str]) -> list[str]:
    """Those of the names that no plain state dict needs."""
    return [name for name in names if not _PLAIN.fullmatch(name)]


# -- reading without running ------------------------------------------------------------------------------------------


class StandIn(dict):
    """In the place of an object of any class: its attributes and items by name; it runs nothing."""

    __hash__ = object.__hash__  # it may have been a key

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # (attributes, slots)
            if isinstance(part, dict):
                self.update(part)

    def extend(self, values: Any) -> None:
        self.setdefault("items of the list", []).extend(values)

    def append(self, value: Any) -> None:
        self.extend([value])

    def add(self, value: Any) -> None:
        self.extend([value])


def _decode_bytes(text: str, encoding: str = "latin1") -> bytes:
    """As bytes are pickled in protocol 2."""
    return _codecs.encode(text, "latin1")


_ALLOWED = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _decode_bytes,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if full in _ALLOWED:  # in a wrapper of its own, whose attributes a pickle may set without harm
            return functools.partial(_ALLOWED[full])
        return type(name, (StandIn,), {"__module__": module})


def _load(file: IO[bytes], **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


def load_inert(file: IO[bytes]) -> Any:
    """What `torch.save` wrote, on the CPU, with a `StandIn` for every object that is no plain data.

    Not for TorchScript archives, which torch would run. Raises whatever a broken file leads to.
    """
    module = types.SimpleNamespace(Unpickler=_InertUnpickler, load=_load, __name__="inert")
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)
