"""The file `dataset.json` of a custom data set: its keys, their types, and what is wrong with them."""

import os
import re
import unicodedata
from typing import Any

import blobfile

from .errors import DataError
from .json_text import parse_json
from .own_files import is_plain

SUFFIXES = ("image_suffix", "label_suffix", "instance_suffix")  # of the files' stems
JSON_KEYS = {
    "classes": list,
    "ignore_id": int,
    "remap": dict,
    "instances": bool,
    "label_encoding": ("ids", "colors", "panoptic"),
    "tolerance": int,
    "segments_info": list,
    "label_scale": bool,
    "crop": ("square", "keep_aspect"),
    "grey": bool,
    "exif": ("refuse", "apply", "ignore"),
    **dict.fromkeys(SUFFIXES, str),
    "icc": ("convert", "ignore"),
    "max_pixels": int,
}


def read_json(path: str) -> dict:
    """The checked content of `dataset.json`; {} where there is none."""
    if not blobfile.exists(path):
        return {}
    with blobfile.BlobFile(path, "rb") as file:
        try:
            settings = parse_json(file.read())
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
    return checked(path, settings)


def checked(path: str, settings: Any) -> dict:
    """The content of `dataset.json` with its keys and types checked."""
    if not isinstance(settings, dict):
        raise DataError(f'{path} must hold one JSON object, such as {{"classes": ["sky", "road"]}}')
    for key, value in settings.items():
        if key not in JSON_KEYS:
            raise DataError(f"{path}: the key {key!r} is unknown; known keys are {', '.join(JSON_KEYS)}")
        kind = JSON_KEYS[key]
        if isinstance(kind, tuple):
            if value not in kind:
                raise DataError(f"{path}: {key} is {value!r}; it must be one of {', '.join(kind)}")
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DataError(f"{path}: {key} is {value!r}; it must be a JSON {_JSON_NAMES[kind]}")
    if settings.get("max_pixels", 1) < 1:
        raise DataError(f"{path}: max_pixels is {settings['max_pixels']}; it must be at least 1")
    if not 0 <= settings.get("tolerance", 0) <= 441:
        raise DataError(f"{path}: tolerance is {settings['tolerance']}; colours are 0 to 441 levels apart")
    if "tolerance" in settings and settings.get("label_encoding") != "colors":
        raise DataError(f'{path}: tolerance is for label maps of colours: "label_encoding": "colors"')
    for name in settings.get("segments_info", []):
        if not isinstance(name, str) or not all(map(is_plain, name.split("/"))):
            raise DataError(f"{path}: segments_info names {name!r}; it must be a file in the folder of the data set")
    for key in SUFFIXES:
        if not is_plain("a" + settings.get(key, "")):
            raise DataError(
                f"{path}: {key} is {settings[key]!r}; it must be the end of a file's name without extension"
            )
    return settings


UNLABELLED = "unlabelled"  # the class that ignore_id adds
_JSON_NAMES = {list: "array", int: "whole number", dict: "object", bool: "true or false", str: "text"}


def json_classes(path: str, entries: list) -> tuple[list[str], dict[int, tuple[int, int, int]]]:
    """Names by id and colours by id from a `classes` array: plain names, or objects with name and color.

    Raises DataError, naming `path`, for an entry that is neither.
    """
    names, colors = [], {}
    for i, entry in enumerate(entries):
        if isinstance(entry, str):
            names.append(entry)
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or set(entry) - {"name", "color"}:
            raise DataError(f'{path}: class {i} is {entry!r}; it must be a name or {{"name": ..., "color": [r, g, b]}}')
        names.append(entry["name"])
        if "color" in entry:
            color = entry["color"]
            whole = isinstance(color, list) and len(color) == 3 and all(type(c) is int for c in color)
            if not whole or not all(0 <= c <= 255 for c in color):
                raise DataError(
                    f"{path}: the color of class {i} is {color!r}; it must be three whole numbers, 0 to 255"
                )
            colors[i] = tuple(color)
    return names, colors


def check_names(path: str, names: list[str], settings: dict) -> None:
    """Raises DataError where a name is not one line of text, or two classes have one: pictures, scores and messages
    would mix them up."""
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
            raise DataError(f"{path}: the name of class {i} is {name!r}; it must be one line of text")
        if name in first:
            raise DataError(
                f"{path}: the classes {first[name]} and {i} are both named {name!r}; rename one, or merge them by remap"
            )
        first[name] = i
    if "ignore_id" in settings and UNLABELLED in first:
        stored = settings["ignore_id"]
        raise DataError(
            f"{path}: ignore_id adds a class {UNLABELLED!r}, and class {first[UNLABELLED]} has that name; rename it, "
            f'or give, in place of ignore_id, "remap": {{"{stored}": {first[UNLABELLED]}}}'
        )


def read_dataset_json(data_dir: str | os.PathLike) -> dict:
    """What `dataset.json` of a custom data set says; {} where there is none. Raises DataError where it is wrong."""
    return read_json(blobfile.join(os.fspath(data_dir), "dataset.json"))


def ignored_class(path: str, stored: int, names: list[str], remap: dict[int, int]) -> str:
    """What is wrong where `ignore_id` is the id of a named class too, with what was probably meant."""
    said = f"{path}: ignore_id {stored} is also the id of class {stored} ({names[stored]!r}), which no pixel would have"
    if remap:
        return f"{said}; name in remap the id that has become {stored} in the files, or leave ignore_id out"
    moved = [f'"{i + 1}": {i}' for i in range(stored, len(names))]
    meant = ", ".join(moved if len(moved) <= 40 else [*moved[:3], "...", moved[-1]])
    return (
        f'{said}; if the files count the other classes around it, say so: "remap": {{{meant}}}; if class {stored} is'
        " itself the one of unlabelled pixels, leave ignore_id out"
    )


def json_remap(path: str, settings: dict) -> dict[int, int]:
    remap: dict[int, int] = {}
    for key, network in settings.get("remap", {}).items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or type(network) is not int or network < 0:
            raise DataError(f'{path}: remap holds {key!r}: {network!r}; it maps ids to ids, such as {{"255": 3}}')
        stored = int(key)
        if stored > 65535:
            raise DataError(f"{path}: remap names the id {stored}; ids in label maps go from 0 to 65535")
        if stored in remap:
            raise DataError(f"{path}: remap names the id {stored} twice, the second time as {key!r}; keep one of them")
        remap[stored] = network
    return remap
