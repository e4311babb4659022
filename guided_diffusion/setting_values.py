"""How a setting is declared, and how a value becomes one: from a flag's text, a Python argument or a saved config."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting is unknown, malformed, or contradicts another; the message names both values."""


def setting(default: Any, help: str, *, binding: bool = False) -> Any:
    """A dataclass field with its help line. `binding`: a checkpoint is only good for the value it was trained with."""
    return dataclasses.field(default=default, metadata={"help": help, "binding": binding})


def another_default(cls: type, name: str, default: Any) -> Any:
    """The field `name` of the dataclass `cls`, with its help line, for a class that derives from it."""
    return dataclasses.field(default=default, metadata=cls.__dataclass_fields__[name].metadata)


def str2bool(text: str | bool) -> bool:
    """True/False, yes/no, 1/0, as the traditional flags are written. :raises ArgumentTypeError: anything else."""
    lowered = str(text).lower()
    if lowered in ("true", "yes", "t", "y", "1"):
        return True
    if lowered in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


def as_setting(name: str, default: Any, value: Any) -> Any:
    """`value` in the type of its default: "32" is 32, (1, 2) is "1,2". :raises ConfigError: it has no clear meaning."""
    kind = type(default)
    try:
        if kind is tuple:
            low, high = value.split(",") if isinstance(value, str) else value
            return float(low), float(high)
        if kind is bool:
            return str2bool(value)
        if kind is str:
            if isinstance(value, (str, os.PathLike)):
                return os.fspath(value)
            parts = value if isinstance(value, (list, tuple)) else [value]
            if all(isinstance(part, numbers.Real) for part in parts):  # but not None: it would become a name
                return ",".join(map(str, parts))
        elif kind is float:
            return float(value)
        elif isinstance(value, str) or (isinstance(value, float) and value.is_integer()):
            return int(value)
        elif not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        pass
    wanted = {bool: "True or False", str: "text or numbers", float: "a number", int: "a whole number"}
    wanted[tuple] = "LOW,HIGH, two numbers such as (0.1, 0.8)"
    raise ConfigError(f"{name} must be {wanted[kind]}; got {value!r} ({type(value).__name__})")


def check_range(config: Any, least: float, *names: str, below: float | None = None) -> None:
    """:raises ConfigError: one of the numbers `names` of `config` is less than `least`, not below `below`, or not
    finite; a whole number must fit 64 bits with a sign, unless `below` says another limit."""
    for name in names:
        value = getattr(config, name)
        limit = below if below is not None else 2**63 if isinstance(value, int) else math.inf
        if not least <= value < limit:
            most = f" and below {below}" if below is not None else "" if value < least else ", and a number in range"
            if below is not None and isinstance(value, int):
                raise ConfigError(f"{name} must lie between {least} and {below - 1}; got {value}")
            raise ConfigError(f"{name} must be at least {least}{most}; got {value}")


def check_place(name: str, path: str, schemes: tuple[str, ...] = ()) -> None:
    """:raises ConfigError: an address of a kind that cannot be read there (`schemes`: which can)."""
    if "\0" in path:
        raise ConfigError(f"{name} is {path!r}, and no path holds a zero byte")
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in schemes:
        known = f" or an address {', '.join(f'{s}://' for s in schemes)}" if schemes else ""
        raise ConfigError(f"{name} must be a local path{known}; got {path}")


def check_known(names: Iterable[str], *classes: type) -> None:
    """:raises ConfigError: a name that is no field of the `classes`; says which ones there are."""
    known = sorted({field.name for cls in classes for field in dataclasses.fields(cls)})
    if unknown := sorted(set(names) - set(known)):
        near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        raise ConfigError(
            f"unknown settings: {', '.join(unknown)}"
            + (f" (is {' or '.join(dict.fromkeys(near))} meant?)" if near else "")
            + f"; there are {', '.join(known)}"
        )


def auto_choice(name: str, value: object) -> str:
    """The value of a flag that is auto, true or false, in lower case; True and False are welcome.

    :raises ConfigError: any other value.
    """
    choice = str(value).lower()
    if choice not in ("auto", "true", "false"):
        raise ConfigError(f"{name} must be auto, true or false; got {value!r}")
    return choice


def resolve_precision(precision: str, use_fp16: bool) -> str:
    """:raises ConfigError: an unknown precision, or one that contradicts use_fp16."""
    if precision not in ("", "fp32", "fp16", "bf16"):
        raise ConfigError(f"unknown precision {precision!r}: choose fp32, fp16 or bf16")
    if use_fp16 and precision not in ("", "fp16"):
        raise ConfigError(f"--use_fp16 True contradicts --precision {precision}")
    return precision or ("fp16" if use_fp16 else "fp32")


def numbers_of(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise ConfigError(f"{name} {text!r} is not a list of numbers like 1,2,4") from None


def binding_settings(config: Any) -> dict[str, Any]:
    """The settings that a checkpoint is bound to, by name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["binding"]}
