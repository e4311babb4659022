"""Hashes of the samples that a run has made so far, until `sampling.json` holds them.

Every rank appends lines to a file of its own, each before its sample is written, so that what is there after a kill can
be told from a picture that somebody has put in its place. Rank 0 takes the lines over into the record and removes them.
"""

from __future__ import annotations

import json
import os
import re
from typing import IO

from ..data.json_text import parse_json
from ..weights.store import CheckpointError

_FILE = re.compile(r"\.sdm-made-\d+\.jsonl")
Samples = dict[str, dict[str, str]]  # layout's name -> folder of samples -> hash


class MadeSamples:
    """What rank `rank` of a run into the results folder `path` makes."""

    def __init__(self, path: str, rank: int):
        self.path = os.path.join(path, f".sdm-made-{rank}.jsonl")
        self._file: IO[str] | None = None

    def note(self, folder: str, name: str, sha: str) -> None:
        """:raises CheckpointError: the line cannot be written."""
        try:
            if self._file is None:
                self._file = open(self.path, "x", encoding="utf-8")  # noqa: SIM115
            self._file.write(json.dumps([folder, name, sha]) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error}; what is there is whole, start again to go on"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def read_made(path: str) -> Samples:
    """What the ranks of a run into the folder `path` have noted. A line that a kill left unfinished is passed over."""
    made: Samples = {}
    for file in made_files(path):
        with open(file, "rb") as lines:
            for line in lines:
                try:
                    folder, name, sha = parse_json(line)
                except (ValueError, TypeError):
                    continue
                if all(isinstance(part, str) for part in (folder, name, sha)):
                    made.setdefault(name, {})[folder] = sha
    return made


def made_files(path: str) -> list[str]:
    """The files of such lines in the folder `path`."""
    names = os.listdir(path) if os.path.isdir(path) else []
    paths = [os.path.join(path, name) for name in sorted(names) if _FILE.fullmatch(name)]
    return [file for file in paths if os.path.islink(file) or os.path.isfile(file)]
