"""What the scorers share on the command line: flags, errors, the device, and the report beside every number."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "numpy", "Pillow")
NOT_COMPARABLE = "not comparable with published scores"


def remark(comparable: bool) -> str:
    """What follows a printed score."""
    return "" if comparable else f" ({NOT_COMPARABLE})"


class EvaluationError(Exception):
    """An input the score cannot be computed from; the message names it and says what to do."""


def boolean(text: str) -> bool:
    """`True` or `False` as a flag's value, in any case; also yes, no, 1, 0."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return value


def at_least(smallest: int) -> Callable[[str], int]:
    """A flag's type: an integer not below `smallest`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, not {value}")
        return value

    return integer


def argument_parser(description: str, batch_size: int) -> argparse.ArgumentParser:
    """A parser with the flags that every scorer has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parser.add_argument("--batch_size", type=at_least(1), default=batch_size, help="images per pass of the network")
    parser.add_argument("--num_workers", type=at_least(0), default=workers, help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the score and all that reproduces it here")
    parser.add_argument(
        "--skip_bad", type=boolean, default=False, help="leave out unusable images (named and counted) and go on"
    )
    return parser


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a CUDA GPU where there is one, else the CPU.

    Raises EvaluationError if PyTorch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"--device {name} cannot be used ({reason}); try --device cpu") from error
    return device


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """No gradients, and float32 convolutions in float32: a GPU's TF32 would round their inputs to 10 bits."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def check_output(flag: str, path: Path | None) -> None:
    """Raises EvaluationError if the file a flag asks for could not be written, so that no work is lost at its end."""
    if path is None:
        return
    if path.is_dir():
        raise EvaluationError(f"{flag} {path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise EvaluationError(f"{flag} {path}: the folder {path.absolute().parent} does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise EvaluationError(f"{flag} {path}: no permission to write in {path.absolute().parent}")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to `path` if all went well and removed if not.

    Raises EvaluationError if it cannot be written.
    """
    # Not the file's own name: with more letters it may be longer than a name can be.
    temporary = path.with_name(f".sdm-{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Report:
    """The score's record: warnings as they come, then everything needed to repeat the number, as JSON."""

    def __init__(self, metric: str, arguments: argparse.Namespace, packages: tuple[str, ...] = ()) -> None:
        self.metric, self.arguments, self.packages = metric, arguments, PACKAGES + packages
        self.started = time.time()
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Shows a warning at once and keeps it for the record."""
        self.warnings.append(message)
        print(f"warning: {message}", file=sys.stderr)

    def finish(self, score: float | None, comparable: bool | None, **fields: Any) -> None:
        """Writes the record to the file that --json names, if any.

        `score` is None where there is none yet, `comparable` where no published weights exist to say so by.
        """
        if self.arguments.json is None:
            return
        record = {
            "metric": self.metric,
            "score": score,
            "comparable": comparable,
            **({"note": NOT_COMPARABLE} if comparable is False else {}),
            **fields,
            "warnings": self.warnings,
            "arguments": {name: _plain(value) for name, value in vars(self.arguments).items()},
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in self.packages},
            },
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 2),
        }
        with written_whole(self.arguments.json) as temporary:
            # allow_nan=False: NaN is no JSON; a score that is one is a bug to hear of
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"report: {self.arguments.json}")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def run(main: Callable[[], None]) -> None:
    """Runs a scorer; an EvaluationError ends it with its message alone and exit code 2."""
    try:
        main()
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
