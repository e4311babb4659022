"""What the data scripts of this folder share: writing without half-written files, and work over many processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

RECORD = "prepared.json"  # in a prepared folder: which script made it, and the files that it may replace


class PreparationError(Exception):
    """The input cannot be used; the message names the file, what is wrong with it and the remedy."""


@contextmanager
def clear_errors(program: str) -> Iterator[None]:
    """Ends the program with one line instead of a traceback where the input or the disk is at fault, or the user stops
    it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        yield
    except PreparationError as error:
        raise SystemExit(f"{program}: {error}") from None
    except OSError as error:
        raise SystemExit(f"{program}: {error}; mend that, and the same command goes on from here") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{program}: stopped; the same command goes on from here") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed to `path` when the block succeeds, removed when it fails."""
    temporary = path.with_name(f".{_short(path.name)}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _short(name: str) -> str:
    """What stands for a name in that of its temporary file, which must not be longer than file systems take."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def write_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def write_json(value: Any, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as the files of this project hold it."""
    return (json.dumps(value, indent=2) + "\n").encode("utf-8")


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
        found = [e for e in entries if e.name.endswith(suffix) and not e.name.startswith(".")]
    for entry in found:
        if entry.is_symlink():
            check_link(Path(entry.path))
    names = sorted(entry.name for entry in found)
    if not names:
        raise PreparationError(f"{folder} holds no {suffix} files: unpack the archive, or name the folder where it is")
    return {name.removesuffix(suffix): folder / name for name in names}


def check_link(path: Path) -> None:
    """Raises PreparationError where `path` is a link to nothing, or to itself."""
    if path.is_symlink() and not os.path.exists(path):
        raise PreparationError(f"{path} is a link to nothing; remove it or restore what it points to")


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Raises PreparationError where the folder to write is one of the folders to read, or lies inside or around it."""
    target = out.resolve()
    for source in sources:
        other = source.resolve()
        if target == other or target in other.parents or other in target.parents:
            where = "is" if target == other else "lies inside" if other in target.parents else "contains"
            raise PreparationError(
                f"{out} {where} {source}, which is read: nothing is written there; choose another folder to write"
            )


def open_output(
    out: Path,
    program: str,
    expected: dict[str, set[str]],
    *,
    sources: Iterable[Path] = (),
    description: dict[str, Any] | None = None,
) -> dict[str, set[str]]:
    """Makes the folders of a data set and finds what an earlier run of the same program has finished.

    A folder is written to where it is new, empty, or has a record (`prepared.json`) of the same program; and in it only
    files that the record names, or that were not there, are written. The record is written before any other file.

    expected: for each folder below `out`, the file names that it shall hold in the end. sources: what is read. Neither
    may lie in the other. description: the content that `dataset.json` shall have, which the caller writes at the end.
    Returns for each folder the names that it holds already. Leftovers of an interrupted run are removed.
    Raises PreparationError, before anything is written, where anything is there that the record does not name.
    """
    check_apart(out, sources)
    record = _read_record(out, program)
    finished: dict[str, set[str]] = {}
    leftovers: list[Path] = []
    for folder, names in expected.items():
        _refuse_links(out, folder)
        ours = set(record["files"].get(folder, ()))
        present = sorted((out / folder).iterdir()) if (out / folder).is_dir() else []
        known = {
            word for name in ours | names for word in (name, _short(name))
        }  # earlier versions took the name itself
        temporary = {f for f in present if (m := re.fullmatch(r"\.(.+)\.\d+\.tmp", f.name)) and m[1] in known}
        leftovers += [file for file in temporary if not file.is_symlink()]
        finished[folder] = {file.name for file in present if not file.name.startswith(".")}
        strangers = sorted(finished[folder] - names)
        if strangers:
            raise PreparationError(
                f"{out / folder / strangers[0]} does not belong there ({len(strangers)} such files): it was prepared"
                f" from another source or with another split; remove {out} or choose another folder"
            )
        if unknown := sorted(finished[folder] - ours):
            raise PreparationError(
                f"{out / folder / unknown[0]} is in the way ({len(unknown)} such files): {out / RECORD} does not name"
                " it as made by this script; move it away or choose another folder"
            )
    written = set(record["dataset_json"])
    if description is not None:
        if os.path.lexists(out / "dataset.json") and _hash((out / "dataset.json").read_bytes()) not in written:
            raise PreparationError(
                f"{out / 'dataset.json'} is not as this script wrote it, and would be replaced; move it away or"
                " choose another folder"
            )
        written.add(_hash(json_bytes(description)))
    for file in leftovers:
        file.unlink()
    files = {folder: sorted({*record["files"].get(folder, ()), *names}) for folder, names in expected.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_json({"program": program, "files": record["files"] | files, "dataset_json": sorted(written)}, out / RECORD)
    for folder in expected:
        (out / folder).mkdir(parents=True, exist_ok=True)
    return finished


def _read_record(out: Path, program: str) -> dict[str, Any]:
    """What earlier runs of `program` have written into `out`; raises PreparationError where it is not theirs."""
    if os.path.lexists(out) and not out.is_dir():
        raise PreparationError(f"{out} is not a folder; choose another to write")
    path = out / RECORD
    if not os.path.lexists(path):
        own = re.compile(rf"\.({re.escape(RECORD)}|{_short(RECORD)})\.\d+\.tmp")
        others = sorted(file.name for file in out.iterdir() if not own.fullmatch(file.name)) if out.is_dir() else []
        if others:
            raise PreparationError(
                f"{out} holds other files ({others[0]!r}) and no record of this script ({RECORD}); choose a folder that"
                " is new or empty"
            )
        return {"files": {}, "dataset_json": []}
    try:
        record = json.loads(path.read_bytes())
        files, written = record["files"], record["dataset_json"]
        names = [name for folder, names in files.items() for name in [*names, *folder.split("/")]]
        if not all(isinstance(n, str) and n and n not in (".", "..") and "/" not in n for n in [*names, *written]):
            raise ValueError("a name in it is none")
        for name in names:
            os.fsencode(name)  # a ValueError, too, where no file can have this name
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PreparationError(f"{path} is no record of what is in {out} ({error}); choose another folder") from None
    if path.is_symlink() or record.get("program") != program:
        raise PreparationError(f"{out} was made by {record.get('program')!r}, not by {program}; choose another folder")
    return record


def _refuse_links(out: Path, folder: str) -> None:
    """Raises PreparationError where a folder below `out` is a link or a file: what it leads to is not ours."""
    for place in [out / folder, *(out / folder).parents]:
        if place == out:
            return
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise PreparationError(f"{place} is a link or a file, not a folder of {out}; remove it or choose another")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
