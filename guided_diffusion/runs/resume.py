"""From where a training run starts: its own newest checkpoint, another run's, or new weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dist_util import World
from ..weights import store

Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """The files to start from (empty: new weights, EMAs equal to the weights, a fresh optimizer) and the step."""

    step: int = 0
    samples_seen: int = 0
    model: str = ""
    emas: dict[str, str] = field(default_factory=dict)  # by rate
    optimizer: str = ""
    continues: bool = False  # the log directory's own run
    base: dict[str, str] = field(default_factory=dict)  # the --resume_checkpoint that the run began from, and its hash

    # One file at a time, as every rank of a host gets a copy. :raises CheckpointError: it is damaged.

    def read_model(self) -> dict[str, torch.Tensor] | None:
        """The weights; None: new ones."""
        return store.load_weights(self.model) if self.model else None

    def read_ema(self, rate: str) -> dict[str, torch.Tensor] | None:
        """The averaged weights; None: equal to the weights."""
        return store.load_weights(self.emas[rate]) if rate in self.emas else None

    def read_optimizer(self) -> dict[str, Any] | None:
        """The optimizer's state and the trainer's; None: fresh ones."""
        return store.load(self.optimizer) if self.optimizer else None


def find_start(
    logdir: str, resume_checkpoint: str, rates: Sequence[str], *, world_size: int, global_batch: int, log: Log
) -> Start:
    """The newest complete checkpoint of the log directory, else `resume_checkpoint`, else new weights; says which.

    A numbered checkpoint continues at its step, with the EMAs and the optimizer that lie beside it; one without a
    number (model.pt) lends its weights to a new run. Creates nothing.

    :raises CheckpointError: nothing can be continued, but a new run would replace weights in the log directory.
    """
    manifest = store.newest_complete(logdir, log)
    if manifest is not None:
        step = manifest["step"]
        log(f"continuing this log directory's run at step {step}")
        if resume_checkpoint and store.step_of(resume_checkpoint) != step:
            log(f"note: {resume_checkpoint} is not used any more; give another --logdir to start from it again")
        if manifest["world_size"] != world_size:
            log(f"note: saved with {manifest['world_size']} ranks; the data goes on from the samples seen then")
        files = _files_beside(store.join(logdir, store.model_name(step)), step, rates, log)
        base = (store.read_config(os.path.join(logdir, store.MODEL_NAME)) or {}).get("start", {})
        return Start(step=step, samples_seen=manifest["samples_seen"], continues=True, base=base, **files)
    step = store.step_of(resume_checkpoint)
    if step is None or os.path.realpath(os.path.dirname(resume_checkpoint)) != os.path.realpath(logdir):
        store.check_vacant(logdir)  # a numbered one in it, of another program, is a run that goes on there
    if not resume_checkpoint:
        log("starting from new weights")
        return Start()
    base = {}
    if store.exists(resume_checkpoint):
        base = {"checkpoint": resume_checkpoint, "sha256": store.file_hash(resume_checkpoint)}
    if step is None:
        log(f"starting a new run from the weights in {resume_checkpoint}")
        return Start(model=resume_checkpoint, base=base)
    log(f"continuing at step {step} from {resume_checkpoint}")
    folder = os.path.dirname(resume_checkpoint)
    if not store.exists(resume_checkpoint):
        raise store.CheckpointError(f"there is no checkpoint {resume_checkpoint} (--resume_checkpoint)")
    if (problem := store.damage(folder, step, whole=False)) is not None:
        raise store.CheckpointError(
            f"the checkpoint of step {step} in {folder or '.'} is damaged ({problem}): start from another one"
        )
    manifest = store.read_manifest(folder, step)
    if "samples_seen" not in manifest:
        log(f"note: no {store.manifest_name(step)} beside it; the data goes on as after {step} steps")
    seen = manifest.get("samples_seen", step * global_batch)
    return Start(step=step, samples_seen=seen, base=base, **_files_beside(resume_checkpoint, step, rates, log))


def check_base(start: Start, resume_checkpoint: str) -> None:
    """For a run that has nothing left to do.

    :raises CheckpointError: what it began from was trained further since, so that its weights are not what the command
        asks for (a fine-tuning, where the training before it got more steps).
    """
    path = start.base.get("checkpoint")
    if not path or path != resume_checkpoint or not store.exists(path):
        return
    if store.file_hash(path) != start.base["sha256"]:
        raise store.CheckpointError(
            f"this run is finished, but {path} has changed since it began from it: give another --logdir to begin "
            "again, or leave --resume_checkpoint out to keep the run as it is"
        )


def _files_beside(model: str, step: int, rates: Sequence[str], log: Log) -> dict[str, Any]:
    folder = os.path.dirname(model)
    emas = {rate: store.join(folder, store.ema_name(rate, step)) for rate in rates}
    optimizer = store.join(folder, store.optimizer_name(step))
    for rate in [rate for rate, path in emas.items() if not store.exists(path)]:
        log(f"note: there is no {emas.pop(rate)}; the EMA of rate {rate} starts from the weights")
    if not store.exists(optimizer):
        log(f"note: there is no {optimizer}; the optimizer starts fresh")
        optimizer = ""
    return {"model": model, "emas": emas, "optimizer": optimizer}


def changed_settings(logdir: str, now: dict[str, Any]) -> list[str]:
    """Which settings differ from those that the run in `logdir` was saved with: "NAME BEFORE -> NOW"."""
    saved = store.read_config(os.path.join(logdir, store.MODEL_NAME)) or {}
    return [
        f"{name} {saved[group][name]!r} -> {value!r}"
        for group in ("data", "training", "model", "diffusion")
        for name, value in now.get(group, {}).items()
        if name in saved.get(group, {}) and saved[group][name] != value and name not in ("logdir", "resume_checkpoint")
    ]


def collect_sharded_state(optimizer: torch.optim.Optimizer, world: World) -> None:
    """Brings every rank's part of a ZeroRedundancyOptimizer's state to rank 0, for its `state_dict`. A collective.

    In place of `consolidate_state_dict`, which sends each part to every GPU in one piece, and while packing it keeps
    the interpreter from anything else: for minutes at the published size, in which the rank would pass for dead.
    """
    part = to_cpu(optimizer.optim.state_dict())
    optimizer._all_state_dicts = world.collect_trees(part)


def to_cpu(tree: Any) -> Any:
    """Nested dicts and lists with their tensors copied to the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu().contiguous()
    if isinstance(tree, dict):
        return {key: to_cpu(value) for key, value in tree.items()}
    return [to_cpu(value) for value in tree] if isinstance(tree, list) else tree


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, with every average in the memory layout of its parameter.

    The fused kernels read both as flat memory: with layouts that differ they would pair the wrong elements. Which
    kernels are used stays as it was: a file of another program names none, and the default's would be slow.
    """
    kernels = [{key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, kernels, strict=True):
        group.update(kept)
    # ZeroRedundancyOptimizer keeps what it works with in an optimizer of its own, and a second copy beside it.
    sharded = hasattr(optimizer, "optim")
    if sharded:
        optimizer.state.clear()
    for parameter, values in (optimizer.optim if sharded else optimizer).state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
            else:  # the step count
                values[name] = value.to(parameter.device)
