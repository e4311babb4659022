"""What a file is that is given as a checkpoint, by its first and last bytes; and why a reader could not read it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from typing import IO, Any

import torch

from .files import CheckpointError, open_file
from .pickled_objects import CutPickleError, PickledObjectsError, foreign_objects, globals_in, globals_in_stream

ZIP, PICKLE, SAFETENSORS = "zip", "pickle", "safetensors"  # torch.save's form, its form before 1.6, safetensors
LONGEST_HEADER = 100_000_000  # bytes; what safetensors' own readers allow
TRUNCATED = "is truncated: {}. The copy or download was cut short; fetch it again"

_ZIP_BEGIN, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_LEGACY_BEGIN = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
# Beginnings of files that people take for checkpoints, and what to do with each.
_BEGINNINGS = {
    b"version https://git-lfs": "is a pointer of git-lfs, not the weights: run `git lfs pull` in its repository",
    b"\x1f\x8b": "is a gzip archive: unpack it (gunzip, or tar -xzf), and name the file in it",
    b"BZh": "is a bzip2 archive: unpack it, and name the file in it",
    b"\xfd7zXZ": "is an xz archive: unpack it, and name the file in it",
    b"\x28\xb5\x2f\xfd": "is a zstd archive: unpack it, and name the file in it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it, and name the file in it",
    b"\x89HDF": "is an HDF5 file, which holds weights of another framework",
    b"\x93NUMPY": "is a NumPy array, not the weights of a network",
}


def check_path(path: str) -> None:
    """:raises CheckpointError: a local folder stands where a file is needed."""
    if "://" in path or not os.path.isdir(path):
        return
    names = sorted(name for name in os.listdir(path) if name.endswith((".pt", ".pth", ".ckpt", ".safetensors")))
    best = next((name for name in names if name.endswith("_best.pt")), names[0] if names else "")
    hint = f"name a file in it, as {os.path.join(path, best)}" if best else "and no checkpoint is in it"
    raise CheckpointError(f"{path} is a folder: {hint}")


def kind_of(file: IO[bytes], path: str) -> str:
    """ZIP, PICKLE or SAFETENSORS, by the content, whatever the name is; leaves `file` at its beginning.

    :raises CheckpointError: none of them, or its end is missing; the message says what it is instead.
    """
    head = file.read(512)
    size = file.seek(0, os.SEEK_END)
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): whatever was to write it wrote nothing; fetch it again")
    announced = int.from_bytes(head[:8], "little")
    if head[:4] == _ZIP_BEGIN[: len(head)]:
        file.seek(max(0, size - 65557))  # the end of an archive: 22 bytes and a comment of up to 64 KiB
        tail = file.read()
        if not 0 <= tail.rfind(_ZIP_END) <= len(tail) - 22:
            raise CheckpointError(f"{path} {TRUNCATED.format(f'the end of the archive is missing after {size} bytes')}")
        kind = ZIP
    elif head[8:9] == b"{" and announced <= LONGEST_HEADER:
        _check_safetensors(file, path, announced, size)
        kind = SAFETENSORS
    elif _LEGACY_BEGIN.startswith(head) or _MAGIC in head[:40]:
        kind = PICKLE
    elif head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise CheckpointError(
            f"{path} is a pickle, but torch.save did not write it, so it is not read: load it with the program that "
            "wrote it, and save the network's state_dict with torch.save or safetensors"
        )
    else:
        raise CheckpointError(f"{path} {_what_it_is(head, path, announced)}")
    file.seek(0)
    return kind


def _what_it_is(head: bytes, path: str, announced: int) -> str:
    for beginning, words in _BEGINNINGS.items():
        if head.startswith(beginning):
            return words
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it, and name the file in it"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page, not the weights: the link led to a page (a login, or a question to confirm); open it in a "
            "browser, and download the file from there"
        )
    if text.startswith((b"{", b"[")) and b"\0" not in head:
        return "is JSON text, not weights, whatever its name ends with: name the file that holds the weights"
    if path.endswith(".safetensors") and len(head) < 9:
        return TRUNCATED.format(f"{len(head)} bytes hold no header")
    if path.endswith(".safetensors") or head[8:9] == b"{":
        return (
            f"is no safetensors file, or its header lies: it would be {announced} bytes long, and the format allows "
            f"{LONGEST_HEADER}; fetch it again"
        )
    return (
        f"is no checkpoint: it begins with {head[:12]!r}, as neither torch.save nor safetensors writes it; name an ema "
        "or model file"
    )


def _check_safetensors(file: IO[bytes], path: str, announced: int, size: int) -> None:
    """:raises CheckpointError: the file is shorter than its header, or than what the header says of the tensors."""
    if 8 + announced > size:
        words = f"its header is to be {announced} bytes long, and {size - 8} bytes follow"
        raise CheckpointError(f"{path} {TRUNCATED.format(words)}")
    file.seek(8)
    try:
        header: dict[str, Any] = json.loads(file.read(announced))
        needed = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        there = size - 8 - announced
        short, long = needed > there, needed < there
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its safetensors header cannot be read ({type(error).__name__}); fetch it again"
        ) from None
    if short:
        words = f"its tensors take {needed} bytes, and {there} are there"
        raise CheckpointError(f"{path} {TRUNCATED.format(words)}")
    if long:
        raise CheckpointError(
            f"{path} is damaged: its header describes {needed} bytes of tensors, and {there} follow; fetch it again"
        )


def check_archive(file: IO[bytes], path: str) -> None:
    """Leaves `file` at its beginning. :raises CheckpointError: a zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from None
    finally:
        file.seek(0)
    base = [name.rsplit("/", 1)[-1] for name in names]
    if "constants.pkl" in base:
        raise CheckpointError(
            f"{path} is a TorchScript program, which would be run by reading it: save the state_dict of the network "
            "with torch.save instead"
        )
    if "data.pkl" not in base:
        held = ", ".join(names[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is a zip archive that torch.save did not write (it holds {held}): unpack it, and name the file in "
            "it"
        )


def why_unreadable(path: str, kind: str, error: Exception) -> CheckpointError:
    """What kept torch from reading a file that seemed to be its own. Nothing of the file is executed for it."""
    with open_file(path, "rb") as file:  # anew: torch reads past the buffer of the one that it was given
        return _why_unreadable(file, path, kind, error)


def _why_unreadable(file: IO[bytes], path: str, kind: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        if kind == ZIP:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
                if bad is not None:
                    return CheckpointError(f"{path} is damaged: the content of {bad} has changed; fetch it again")
                name = next(name for name in archive.namelist() if name.rsplit("/", 1)[-1] == "data.pkl")
                objects = foreign_objects(globals_in(archive.read(name)))
        else:
            objects = foreign_objects(globals_in_stream(file))
    except CutPickleError as cut:
        return CheckpointError(f"{path} {TRUNCATED.format(cut)}")
    except Exception as further:  # a file can be broken in any way, and this reads it without trust
        return CheckpointError(f"{path} is damaged ({type(further).__name__}: {further}); fetch it again")
    if objects:
        return PickledObjectsError(path, objects)
    if "unexpected EOF" in str(error):
        return CheckpointError(f"{path} {TRUNCATED.format('the last of its tensors are not whole')}")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return CheckpointError(f"{path} asks for more memory than is free ({reason}): free some; or it is damaged")
    if "weights_only" in str(error) or "WeightsUnpickler" in str(error):  # torch's advice is to switch that off
        reason = "its pickle holds what no state dict does"
    return CheckpointError(f"{path} is damaged, or no file of torch.save ({reason}); fetch it again")
