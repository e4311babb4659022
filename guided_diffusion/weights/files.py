"""Files of checkpoints, on this machine or, by blobfile, in a bucket; and the error that names them."""

from __future__ import annotations

import hashlib
import os
from typing import IO, Any

import blobfile

from ..data.json_text import parse_json


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and the remedy."""


def open_file(path: str, mode: str) -> IO:
    """A file on this machine or, by blobfile, an object in a bucket (which takes a colon in a name for a URL)."""
    return blobfile.BlobFile(path, mode) if "://" in path else open(path, mode)


def exists(path: str) -> bool:
    """Whether there is such a file, local or a blobfile URL."""
    return blobfile.exists(path) if "://" in path else os.path.exists(path)


def read_json(path: str) -> dict[str, Any]:
    """The object that a JSON file holds; empty where there is none."""
    try:
        with open_file(path, "rb") as file:
            content = parse_json(file.read())
    except (OSError, ValueError, blobfile.Error):
        return {}
    return content if isinstance(content, dict) else {}


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, local or a blobfile URL."""
    return blobfile.join(folder, name) if "://" in folder else os.path.join(folder, name)


def file_hash(path: str) -> str:
    """The SHA-256 of a file (local or a blobfile URL)."""
    digest = hashlib.sha256()
    with open_file(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
