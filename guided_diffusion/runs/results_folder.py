"""A results folder on the disk: what in it is ours, and that nothing else is written over or removed.

Ours are the pictures that the record names, in `images/`, `labels/` and the folders of samples, and `overview.png`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..data.listing import IMAGE_EXTENSIONS, MAP_EXTENSIONS, is_remote, some_names
from ..image_datasets import SAMPLING_RECORD
from ..settings import ConfigError
from ..weights import store
from .made_samples import made_files, read_made
from .picture_record import OTHER_SIZE, Entry, fingerprint, read_record, samples_of

SET_ASIDE = "set_aside"
_SAMPLES = re.compile(r"samples(_\d+)?")
_PICTURES = tuple({*IMAGE_EXTENSIONS, *MAP_EXTENSIONS})
_REMEDY = "choose another --results_path"


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Errors of the disk as CheckpointErrors with a remedy."""
    try:
        yield
    except OSError as error:
        raise store.CheckpointError(f"cannot write {error.filename}: {error.strerror}; {_REMEDY}") from error


class ResultsFolder:
    """The folder `path`; links on the way to it are followed once, here, and none inside it."""

    def __init__(self, path: str):
        self.path = os.path.realpath(path)

    def picture(self, folder: str, name: str) -> str:
        """The path of the picture of layout `name` in `images`, `labels` or a folder of samples."""
        return os.path.join(self.path, folder, f"{name}.png")

    @property
    def record_path(self) -> str:
        return os.path.join(self.path, SAMPLING_RECORD)

    def sample_folders(self) -> list[str]:
        """Names of the folders of samples that are there, of this run or of others."""
        return sorted(name for name in self._entries("") if _SAMPLES.fullmatch(name))

    def _entries(self, folder: str) -> list[str]:
        path = os.path.join(self.path, folder)
        return os.listdir(path) if os.path.isdir(path) else []

    # -- whether we may write here ------------------------------------------------------------------------------------

    def check_apart(self, inputs: Iterable[str]) -> None:
        """:raises ConfigError: the folder is, contains, or lies in one of these folders and files of the data."""
        here, ancestors = _identity(self.path), set(_identities(self.path))
        seen: set[str] = set()
        for path in inputs:
            if not path or is_remote(path):
                continue
            real = os.path.realpath(path)
            folder = real if os.path.isdir(real) else os.path.dirname(real)
            if folder in seen:
                continue
            seen.add(folder)
            if _identity(folder) in ancestors:
                relation = "is" if _identity(folder) == here else "lies in"
            elif here is not None and here in _identities(folder):
                relation = "contains"
            else:
                continue
            raise ConfigError(
                f"the results folder {self.path} {relation} the folder {folder}, which this run reads: its files could "
                f"be replaced, or pass for data later; {_REMEDY}"
            )

    def read_record(self) -> dict[str, Any] | None:
        """The record of an earlier run, None in a folder that holds no pictures.

        :raises ConfigError: the record is damaged, there are pictures without one, or a part of the folder is a link.
        """
        places = ("images", "labels", SET_ASIDE, SAMPLING_RECORD, *self.sample_folders(), *made_files(self.path))
        for place in places:
            path = os.path.join(self.path, place)
            if os.path.islink(path):
                raise ConfigError(f"{path} is a link, and nothing is written through one; remove it, or {_REMEDY}")
        record = read_record(self.record_path)
        if record is None:
            for folder in ("", "images", "labels", *self.sample_folders()):
                names = [name for name in self._entries(folder) if name.lower().endswith(_PICTURES)]
                if names:
                    raise ConfigError(
                        f"{os.path.join(self.path, folder)} holds pictures ({some_names(sorted(names))}), and there is "
                        f"no {SAMPLING_RECORD} that says what they were made from: {_REMEDY}, or move them away"
                    )
        elif "pictures" not in record:
            # An older version: it wrote the label map of every layout that it sampled.
            names = [name.removesuffix(".png") for name in self._entries("labels") if name.endswith(".png")]
            record["pictures"] = {name: {} for name in names}
        for name, samples in read_made(self.path).items() if record is not None else ():
            if (known := samples_of(record["pictures"].get(name, {}))) is not None:
                known |= samples
        return record

    def check_vacant(self, names: Iterable[str], recorded: Collection[str], folders: Collection[str]) -> None:
        """:raises ConfigError: a picture that the record does not name is where one of the layouts `names` goes."""
        stray = [
            os.path.join(folder, f"{name}.png")
            for name in names
            if name not in recorded
            for folder in folders
            if os.path.lexists(self.picture(folder, name))
        ]
        if stray:
            raise ConfigError(
                f"{self.path} holds pictures that its {SAMPLING_RECORD} does not name, where this run would write "
                f"({some_names(stray)}; {len(stray)} in all): move them away, or {_REMEDY}"
            )

    def strangers(self, known: Collection[str]) -> list[str]:
        """Pictures that scorers would count, of layouts that are not `known`."""
        return [
            os.path.join(folder, name)
            for folder in ("images", "labels", *self.sample_folders())
            for name in sorted(self._entries(folder))
            if name.lower().endswith(_PICTURES) and name.removesuffix(".png") not in known
        ]

    # -- writing and removing ------------------------------------------------------------------------------------------

    @_writing()
    def open(self, folders: Iterable[str]) -> Any:
        """Makes the folder and the `folders` in it, and removes what killed writers left. Returns a lock to be held.

        :raises CheckpointError: it cannot be written, or another run has it.
        """
        os.makedirs(self.path, exist_ok=True)
        held = store.lock(self.path, "results_path")
        for name in ("", *folders):
            path = os.path.join(self.path, name)
            os.makedirs(path, exist_ok=True)
            store.remove_leftovers(path)
        return held

    @_writing()
    def remove(self, names: Iterable[str], inputs: bool = False) -> None:
        """Removes the samples of the layouts `names`, which the record names, and with `inputs` what lies in `images`
        and `labels` as well."""
        folders = [*self.sample_folders(), *(("images", "labels") if inputs else ())]
        for path in self._existing(names, folders):
            os.remove(path)

    @_writing()
    def remove_made(self) -> None:
        """Removes the ranks' notes of what they have made, once the record holds them."""
        for path in made_files(self.path):
            os.remove(path)

    def set_aside(self, names: Iterable[str]) -> str:
        """Moves all pictures of the layouts `names` out of the scorers' way; returns the folder that they are in now:
        `set_aside`, or `set_aside_2` and so on where one of the names is taken."""
        return self.move_aside(self._existing(names, ["images", "labels", *self.sample_folders()]))

    @_writing()
    def move_aside(self, pictures: Iterable[str]) -> str:
        """The same for these paths of pictures."""
        paths, number = list(pictures), 1
        while True:
            target = os.path.join(self.path, SET_ASIDE + (f"_{number}" if number > 1 else ""))
            moves = [(path, os.path.join(target, os.path.relpath(path, self.path))) for path in paths]
            if not os.path.islink(target) and not any(os.path.lexists(new) for _, new in moves):
                break
            number += 1
        for path, new in moves:
            os.makedirs(os.path.dirname(new), exist_ok=True)
            os.rename(path, new)
        return target

    def _existing(self, names: Iterable[str], folders: Iterable[str]) -> Iterator[str]:
        folders = list(folders)
        for name in names:
            for folder in folders:
                path = self.picture(folder, name)
                if os.path.lexists(path):
                    yield path

    def holds(self, folder: str, name: str, pixels: np.ndarray) -> bool | None:
        """Whether the picture of layout `name` is this one; None where there is none."""
        path = self.picture(folder, name)
        if not os.path.lexists(path):
            return None
        there = _read(path)
        return there is not None and np.array_equal(there, pixels)

    def found(self, folder: str, name: str, shape: tuple[int, ...] = ()) -> str | None:
        """The fingerprint of the picture of layout `name`, or OTHER_SIZE where it has not this shape [H, W, 3]; empty
        where it cannot be read, None where there is none."""
        path = self.picture(folder, name)
        if not os.path.lexists(path):
            return None
        there = _read(path)
        return "" if there is None else OTHER_SIZE if shape and there.shape != shape else fingerprint(there)

    def foreign(self, recorded: Mapping[str, Entry]) -> list[str]:
        """The paths of all pictures that have taken the place of a sample of these entries."""
        return [
            self.picture(folder, name)
            for name, entry in recorded.items()
            if (known := samples_of(entry)) is not None
            for folder in self.sample_folders()
            if (found := self.found(folder, name)) and found != known.get(folder)
        ]


def _read(path: str) -> np.ndarray | None:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        return None


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a folder from another whatever it is called; None where it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _identities(path: str) -> Iterator[tuple[int, int]]:
    """Of a folder and all above it, as far as they exist."""
    while True:
        if (identity := _identity(path)) is not None:
            yield identity
        path, below = os.path.dirname(path), path
        if path == below:
            return
