"""One function over many items on all cores, with a progress bar."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use, which is fewer than the machine's in most batch systems."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, workers: int | None = None
) -> Iterator[Result]:
    """`function` of each item, in the items' order; it and they must be picklable. One worker runs in this process.

    workers: processes, default all cores. An exception of the function is raised here, and what has not begun is
    dropped.
    """
    workers = min(available_cores() if workers is None else workers, len(items))
    with tqdm(total=len(items), desc=description, unit="file", disable=None if len(items) > 20 else True) as bar:
        if workers <= 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        chunk = max(1, min(64, len(items) // (4 * workers)))
        with ProcessPoolExecutor(workers) as pool:
            try:
                for result in pool.map(function, items, chunksize=chunk):
                    yield result
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
