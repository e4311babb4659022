"""What the data scripts of this folder share: writing without half-written files, and work over many processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm


class PreparationError(Exception):
    """The input cannot be used; the message names the file, what is wrong with it and the remedy."""


@contextmanager
def clear_errors(program: str) -> Iterator[None]:
    """Ends the program with one line instead of a traceback where the input is at fault or the user stops it."""
    try:
        yield
    except PreparationError as error:
        raise SystemExit(f"{program}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{program}: stopped; the same command goes on from here") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed to `path` when the block succeeds, removed when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def write_json(value: Any, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Puts `source` at `target` without using space twice: a hard link, or a copy where the file system has none."""
    with replacing(target) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def files_by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """Stem -> path for the files of `folder` with this suffix, hidden ones left out.

    Raises PreparationError where the folder is missing or has none.
    """
    if not folder.is_dir():
        raise PreparationError(f"{folder} is not a folder: unpack the archive, or name the folder where it is")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name.endswith(suffix) and not e.name.startswith("."))
    if not names:
        raise PreparationError(f"{folder} holds no {suffix} files: unpack the archive, or name the folder where it is")
    return {name.removesuffix(suffix): folder / name for name in names}


def open_output(out: Path, expected: dict[str, set[str]]) -> dict[str, set[str]]:
    """Makes the folders of a data set and finds what an earlier run has finished.

    expected: for each folder below `out`, the file names that it shall hold in the end.
    Returns for each folder the names that it holds already. Leftovers of an interrupted run are removed.
    Raises PreparationError, before anything is written, where a folder holds a file of another split or source.
    """
    finished: dict[str, set[str]] = {}
    leftovers: list[Path] = []
    for folder, names in expected.items():
        present = sorted((out / folder).iterdir()) if (out / folder).is_dir() else []
        leftovers += [file for file in present if file.name.startswith(".") and file.name.endswith(".tmp")]
        finished[folder] = {file.name for file in present if not file.name.startswith(".")}
        strangers = sorted(finished[folder] - names)
        if strangers:
            raise PreparationError(
                f"{out / folder / strangers[0]} does not belong there ({len(strangers)} such files): it was prepared"
                f" from another source or with another split; remove {out} or choose another --out"
            )
    for file in leftovers:
        file.unlink()
    for folder in expected:
        (out / folder).mkdir(parents=True, exist_ok=True)
    return finished


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_chunk(function: Callable[[Any], Any], chunk: Sequence[Any]) -> list[Any]:
    return [function(job) for job in chunk]


def run_parallel(function: Callable[[Any], Any], jobs: Iterable[Any], workers: int, description: str) -> list[Any]:
    """Calls `function(job)` for every job on `workers` processes, with a progress bar.

    Returns the results in no particular order. The first exception stops the work and is raised here.
    """
    jobs = list(jobs)
    size = max(1, min(32, len(jobs) // (4 * max(workers, 1))))
    iterator = iter(jobs)
    chunks = list(iter(lambda: list(islice(iterator, size)), []))
    results: list[Any] = []
    with tqdm(total=len(jobs), desc=description, unit="file", disable=not jobs) as progress:
        if workers <= 1:
            for job in jobs:
                results.append(function(job))
                progress.update()
            return results
        with ProcessPoolExecutor(workers) as pool:
            try:
                for future in as_completed([pool.submit(_run_chunk, function, chunk) for chunk in chunks]):
                    results.extend(future.result())
                    progress.update(len(future.result()))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return results
