"""What a results folder says of its pictures: the settings they were all made with, and what each was made from.

`sampling.json` has three parts. `images`: every setting that decides an image (of networks the hash, not the path).
`run`: the rest. `pictures`: for each layout's name, hashes of what the network was given (`label`, `instances`), of the
photograph beside it, and of the images that were made (`samples`, by folder). A picture counts as made only where all
of that is as it would be made now, and is as it was. The entry of a picture is written before the picture and after an
older one was removed, so that it is true whenever the run is killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..data.class_lists import moved_classes
from ..data.json_text import parse_json
from ..data.listing import printable
from ..data.own_files import is_plain
from ..data.specs import DatasetSpec
from ..pipeline import SDMPipeline
from ..sampling.guidance import GUIDE
from ..settings import (
    ConfigError,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    Sampling,
    binding_settings,
)
from ..weights import store

# Hashes by what they are of (`samples`: a dict of them by folder); empty where an older version does not say.
Entry = dict[str, Any]
# Settings whose absence on one side is a difference: what the layouts are and mean. Others came with later versions,
# and a record without one was made with its default.
_LAYOUTS = ("data_dir", "labels_dir", "split", "dataset_mode", "remap", "crop")
_FOLDERS = ("data_dir", "labels_dir")
OTHER_SIZE = "a picture of another size"


def fingerprint(pixels: np.ndarray) -> str:
    """A hash (BLAKE2b, 128 bits, in hexadecimal) of an array of any integer type, its shape included."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels, dtype="|u1" if pixels.dtype == np.uint8 else "<i4").tobytes())
    return digest.hexdigest()


def entry_of(sample: Mapping[str, Any]) -> Entry:
    """The entry of a picture made from this sample of a data set (`label`, and `instance` and `image` where present).

    Ids are the network's, at the sampled size: whatever changes them in the data's files or their meaning shows.
    """
    parts = {"label": sample["label"], "instances": sample.get("instance"), "photograph": sample.get("image")}
    arrays = {name: part.numpy() for name, part in parts.items() if part is not None}
    return {
        name: fingerprint(array if name == "photograph" else array.astype(np.int32)) for name, array in arrays.items()
    }


def samples_of(entry: Entry) -> dict[str, str] | None:
    """The hashes of an entry's samples by folder; None in one of an older version, which noted none."""
    samples = entry.get("samples")
    return samples if isinstance(samples, dict) else None


def input_pictures(sample: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """(folder, pixels) of what is stored beside the image of this sample: its ids [H, W], its photograph [H, W, 3]."""
    ids = sample["label"][0].numpy()
    pictures = [("labels", ids if ids.dtype == np.uint8 else ids.astype(np.uint16))]
    return pictures + ([("images", sample["image"].permute(1, 2, 0).numpy())] if "image" in sample else [])


@dataclasses.dataclass(frozen=True)
class Look:
    """A layout as it is now, and what a results folder has of it."""

    entry: Entry
    inputs: dict[str, bool | None]  # whether `labels` and `images` hold what they should; None: nothing
    samples: dict[str, str | None]  # by folder: the picture's fingerprint, or OTHER_SIZE; "": none; None: no file

    def differs(self, recorded: Entry) -> bool:
        """Whether samples with this entry were made from something else, or are not known to be made from this."""
        if "label" not in recorded:  # an older version: the label map that it wrote is all there is to go by
            return not self.inputs["labels"]
        return any(recorded.get(part) != self.entry.get(part) for part in ("label", "instances"))

    def missing_samples(self, recorded: Entry) -> list[int]:
        """Which samples are not there, no pictures, or not those that were made."""
        foreign = self.foreign_samples(recorded)
        return [i for i, (folder, found) in enumerate(self.samples.items()) if not found or folder in foreign]

    def foreign_samples(self, recorded: Entry) -> list[str]:
        """The folders where a picture has taken the place of the sample that was made. Older versions noted no hashes:
        a picture of the right size counts as made then."""
        known = samples_of(recorded)
        return [
            folder
            for folder, found in self.samples.items()
            if found and (found == OTHER_SIZE or (known is not None and found != known.get(folder)))
        ]

    def inputs_agree(self) -> bool:
        """Whether `labels` and `images` hold what they should."""
        return all(self.inputs.values())


def sampling_record(
    config: SampleConfig,
    sampling: Sampling,
    pipeline: SDMPipeline,
    data: dict[str, Any],
    spec: DatasetSpec,
) -> dict[str, Any]:
    """The parts `images` and `run` of a new record; folders are absolute, links in them resolved."""
    layouts = {"labels_dir": config.labels_dir} if config.labels_dir else {"data_dir": data["data_dir"]}
    layouts = {key: _folder(value) for key, value in layouts.items()}
    layouts |= {} if config.labels_dir else {"split": config.split}
    meaning = {"remap": dict(spec.remap), "crop": spec.crop, "classes": list(spec.class_names)}
    chosen = dataclasses.asdict(sampling)
    guide = chosen.pop(GUIDE)
    record = {
        "images": {
            "model_sha256": store.file_hash(config.model_path),
            **({"guide_sha256": store.file_hash(guide)} if pipeline.guide(sampling) else {}),
            **({"weights_key": config.weights_key} if config.weights_key else {}),
            "seed": config.seed,
            "precision": pipeline.precision,
            **chosen,
            "dataset_mode": data["dataset_mode"],
            **layouts,
            **(meaning if spec.name == "custom" else {}),
            "grey": pipeline.grey,
            **binding_settings(pipeline.model_config),
            **binding_settings(pipeline.diffusion_config),
        },
        "run": {
            "settings": dataclasses.asdict(config),
            "data": data,
            "model": dataclasses.asdict(pipeline.model_config),
            "diffusion": dataclasses.asdict(pipeline.diffusion_config),
            "torch": torch.__version__,
        },
    }
    return json.loads(json.dumps(record))  # as it reads when it comes back


def read_record(path: str) -> dict[str, Any] | None:
    """A record that was written before, None where there is none. `pictures` is missing in those of older versions.

    :raises ConfigError: the file is damaged, or not ours.
    """
    if not os.path.lexists(path):
        return None
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read())
        record = {
            part: content[part] for part in ("images", "run", "pictures") if part in content or part != "pictures"
        }
        if not all(isinstance(part, dict) for part in record.values()):
            raise TypeError("its parts are no JSON objects")
        for name, entry in record.get("pictures", {}).items():
            if not is_plain(name) or not isinstance(entry, dict):
                raise ValueError(f"pictures holds {name!r}: {str(entry)[:40]!r}")
        if not _is_time(record["run"].get("made")):  # a figure alone: the pictures are not worth less without it
            record["run"].pop("made", None)
        return record
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged, or no record of a sampling run ({type(error).__name__}: {error}): what made the "
            "pictures of this folder is not known; restore it, or choose another --results_path"
        ) from error


def settings_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps images of two records (their part `images`) apart: a phrase for each setting that differs."""
    defaults: dict[str, Any] = {"grey": False, "precision": "fp32"}
    for group in (Sampling, ModelConfig, DiffusionConfig):
        defaults |= {f.name: f.default for f in dataclasses.fields(group)}
    defaults = json.loads(json.dumps(defaults))
    differences = []
    for key in [*now, *(key for key in before if key not in now)]:
        if key == "classes" and _are_names(before.get(key, [])) and _are_names(now.get(key, [])):
            differences += moved_classes(before.get(key, []), now.get(key, []))  # older records have none
            continue
        missing = None if key in _LAYOUTS else defaults.get(key)
        old, new = before.get(key, missing), now.get(key, missing)
        if key in _FOLDERS and isinstance(old, str) and isinstance(new, str):
            same = _folder(old) == _folder(new)
        else:
            same = old == new
        if not same:
            old, new = (repr(record[key]) if key in record else "none" for record in (before, now))
            differences.append(f"{printable(key)}: {old} there, {new} now")
    return differences


def _folder(path: str) -> str:
    """One spelling for each folder."""
    try:
        return os.path.realpath(path) if path and "://" not in path else path
    except ValueError:  # in a record that was edited: no path at all
        return path


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_time(made: Any) -> bool:
    """Whether this says how many images took how many seconds."""
    numbers = [made.get(part) for part in ("images", "seconds")] if isinstance(made, dict) else [None]
    return all(type(number) in (int, float) and 0 <= number < 1e18 for number in numbers)
