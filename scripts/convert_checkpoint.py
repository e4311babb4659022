"""Makes a plain checkpoint, OUT.safetensors with config.json beside it, of any file with the weights of an SDM network.

    python scripts/convert_checkpoint.py IN OUT.safetensors [--weights_key NAME] [--trust True] [--num_classes 151 ...]

IN is a .pt, .pth, .ckpt or .safetensors file (or its gs://, az://, https:// address), with its weights in wrappers or
beside other things. Where IN pickles Python objects, inert ones stand in for them, and none of their code runs.
Settings come from the config beside IN, else from the weights; what these do not show comes from the flags, else it is
as published.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import IO, Any

import torch

from guided_diffusion.data.json_text import parse_json
from guided_diffusion.script_util import build_config, create_model, given_of, network_settings, parse_flags
from guided_diffusion.settings import ConfigError, DiffusionConfig, ModelConfig, setting
from guided_diffusion.weights.atomic import atomic_write, write_json
from guided_diffusion.weights.config import CONFIG_NAME, read_config
from guided_diffusion.weights.files import CheckpointError, file_hash
from guided_diffusion.weights.fitting import load_state_into
from guided_diffusion.weights.from_shapes import describe
from guided_diffusion.weights.pickled_objects import PickledObjectsError, load_inert
from guided_diffusion.weights.reading import load, plain_weights
from guided_diffusion.weights.unwrapping import SeveralWeightsError
from guided_diffusion.weights.writing import read_metadata, write_safetensors

WRITER = "scripts/convert_checkpoint.py"
RECORD = "converted"  # the part of config.json that says what it was made of
RISK = (
    "note: --trust True runs whatever code {} names, with all that you may do on this machine: read, send and delete "
    "your files. Use it for files whose author you trust, and nobody else's."
)


@dataclass
class Conversion:
    """The conversion."""

    weights_key: str = setting("", "which weights, where IN holds several, as ema")
    trust: bool = setting(
        False, "where the weights of IN cannot be reached otherwise: run the code that IN names, which may do anything"
    )


def read_content(path: str, trust: bool) -> Any:
    """What the file holds, with a `StandIn` for each object, or with `trust` the objects themselves.

    :raises CheckpointError: it cannot be read, or only with `trust`.
    """
    try:
        return load(path)
    except PickledObjectsError as refusal:
        if trust:
            print(RISK.format(path))
            return load(path, _read_trusting)
        print(f"{path} pickles Python objects ({refusal.names}): inert ones stand in for them, no code of theirs runs")
    return load(path, load_inert)


def _read_trusting(file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(
            f"the objects of this file cannot be made ({type(error).__name__}: {error}): their classes must be "
            "importable, so run this where the program that wrote it is installed"
        ) from error


def read_weights(path: str, config: Conversion) -> dict[str, torch.Tensor]:
    """The network's weights. :raises CheckpointError: none are found."""
    content = read_content(path, config.trust)
    try:
        return plain_weights(content, path, config.weights_key, print)
    except SeveralWeightsError:
        raise
    except CheckpointError as error:
        if config.trust or not _has_objects(path) or "not finite" in str(error):
            raise
        raise CheckpointError(
            f"{error}. They may be inside objects that only their own code opens: --trust True runs that code, which "
            "may do anything; give it only if you trust the author of the file"
        ) from None


def _has_objects(path: str) -> bool:
    try:
        load(path)
    except PickledObjectsError:
        return True
    return False


def check_target(source: str, target: str) -> None:
    """:raises CheckpointError: it is no new file, nor one that this script has written."""
    if not target.endswith(".safetensors") or "://" in target:
        raise CheckpointError(f"{target} is to be a local file, and its name to end with .safetensors")
    if os.path.isdir(target):
        raise CheckpointError(f"{target} is a folder: name a new file, as {os.path.join(target, 'model.safetensors')}")
    if os.path.lexists(target) and read_metadata(target).get("writer") != WRITER:
        raise CheckpointError(f"{target} is there, and this script did not write it: name a new file")


def _is_ours(config: dict[str, Any], target: str) -> bool:
    """Whether this script has written a config for `target`."""
    record = config.get(RECORD)
    return isinstance(record, dict) and record.get("weights") == os.path.basename(target)


def folder_of(path: str) -> str:
    return os.path.dirname(path) or os.curdir


def config_to_write(config: dict[str, Any], source: str, target: str) -> str:
    """The path of the config beside `target`; empty where one is there that says the same.

    :raises CheckpointError: another one is there, or something else.
    """
    path = os.path.join(os.path.dirname(target), CONFIG_NAME)
    if not os.path.lexists(path):
        return path
    there: Any = None
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                there = parse_json(file.read())
        except ValueError:
            pass
    there = there if isinstance(there, dict) else {}
    if _is_ours(there, target):
        return path
    try:  # one network of several files in a folder, or IN's own config
        same = all(
            build_config(kind, {}, there[part]) == build_config(kind, {}, config[part])
            for part, kind in (("model", ModelConfig), ("diffusion", DiffusionConfig))
        )
    except (KeyError, TypeError, ConfigError):
        same = False
    if same:
        return ""
    raise CheckpointError(
        f"{path} is there, and describes something else than {target} would be: choose a folder of its own for that"
    )


def convert(source: str, target: str, flags: dict[str, Any]) -> None:
    """:raises CheckpointError: the source cannot be read, or the target not written; nothing half-written is left.
    :raises ConfigError: flags that contradict the config or the weights."""
    config = build_config(Conversion, flags)
    check_target(source, target)
    given = given_of(flags, ModelConfig, DiffusionConfig)
    recorded, origin = read_config(source, print), f"{CONFIG_NAME} beside {source}"
    if (
        recorded
        and _is_ours(recorded, target)
        and os.path.realpath(folder_of(source)) == os.path.realpath(folder_of(target))
    ):
        recorded = None  # of this script, before: the flags of now count
    if recorded is not None:  # what contradicts it is found before the weights are read
        network_settings(given, recorded, origin)
    state = read_weights(source, config)
    if recorded is None:
        recorded, origin = describe(state, given, source, print)
    model, diffusion, _ = network_settings(given, recorded, origin)
    with torch.device("meta"):
        network = create_model(model, diffusion.learn_sigma)
    load_state_into(network, state, source)
    parts = {"model": dataclasses.asdict(model), "diffusion": dataclasses.asdict(diffusion)}
    record = {"weights": os.path.basename(target), "source": os.path.basename(source), "sha256": file_hash(source)}
    content = recorded | parts | {RECORD: record}
    os.makedirs(folder_of(target), exist_ok=True)
    beside = config_to_write(content, source, target)
    with atomic_write(target) as file:
        write_safetensors(file, state, {"writer": WRITER})
        if beside:
            write_json(beside, content)
    print(f"wrote {target} ({len(state)} weights) and {beside}" if beside else f"wrote {target} ({len(state)} weights)")


def main() -> None:
    words = sys.argv[1:]
    places = [words.pop(0) for _ in range(2) if words and not words[0].startswith("--")]
    flags = parse_flags([Conversion, ModelConfig, DiffusionConfig], words, description=__doc__)
    if len(places) < 2:
        raise SystemExit(f"convert_checkpoint: give IN and OUT first: python {WRITER} IN OUT.safetensors")
    try:
        convert(*places, flags)
    except (CheckpointError, ConfigError, OSError) as error:
        raise SystemExit(f"convert_checkpoint: {error}") from None


if __name__ == "__main__":
    main()
