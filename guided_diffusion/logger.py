"""Where a run's figures go: the console, log.txt, progress.csv, progress.jsonl, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .hosts.set_aside import set_aside

BATCH_JOBS = {"SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"}


def progress_bar(**options: Any) -> tqdm:
    """tqdm's bar on standard error, drawn as often as its reader has use for.

    A terminal: ten times a second. A pipe, such as that of mpiexec: every two seconds. A file, or what a batch system
    (SLURM, PBS, LSF) keeps of a job, where each drawing is one more line: every half minute.
    """
    seconds = 0.1
    if not sys.stderr.isatty():
        seconds = 30.0 if os.environ.keys() & BATCH_JOBS or _is_file(sys.stderr) else 2.0
    # maxinterval: beyond it tqdm would draw on its own
    return tqdm(file=sys.stderr, dynamic_ncols=True, mininterval=seconds, maxinterval=max(10.0, seconds), **options)


def _stamped(message: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n"


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream without a descriptor: a notebook's
        return False


class Logger:
    """Writes lines and rows of figures into `folder`; every method does nothing where `active` is false.

    Only rank 0 is active. Nothing is created before `open`, so that a start which is refused leaves nothing behind:
    until then, lines go to the console and are kept for log.txt.

    :raises ImportError: `tensorboard` is asked for, but not installed.
    """

    def __init__(self, folder: str, *, active: bool = True, tensorboard: bool = False):
        self.folder = folder
        self.active = active
        self.tensorboard = tensorboard
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("--tensorboard True needs the package tensorboard: pip install tensorboard")
        self._pending: list[str] = []
        self._columns: list[str] = []
        self._text: TextIO | None = None
        self._rows: TextIO | None = None
        self._writer: Any = None

    def open(self, step: int) -> None:
        """Creates the folder and files, or goes on in those of a run continued at `step`.

        Rows of later steps, which a run that was killed wrote after its last checkpoint, are dropped: they come again.
        :raises OSError: the folder cannot be written to.
        """
        if not self.active:
            return
        os.makedirs(self.folder, exist_ok=True)
        self._drop_rows(step)
        if os.path.isdir(self._path("log.txt")):
            self._set_aside("log.txt", "it is a folder")
        self._text = open(  # noqa: SIM115
            self._path("log.txt"),
            "a",
            encoding="utf-8",
            errors="backslashreplace",  # names may be no text
        )
        self._rows = open(self._path("progress.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
        self._write(self._text, "".join(self._pending))
        self._pending.clear()
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder, purge_step=step + 1)

    def log(self, message: str) -> None:
        """One line, to the console (above a progress bar) and log.txt."""
        if not self.active:
            return
        tqdm.write(message, file=sys.stderr)
        line = _stamped(message)
        if self._text is None:
            self._pending.append(line)
        else:
            self._write(self._text, line)

    def add_line(self, message: str) -> None:
        """The same by a rank that is not active, and knows that this folder is the active one's."""
        print(message, file=sys.stderr, flush=True)
        with open(self._path("log.txt"), "a", encoding="utf-8", errors="backslashreplace") as file:
            self._write(file, _stamped(message))

    def row(self, figures: dict[str, Any]) -> None:
        """One row of figures by name; `step` is one of them."""
        if not self.active:
            return
        self._write(self._rows, json.dumps(figures) + "\n")
        self._append_csv(figures)
        if self._writer is not None:
            for name, value in figures.items():
                if name != "step":
                    self._writer.add_scalar(name, value, figures["step"])

    def image(self, name: str, image: Any, step: int) -> None:
        """A picture (uint8 array [H, W, 3]) for TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        for file in (self._text, self._rows, self._writer):
            if file is not None:
                file.close()
        self._text = self._rows = self._writer = None

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @staticmethod
    def _write(file: TextIO, text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except OSError as error:  # a full disk, most likely; Python does not say which file
            raise OSError(error.errno, error.strerror, file.name) from error

    def _append_csv(self, figures: dict[str, Any]) -> None:
        """A figure that was not there before becomes a new column, empty in the rows above."""
        new = [name for name in figures if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite_csv(lambda row: True)
        line = io.StringIO(newline="")
        csv.DictWriter(line, self._columns, restval="").writerow(figures)
        with open(self._path("progress.csv"), "a", newline="", encoding="utf-8") as file:
            self._write(file, line.getvalue())

    def _drop_rows(self, last: int) -> None:
        """Takes the rows after step `last` out of both files, and half a row that a killed run left.

        What is no file of ours any more (a spreadsheet has saved it) is kept under another name, and what can be read
        of progress.jsonl goes on in both files.
        """
        rows = self._readable_rows(last)
        path = self._path("progress.csv")
        if not os.path.lexists(path):
            return
        try:
            with open(path, newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])
            if "step" not in self._columns or len(set(self._columns)) < len(self._columns):
                raise ValueError(f"its first line is {','.join(self._columns)[:80]!r}")
            self._rewrite_csv(lambda row: _is_row(row) and int(row["step"]) <= last)
        except (OSError, ValueError, csv.Error) as error:
            self._set_aside("progress.csv", str(error))
            self._columns = list(dict.fromkeys(name for row in rows for name in row))
            if rows:
                _replace(path, lambda file: self._write_csv(file, rows))

    def _readable_rows(self, last: int) -> list[dict[str, Any]]:
        """The rows of progress.jsonl up to step `last`, which are all that stays in it."""
        path = self._path("progress.jsonl")
        if not os.path.lexists(path):
            return []
        try:
            with open(path, "rb") as file:
                lines = file.read().splitlines(keepends=True)
        except OSError as error:
            self._set_aside("progress.jsonl", str(error))
            return []
        steps = [_step_of(line) for line in lines]
        odd = [number for number, step in enumerate(steps, start=1) if step is None]
        if odd and odd != [len(lines)]:  # the last may be half written
            self._set_aside("progress.jsonl", f"line {odd[0]} is no row of figures")
        kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= last]
        _replace(path, lambda file: file.writelines(line.decode().rstrip("\n") + "\n" for line in kept))
        return [json.loads(line) for line in kept]

    def _set_aside(self, name: str, why: str) -> None:
        self.log(
            f"note: {self._path(name)} cannot be read ({why}); kept as {set_aside(self._path(name), 'unreadable')}"
        )

    def _rewrite_csv(self, keep: Callable[[dict[str, str]], bool]) -> None:
        rows = []
        if os.path.exists(self._path("progress.csv")):
            with open(self._path("progress.csv"), newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if keep(row)]
        _replace(self._path("progress.csv"), lambda file: self._write_csv(file, rows))

    def _write_csv(self, file: TextIO, rows: list[dict[str, Any]]) -> None:
        writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _is_row(row: dict[str | None, Any]) -> bool:
    return None not in row and None not in row.values() and row["step"].isascii() and row["step"].isdigit()


def _step_of(line: bytes) -> float | None:
    """The step of a row of progress.jsonl; None: it is none."""
    try:
        row = json.loads(line.decode())
        step = row["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    known = isinstance(row, dict) and isinstance(step, (int, float)) and step == step
    return step if known else None


def _replace(path: str, write: Callable[[Any], Any]) -> None:
    temporary = f"{path}.tmp{os.getpid()}"
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        write(file)
    os.replace(temporary, path)


class Averages:
    """Means of losses since the last reading, by quarter of the timesteps too, kept on the device until read."""

    def __init__(self, device: torch.device, num_timesteps: int):
        self.device, self.num_timesteps = device, num_timesteps
        self.sums: dict[str, torch.Tensor] = {}  # name -> [4 quarters, (sum, count)], or [1, ...] of a scalar

    def add(self, t: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Losses [n] by name, at timesteps t [n]. A loss that is not finite is left out."""
        quarter = 4 * t // self.num_timesteps
        for name, values in terms.items():
            finite = torch.isfinite(values)
            pairs = torch.stack([torch.where(finite, values, 0.0), finite.to(values.dtype)], dim=1)
            self._sums(name, 4).index_add_(0, quarter, pairs)

    def add_scalar(self, name: str, value: torch.Tensor) -> None:
        """One value, a scalar on the device. One that is not finite is left out."""
        finite = torch.isfinite(value)
        self._sums(name, 1).add_(torch.stack([torch.where(finite, value, 0.0), finite.to(value.dtype)])[None])

    def _sums(self, name: str, rows: int) -> torch.Tensor:
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows, 2, device=self.device)
        return self.sums[name]

    def read(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means, as `loss`, `loss_q0` ... `loss_q3`; starts anew. One transfer from the device.

        :param add_up: adds a CPU tensor up over the ranks (`World.sum_`), which makes this a collective.
        """
        if not self.sums:
            return {}
        sizes = [len(sums) for sums in self.sums.values()]
        flat = add_up(torch.cat(list(self.sums.values())).double().cpu())
        means: dict[str, float] = {}
        for name, rows in zip(self.sums, flat.split(sizes), strict=True):
            total = rows.sum(dim=0)
            if total[1] > 0:
                means[name] = float(total[0] / total[1])
            if len(rows) > 1:
                means |= {f"{name}_q{i}": float(row[0] / row[1]) for i, row in enumerate(rows) if row[1] > 0}
        self.sums.clear()
        return means
