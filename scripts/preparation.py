"""What the data scripts of this folder share: writing without half-written files, and work over many processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
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
def replacing(path: Path):
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
