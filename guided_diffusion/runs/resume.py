"""From where a training run starts: its own newest checkpoint, another run's, or new weights; and the reading of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dist_util import World
from ..fp16_util import PRECISIONS, MixedPrecisionTrainer
from ..hosts.memory import keep_freed_memory
from ..resample import create_schedule_sampler
from ..settings import ConfigError, TrainConfig
from ..unet import UNetModel
from ..weights import store
from ..weights.transfer import Request, Transfer
from .log_directory import LogDirectory
from .optimizers import load_optimizer_state, make_optimizer, to_cpu
from .state import TrainingState

Log = Callable[[str], None]
_PLACES = (
    "logdir",
    "resume_checkpoint",
    "weights_key",
    "transfer_from",
    "class_map",
)  # settings of a start, not of a run


@dataclass(frozen=True)
class Start:
    """The files to start from (empty: new weights, EMAs equal to the weights, a fresh optimizer) and the step."""

    step: int = 0
    samples_seen: int = 0
    model: str = ""
    weights_key: str = ""  # which weights of that file
    emas: dict[str, str] = field(default_factory=dict)  # by rate
    optimizer: str = ""
    continues: bool = False  # the log directory's own run
    fresh_streak: bool = True  # the bad steps in a row that it ended with do not count
    base: dict[str, str] = field(default_factory=dict)  # the checkpoint that the run began from, and its hash
    transfer: Transfer | None = None  # how `model` becomes the weights; None: as it is

    # One file at a time, as every rank of a host gets a copy. :raises CheckpointError: it is damaged.

    def read_model(self, log: Log | None = None) -> dict[str, torch.Tensor] | None:
        """The weights; None: new ones."""
        if self.transfer is not None:
            return self.transfer.weights(log)
        return store.load_weights(self.model, self.weights_key, log) if self.model else None

    def read_ema(self, rate: str) -> dict[str, torch.Tensor] | None:
        """The averaged weights; None: equal to the weights."""
        return store.load_weights(self.emas[rate]) if rate in self.emas else None

    def read_optimizer(self) -> dict[str, Any] | None:
        """The optimizer's state and the trainer's; None: fresh ones."""
        return store.load(self.optimizer) if self.optimizer else None


def find_start(
    directory: LogDirectory,
    resume_checkpoint: str,
    rates: Sequence[str],
    *,
    world_size: int,
    global_batch: int,
    log: Log,
    request: Request | None = None,
    weights_key: str = "",
) -> Start:
    """The newest complete checkpoint of the log directory, else `resume_checkpoint`, or the transfer that is requested,
    else new weights; says which.

    A numbered checkpoint continues at its step, with the EMAs and the optimizer that lie beside it; one without a
    number (model.pt) lends its weights to a new run. Creates nothing.

    :raises CheckpointError: nothing can be continued, but a new run would replace weights in the log directory.
    :raises CheckpointError, ConfigError: see `Request.read`.
    """
    logdir, manifest = directory.folder, directory.newest(log)
    if manifest is not None:
        step = manifest["step"]
        log(f"continuing this log directory's run at step {step}")
        if resume_checkpoint and store.step_of(resume_checkpoint) != step:
            log(f"note: {resume_checkpoint} is not used any more; give another --logdir to start from it again")
        ranks = manifest.get("world_size", world_size)
        if ranks != world_size:
            log(f"note: saved with {ranks} ranks; the data goes on from the samples seen then")
        files = _files_beside(store.join(logdir, store.model_name(step)), step, rates, log)
        base = directory.config().get("start", {})
        if request is not None and request.checkpoint != base.get("transfer_from"):
            log(f"note: {request.checkpoint} is not used any more; give another --logdir to start from it again")
        return Start(
            step=step,
            samples_seen=_samples_seen(manifest, step, global_batch, log),
            continues=True,
            fresh_streak=bool(manifest.get("diverged")),
            base=base,
            **files,
        )
    step = store.step_of(resume_checkpoint)
    if step is None or os.path.realpath(os.path.dirname(resume_checkpoint)) != os.path.realpath(logdir):
        store.check_vacant(logdir)  # a numbered one in it, of another program, is a run that goes on there
    if request is not None:
        transfer = request.read()
        log(f"starting a new run from the weights in {request.checkpoint}, for the classes of the data")
        for line in transfer.table():
            log(f"  {line}")
        return Start(model=request.checkpoint, base=transfer.base(), transfer=transfer)
    if not resume_checkpoint:
        log("starting from new weights")
        return Start()
    base = {}
    if store.exists(resume_checkpoint):
        base = {"checkpoint": resume_checkpoint, "sha256": store.file_hash(resume_checkpoint)}
    if step is None:
        log(f"starting a new run from the weights in {resume_checkpoint}")
        return Start(model=resume_checkpoint, weights_key=weights_key, base=base)
    log(f"continuing at step {step} from {resume_checkpoint}")
    folder = os.path.dirname(resume_checkpoint)
    if not store.exists(resume_checkpoint):
        raise store.CheckpointError(f"there is no checkpoint {resume_checkpoint} (--resume_checkpoint)")
    if (problem := store.damage(folder, step, whole=False)) is not None:
        raise store.CheckpointError(
            f"the checkpoint of step {step} in {folder or '.'} is damaged ({problem}): start from another one"
        )
    seen = _samples_seen(store.read_manifest(folder, step), step, global_batch, log)
    files = _files_beside(resume_checkpoint, step, rates, log)
    return Start(step=step, samples_seen=seen, weights_key=weights_key, base=base, **files)


def _samples_seen(manifest: dict[str, Any], step: int, global_batch: int, log: Log) -> int:
    seen = manifest.get("samples_seen")
    if type(seen) is int and seen >= 0:
        return seen
    log(f"note: no samples_seen in a {store.manifest_name(step)}; the data goes on as after {step} steps")
    return step * global_batch


def check_base(base: dict[str, str], config: TrainConfig) -> None:
    """For a run that has nothing left to do; `base` is what it began from.

    :raises CheckpointError: what it began from was trained further since, so that its weights are not what the command
        asks for (a fine-tuning, where the training before it got more steps).
    """
    asked = [("checkpoint", "sha256", "resume_checkpoint"), ("transfer_from", "sha256", "transfer_from")]
    for key, digest, flag in [*asked, ("class_map", "class_map_sha256", "class_map")]:
        path = base.get(key)
        if path and path == getattr(config, flag) and store.exists(path) and store.file_hash(path) != base[digest]:
            raise store.CheckpointError(
                f"this run is finished, but {path} has changed since it began from it: give another --logdir to begin "
                f"again, or leave --{flag} out to keep the run as it is"
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


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which settings of a run's config.json differ from those of now: "NAME BEFORE -> NOW"."""
    return [
        f"{name} {saved[group][name]!r} -> {value!r}"
        for group in ("data", "training", "model", "diffusion")
        for name, value in now.get(group, {}).items()
        if name in saved.get(group, {}) and saved[group][name] != value and name not in _PLACES
    ]


# -- reading ----------------------------------------------------------------------------------------------------------


def begin_training(
    *,
    model: UNetModel,
    precision: str,
    num_timesteps: int,
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
    config: TrainConfig,
    directory: LogDirectory,
    world: World,
    log: Log,
) -> TrainingState:
    """Finds where to start and reads all that is there; the network goes to this rank's device. A collective.

    Creates no file, so that a start which is refused leaves nothing behind.

    :param model: with new weights, on the CPU. :param precision: a key of PRECISIONS.
    :param num_timesteps: of the objective. :param sizes: (height, width) of the data sets.
    :param class_names: of the data, one for each class of the network.
    :raises ConfigError: the network cannot take images of such a size.
    :raises CheckpointError: what is there is damaged, or does not fit the network; or another run is using it.
    """
    try:
        for size in sizes:
            model.check_size(*size)
    except ValueError as error:
        raise ConfigError(f"{error} (--image_size, --channel_mult)") from error
    rates = config.ema_rates()
    options = dict(world_size=world.size, global_batch=config.batch_size * world.size, weights_key=config.weights_key)
    request = Request.of(config, class_names, model.layout_channels, model.out[-1].out_channels)
    start = world.on_main(
        lambda: find_start(directory, config.resume_checkpoint, rates, **options, log=log, request=request)
    )
    if precision == "fp16" and world.device.type == "cpu":
        log("note: float16 is slow on a CPU; --precision bf16 or fp32 is better there")
    model.dtype = PRECISIONS[precision]
    if world.device.type == "cpu":
        keep_freed_memory()
        # Activations are channels-last here too. Weights are not: their gradients come in the default layout, and
        # every one would have to be copied.
        model = model.to(world.device)
    else:
        model = model.to(world.device, memory_format=torch.channels_last)
    _load_weights(model, start, world, log)
    emas = {rate: _load_average(model, rate, start, world) for rate in rates}
    parameters = list(model.parameters())
    optimizer = make_optimizer(
        parameters, lr=config.lr, weight_decay=config.weight_decay, shard=config.shard_optimizer, world=world
    )
    trainer = MixedPrecisionTrainer(
        parameters,
        optimizer,
        precision=precision,
        scale_growth=config.fp16_scale_growth,
        max_grad_norm=config.max_grad_norm,
    )
    state = TrainingState(
        model=model,
        emas=emas,
        optimizer=optimizer,
        trainer=trainer,
        schedule_sampler=create_schedule_sampler(config.schedule_sampler, num_timesteps),
        base=start.base,
        transfer=start.transfer,
        step=start.step,
        samples_seen=start.samples_seen,
        continues=start.continues,
        saved_step=start.step if start.continues else None,
    )
    _load_optimizer(state, start, config, world)
    return state


def _load_weights(model: UNetModel, start: Start, world: World, log: Log) -> None:
    weights = world.on_main(lambda: start.read_model(log))
    if weights is not None:
        store.load_state_into(model, weights, start.model)
    elif world.size > 1:  # the seed gives every rank the same weights; make sure of it
        model.load_state_dict(world.broadcast_tree(to_cpu(model.state_dict())))


def _load_average(model: UNetModel, rate: str, start: Start, world: World) -> list[torch.Tensor]:
    """In the memory layout of the weights; equal to them where there is no file."""
    weights = world.on_main(lambda: start.read_ema(rate)) or model.state_dict()
    return [
        torch.empty_like(parameter, requires_grad=False).copy_(weights[name])
        for name, parameter in model.named_parameters()
    ]


def _load_optimizer(state: TrainingState, start: Start, config: TrainConfig, world: World) -> None:
    saved = world.on_main(start.read_optimizer)
    if saved is None:
        return
    rest = saved.pop("trainer", None)  # absent in checkpoints of other programs
    try:
        load_optimizer_state(state.optimizer, saved)
    except (KeyError, ValueError) as error:
        raise store.CheckpointError(
            f"{start.optimizer} does not fit the network that the flags describe ({error}); "
            "start from model.pt instead, which needs no optimizer"
        ) from error
    for group in state.optimizer.param_groups:  # the flag counts, not what it was when saved
        group["weight_decay"] = config.weight_decay
    if rest is not None:
        state.load_rest(rest, start.fresh_streak)
