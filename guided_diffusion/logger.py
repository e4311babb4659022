"""Where a run's figures go: the console, log.txt, progress.csv, progress.jsonl, TensorBoard."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from typing import Any

from tqdm import tqdm


class Logger:
    """Writes lines and rows of figures into `folder`; every method does nothing where `active` is false.

    Only rank 0 is active. The files are appended to, so that a resumed run goes on in them.
    """

    def __init__(self, folder: str, *, active: bool = True, tensorboard: bool = False):
        self.folder = folder
        self.active = active
        self._writer = None
        if not active:
            return
        os.makedirs(folder, exist_ok=True)
        self._text = open(os.path.join(folder, "log.txt"), "a", encoding="utf-8")  # noqa: SIM115
        self._rows = open(os.path.join(folder, "progress.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "--tensorboard True needs the package tensorboard: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(folder)

    def log(self, message: str) -> None:
        """One line, to the console (above a progress bar) and log.txt."""
        if self.active:
            tqdm.write(message, file=sys.stderr)
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._text.flush()

    def row(self, figures: dict[str, Any]) -> None:
        """One row of figures by name; `step` is one of them."""
        if not self.active:
            return
        self._rows.write(json.dumps(figures) + "\n")
        self._rows.flush()
        self._append_csv(figures)
        if self._writer is not None:
            for name, value in figures.items():
                if name != "step":
                    self._writer.add_scalar(name, value, figures["step"])

    def image(self, name: str, image: Any, step: int) -> None:
        """A picture (uint8 array [H, W, 3]) for TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def _append_csv(self, figures: dict[str, Any]) -> None:
        """A figure that was not there before becomes a new column, empty in the rows above."""
        path = os.path.join(self.folder, "progress.csv")
        rows: list[dict[str, Any]] = []
        columns: list[str] = []
        if os.path.exists(path):
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or [])
                if not set(figures) <= set(columns):
                    rows = list(reader)
        if set(figures) <= set(columns):
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns, restval="").writerow(figures)
            return
        columns += [name for name in figures if name not in columns]
        with open(path + ".tmp", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows([*rows, figures])
        os.replace(path + ".tmp", path)

    def close(self) -> None:
        if self.active:
            self._text.close()
            self._rows.close()
        if self._writer is not None:
            self._writer.close()
