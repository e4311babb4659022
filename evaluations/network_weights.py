"""The published weights of the networks that score: found, downloaded or refused, always with their hash."""

from __future__ import annotations

import hashlib
import math
import pickle
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import NOT_COMPARABLE, EvaluationError, Report
from torch import nn

RANDOM = "random"
RANDOM_SEED = 0
CONNECTION_TIMEOUT = 15  # seconds


@dataclass(frozen=True)
class PublishedWeights:
    """A weights file that published scores rest on; `sha256` is the beginning of its hash."""

    file_name: str
    url: str
    sha256: str


@dataclass(frozen=True)
class Weights:
    """Weights chosen for a run: a file with its hash, or none for random ones; `published` are those scores rest on."""

    path: Path | None
    sha256: str | None
    published: bool

    def describe(self) -> dict[str, Any]:
        """The record of these weights for a report."""
        if self.path is None:
            return {"random seed": RANDOM_SEED, "published": False, "note": NOT_COMPARABLE}
        return {key: str(value) if key == "path" else value for key, value in asdict(self).items()}


def find_weights(choice: str | None, wanted: PublishedWeights, report: Report) -> Weights:
    """The weights to use: `choice` is a file, `random`, or None for the published ones.

    Those are looked for in PyTorch's hub folder (torch.hub.get_dir()) and downloaded there if missing. Raises
    EvaluationError if they cannot be had, naming the URL and the folder, or if the hub folder's copy is damaged.
    """
    if choice == RANDOM:
        report.warn(f"random weights (seed {RANDOM_SEED}): for trying the command; the score is {NOT_COMPARABLE}")
        return Weights(None, None, False)
    if choice is not None:
        path = Path(choice)
        if not path.is_file():
            raise EvaluationError(f"--weights {choice}: no such file (or the word {RANDOM})")
        digest = file_sha256(path)
        published = digest.startswith(wanted.sha256)
        if not published:
            report.warn(f"--weights {choice} is not the published {wanted.file_name}: the score is {NOT_COMPARABLE}")
        return Weights(path, digest, published)
    path = Path(torch.hub.get_dir()) / "checkpoints" / wanted.file_name
    if not path.is_file():
        _download(wanted, path)
    digest = file_sha256(path)
    if not digest.startswith(wanted.sha256):
        raise EvaluationError(f"{path}: sha256 {digest[:16]}... should begin {wanted.sha256}; delete the damaged file")
    return Weights(path, digest, True)


def _download(wanted: PublishedWeights, path: Path) -> None:
    try:
        # asked first with a time limit, since the download itself has none and would hang behind a silent firewall
        urllib.request.urlopen(wanted.url, timeout=CONNECTION_TIMEOUT).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {wanted.url} to {path}")
        torch.hub.download_url_to_file(wanted.url, str(path), hash_prefix=wanted.sha256)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a hash that differs is a RuntimeError
        raise EvaluationError(
            f"the weights {wanted.file_name} are not in {path.parent} and cannot be downloaded ({error}). Fetch\n"
            f"  {wanted.url}\non a machine with a network and put the file into\n  {path.parent}\n"
            f"or name it with --weights FILE; --weights {RANDOM} tries the command without ({NOT_COMPARABLE})."
        ) from error


def file_sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fill_network(network: nn.Module, weights: Weights, prefix: str = "") -> None:
    """Puts the weights into the network, in place; those of the file whose names begin with `prefix`.

    Random ones are He's normal initialisation from one seed: it keeps the scale of the features through the layers.
    Raises EvaluationError if the file does not hold this network's weights.
    """
    if weights.path is None:
        generator = torch.Generator().manual_seed(RANDOM_SEED)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                deviation = math.sqrt(2 / layer.weight[0].numel())
                nn.init.normal_(layer.weight, std=deviation, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return
    try:
        state = torch.load(weights.path, map_location="cpu", weights_only=True)
        network.load_state_dict({key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)})
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        reason = str(error)[:300]
        raise EvaluationError(f"{weights.path} does not hold the weights of this network: {reason}") from error
