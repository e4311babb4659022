"""The names that others look for beside the sets of a run: `model.pt`, and `ema_{rate}_best.pt` with best.json.

best.json remembers for each EMA rate the step and loss of the best and, as `measure`, what the loss was measured on:
losses with another measure do not compare. Each manifest repeats it, as the file may be lost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..hosts.set_aside import set_aside
from . import store

BEST_NAME = "best.json"
Note = Callable[[str], None]


def publish_set(folder: str, step: int, rates: Sequence[str], note: Note) -> list[str]:
    """Makes the complete set of `step` the latest: model.pt, and ema_{rate}_best.pt where its loss is the lowest so far
    or no loss is known. Doing it again changes nothing. Returns the rates whose best was updated.

    A best that was measured gives way to a measured set only, and a set whose manifest says that it is not `good` takes
    nothing's place.

    :raises CheckpointError: one of the files cannot be written; it is as it was.
    """
    manifest = store.read_manifest(folder, step)
    good, measure = manifest.get("good", True), manifest.get("measure")
    losses = manifest.get("validation_loss")
    losses = losses if isinstance(losses, dict) else {}
    latest = os.path.join(folder, store.MODEL_NAME)
    if good or not os.path.exists(latest):
        store.publish(os.path.join(folder, store.model_name(step)), latest)
    best = read_best(folder, rates, note)
    updated = []
    for rate in rates:
        target, loss = os.path.join(folder, store.ema_name(rate, "best")), losses.get(rate)
        if not isinstance(loss, (int, float)):
            loss = None
        if rate in best and not (good and _better(loss, measure, best[rate])):
            continue
        if best.get(rate, {}).get("step", step) is None:
            note(f"note: the loss of {target} is not known; it is kept as {set_aside(target, 'unmeasured')}")
        store.publish(os.path.join(folder, store.ema_name(rate, step)), target)
        best[rate] = {"step": step, "loss": loss if loss is not None and math.isfinite(loss) else None}
        if measure is not None:
            best[rate]["measure"] = measure
        updated.append(rate)
    if updated:
        store.write_json(os.path.join(folder, BEST_NAME), best)
    return updated


def _better(loss: float | None, measure: str | None, known: dict[str, Any]) -> bool:
    """Whether a set with this loss (None: not measured) takes the place of the known best."""
    if loss is None:  # the latest counts, where no loss is known at all
        return known["loss"] is None and known["step"] is not None
    before = known["loss"] if known.get("measure") == measure else None
    return math.isfinite(loss) and loss < (math.inf if before is None else before)


def add_losses(folder: str, step: int, rates: Sequence[str], losses: dict[str, float], note: Note) -> list[str]:
    """Puts validation losses into the manifest of a set that was saved without, and publishes it with them. Returns the
    rates whose best was updated.

    :raises CheckpointError: see `publish_set`.
    """
    manifest = store.read_manifest(folder, step) | {"validation_loss": losses}
    store.write_json(os.path.join(folder, store.manifest_name(step)), manifest)
    return publish_set(folder, step, rates, note)


def read_best(folder: str, rates: Sequence[str], note: Note) -> dict[str, dict[str, Any]]:
    """What best.json remembers, by rate. Where it is missing or no such file, what the manifests know of a best that is
    there; where they do not know it either, its step and loss are None.

    :raises OSError: a best.json that cannot be read cannot be set aside.
    """
    path = os.path.join(folder, BEST_NAME)
    best: Any = store.read_json(path) if os.path.exists(path) else {}
    if os.path.exists(path) and not (best and all(_is_entry(entry) for entry in best.values())):
        note(f"note: {path} cannot be read; it is kept as {set_aside(path, 'unreadable')}")
        best = {}
    for rate in rates:
        file = os.path.join(folder, store.ema_name(rate, "best"))
        if rate not in best and os.path.exists(file):
            best[rate] = _recovered(folder, rate, store.file_hash(file))
            note(f"note: best.json does not know {file}; by the manifests it is of {best[rate]}")
    return best


def _is_entry(entry: Any, known: bool = True) -> bool:
    if not isinstance(entry, dict) or "loss" not in entry or not isinstance(entry.get("measure", ""), str):
        return False
    step, loss = entry.get("step"), entry["loss"]
    number = loss is None or (isinstance(loss, (int, float)) and not isinstance(loss, bool) and math.isfinite(loss))
    return number and (type(step) is int or (not known and step is None))


def _recovered(folder: str, rate: str, sha256: str) -> dict[str, Any]:
    """The entry of the best average with this hash, as the manifests know it."""
    manifests = [store.read_manifest(folder, step) | {"step": step} for step in reversed(store.manifest_steps(folder))]
    for manifest in manifests:
        file = manifest.get("files", {}).get(store.ema_name(rate, manifest["step"]))
        if file is not None and file["sha256"] == sha256:
            losses = manifest.get("validation_loss")
            entry = {"step": manifest["step"], "loss": losses.get(rate) if isinstance(losses, dict) else None}
            if manifest.get("measure") is not None:
                entry["measure"] = manifest["measure"]
            if not _is_entry(entry):
                entry["loss"] = None
            return entry
    for manifest in manifests:  # its own set is gone
        bests = manifest.get("best")
        if isinstance(bests, dict) and _is_entry(bests.get(rate), known=False):
            return bests[rate]
    return {"step": None, "loss": None}
