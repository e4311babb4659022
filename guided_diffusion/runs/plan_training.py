"""What a training would take, before it is paid for: image_train.py --dry_run True."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from ..data.specs import get_spec
from ..dist_util import World
from ..fp16_util import PRECISIONS
from ..image_datasets import LayoutDataset, training_batches
from ..script_util import create_gaussian_diffusion, create_model
from ..settings import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    resolve_precision,
)
from ..weights import store
from ..weights.transfer import Request
from .footprint import Batch, Pass, Passes, Pretence, blank_batch, largest_batch, training_pass
from .log_directory import LogDirectory
from .optimizers import load_optimizer_state
from .plan import (
    NO_TIME,
    NOT_COUNTED,
    OPERATIONS,
    Log,
    check_folder,
    device_words,
    duration,
    existing,
    gib,
    memory_limit,
    picture_size,
    planned_device,
    tell_network,
    tell_table,
)
from .resume import Start, find_start


@dataclasses.dataclass(frozen=True)
class TrainingCount:
    """What one rank of a training takes, in bytes and floating-point operations.

    :param static: bytes that are there all the time, by part. :param passes: over microbatches, gradients included.
    """

    static: dict[str, int]
    passes: Passes

    def total(self, microbatch: int) -> int:
        """Bytes at the worst moment of a step."""
        return sum(self.static.values()) + self.passes.peak(microbatch)


def count_training(
    model_config: ModelConfig,
    diffusion_config: DiffusionConfig,
    config: TrainConfig,
    device_type: str,
    batches: tuple[Batch, Batch],
    *,
    ranks: int = 1,
    look_up: bool = False,
) -> TrainingCount:
    """Counts a rank's training step, with recomputation where `model_config` says so.

    :param device_type: "cpu", or any other for a GPU. :param batches: two microbatches of different size; their content
        matters only where layouts are looked up.
    """
    pretence = Pretence.of(device_type)
    with torch.device("meta"):
        model = create_model(model_config, diffusion_config.learn_sigma)
    model = pretence.network(model, training=True)
    model.dtype = PRECISIONS[resolve_precision(config.precision, model_config.use_fp16)]
    sizes = [parameter.numel() for parameter in model.parameters()]
    diffusion_config = dataclasses.replace(diffusion_config, timestep_respacing="")

    def count(batch: Batch) -> Pass:
        return training_pass(
            pretence,
            model,
            create_gaussian_diffusion(diffusion_config).training_losses,
            batch,
            model_config.num_classes,
            gradients_stay=ranks > 1 or 0 < config.microbatch < config.batch_size,
            look_up=look_up,
        )

    static = {
        "weights": 4 * sum(sizes),
        "optimizer": 2 * 4 * (_largest_share(sizes, ranks) if config.shard_optimizer else sum(sizes)),
        "averages": 4 * sum(sizes) * len(config.ema_rates()),
    }
    return TrainingCount(static, Passes(*map(count, batches)))


def _largest_share(sizes: list[int], ranks: int) -> int:
    """Parameters of the rank that has most, as ZeroRedundancyOptimizer deals them out: the largest first, each to the
    rank that has least."""
    shares = [0] * ranks
    for size in sorted(sizes, reverse=True):
        shares[shares.index(min(shares))] += size
    return max(shares)


def plan_training(
    plan: PlanConfig,
    *,
    config: TrainConfig,
    model_config: ModelConfig,
    diffusion_config: DiffusionConfig,
    data: DataConfig,
    dataset: LayoutDataset | None,
    validation: LayoutDataset | None,
    world: World,
    logdir: str,
    log: Log,
) -> int:
    """Prints what the training would take, on rank 0. A collective. Returns the exit status.

    :param dataset: None: there is none at hand.
    :raises ConfigError, DataError, CheckpointError: what a start would be refused for.
    """
    sharing = world.sharing_memory()
    ranks, device_type = plan.plan_ranks or world.size, planned_device(plan, world)
    microbatch = config.microbatch if config.microbatch > 0 else config.batch_size
    global_batch = config.batch_size * ranks

    def tell() -> None:
        sizes = [split.shape for split in (dataset, validation) if split] or [picture_size(data, model_config)]
        spec = (
            dataset.spec
            if dataset is not None
            else get_spec(data.dataset_mode, data.data_dir or None, model_config.num_classes)
        )
        start = _check(
            config, model_config, diffusion_config, sizes, global_batch, spec.class_names, world, logdir, log
        )
        batches = _first_batches(dataset, config, microbatch, start.samples_seen)
        look_up = batches is not None and config.looks_layouts_up(device_type)
        if batches is None:
            shape = (sizes[0], model_config.num_classes, not model_config.no_instance)
            batches = blank_batch(microbatch, *shape), blank_batch(microbatch + 1, *shape)
        counts = {
            recompute: count_training(
                dataclasses.replace(model_config, use_checkpoint=recompute),
                *(diffusion_config, config, device_type, batches),
                ranks=ranks,
                look_up=look_up,
            )
            for recompute in (False, True)
        }
        log(f"plan of a training, for each of {ranks} rank{'s' * (ranks > 1)}; nothing is written, no step is trained")
        tell_network(model_config, diffusion_config, sizes[0], log)
        passes = counts[model_config.use_checkpoint].passes
        forward, step = passes.first(microbatch) / microbatch, passes.operations(microbatch) / microbatch
        log(
            f"{OPERATIONS}: {forward / 1e12:.4g} forward, {step / 1e12:.4g} in a training step "
            f"({step / forward:.2f} times as many{', with recomputation' * model_config.use_checkpoint})"
        )
        log(
            f"memory, in GiB, in {resolve_precision(config.precision, model_config.use_fp16)}, {microbatch} "
            f"image{'s' * (microbatch > 1)} of {sizes[0][0]}x{sizes[0][1]} at a time, counted for "
            f"{device_words(device_type)}, with "
            + ("layouts looked up as in the run's first batches" if look_up else "one-hot layouts")
        )
        _tell_memory(counts, microbatch, config, model_config.use_checkpoint, log)
        _tell_largest(counts, memory_limit(plan, device_type, world, sharing), log)
        log(NOT_COUNTED)
        size, free = sum(counts[False].static.values()), shutil.disk_usage(existing(logdir)).free
        log(f"disk: {gib(size)} GiB for a checkpoint set; {gib(free)} GiB are free where {logdir} is")
        epoch = None if dataset is None else len(dataset) / global_batch
        if dataset is not None:
            log(
                f"data: {len(dataset)} training images, {len(validation) if validation else 'no'} validation images; "
                f"an epoch is {epoch:.4g} steps of {global_batch}"
            )
        log(NO_TIME if not plan.peak_tflops else _time(plan, step * config.batch_size, epoch, config, start.step))
        if dataset is None:
            log("not checked: the data set (no --data_dir)")

    world.on_main(tell)
    return 0


def _check(
    config: TrainConfig,
    model_config: ModelConfig,
    diffusion_config: DiffusionConfig,
    sizes: list[tuple[int, int]],
    global_batch: int,
    class_names: Sequence[str],
    world: World,
    logdir: str,
    log: Log,
) -> Start:
    """Checks sizes, log directory and checkpoints, and says from where the run would start."""
    with torch.device("meta"):
        model = create_model(model_config, diffusion_config.learn_sigma)
    try:
        for size in sizes:
            model.check_size(*size)
    except ValueError as error:
        raise ConfigError(f"{error} (--image_size, --channel_mult)") from error
    check_folder(logdir, "logdir", "log directory")
    options = dict(world_size=world.size, global_batch=global_batch, weights_key=config.weights_key)
    request = Request.of(config, class_names, model.layout_channels, model.out[-1].out_channels)
    directory = LogDirectory(logdir, reads_only=True)
    start = find_start(directory, config.resume_checkpoint, config.ema_rates(), **options, log=log, request=request)
    _read_start(start, model, config, log)
    return start


def _read_start(start: Start, model: torch.nn.Module, config: TrainConfig, log: Log) -> None:
    """Reads the files that a start would read. :raises CheckpointError: one is damaged, or of another network."""
    readers: list[tuple[Any, str]] = [(lambda: start.read_model(log), start.model)]
    readers += [(lambda rate=rate: start.read_ema(rate), start.emas.get(rate, "")) for rate in config.ema_rates()]
    for read, path in readers:
        if (state := read()) is not None:
            store.load_state_into(model, state, path)
            model.to("meta")
    if (state := start.read_optimizer()) is not None:
        state.pop("trainer", None)
        try:
            load_optimizer_state(torch.optim.AdamW(model.parameters()), state)
        except (KeyError, ValueError) as error:
            raise store.CheckpointError(
                f"{start.optimizer} does not fit the network that the flags describe ({error}); "
                "start from model.pt instead, which needs no optimizer"
            ) from error


def _first_batches(
    dataset: LayoutDataset | None, config: TrainConfig, microbatch: int, samples_seen: int
) -> tuple[Batch, Batch] | None:
    """The run's first images, as many as a microbatch, and twice as many. :raises DataError: they cannot be read."""
    if dataset is None:
        return None
    batches = []
    for count in (microbatch, 2 * microbatch):
        with training_batches(dataset, batch_size=count, start=samples_seen, num_workers=0) as loaded:
            batch = next(loaded)
        batches.append({name: batch[name] for name in ("image", "label", "instance") if name in batch})
    return batches[0], batches[1]


def _tell_memory(
    counts: dict[bool, TrainingCount], microbatch: int, config: TrainConfig, recompute: bool, log: Log
) -> None:
    """Bytes by part; `counts` by whether activations are recomputed."""
    static = counts[False].static
    lines = [("part", "all activations kept", "recomputed (--use_checkpoint True)")]
    for part, words in (("weights", "float32"), ("optimizer", "AdamW"), ("averages", f"EMA {config.ema_rate}")):
        lines.append((f"{part}, {words}", gib(static[part]), gib(static[part])))
    lines.append(("gradients, float32", gib(static["weights"]), gib(static["weights"])))
    for words, of in (("activations", lambda c: c.passes.kept(microbatch)), ("at most", lambda c: c.total(microbatch))):
        lines.append((words, gib(of(counts[False])), gib(of(counts[True]))))
    lines.append(("as set", "" if recompute else "*", "*" if recompute else ""))
    tell_table(lines, log)
    log("  (at most: at one time; gradients come as activations go, so that it may be less than the sum)")


def _tell_largest(counts: dict[bool, TrainingCount], limit: float | None, log: Log) -> None:
    if limit is None:
        log("largest batch: give --memory_gib, as the planned device is not at hand")
        return
    kept, recomputed = (largest_batch(counts[recompute].total, limit) or "none" for recompute in (False, True))
    log(f"largest batch in {limit / 2**30:.4g} GiB: {kept} with all activations kept, {recomputed} with recomputation")


def _time(plan: PlanConfig, operations: float, epoch: float | None, config: TrainConfig, begin: int) -> str:
    """How long the run takes at the given speed. `operations` of a rank's step, `epoch` in steps."""
    seconds = operations / (plan.peak_tflops * 1e12 * plan.peak_share)
    parts = [f"{duration(seconds)} a step"]
    if epoch is not None:
        parts.append(f"{duration(seconds * epoch)} an epoch")
    last = min((n for n in (config.max_steps, config.lr_anneal_steps) if n > 0), default=0)
    left = max(0, last - begin)
    parts.append(f"{duration(seconds * left)} for {left} steps" if last else "--max_steps N tells it for N steps")
    return f"time at {100 * plan.peak_share:g} % of {plan.peak_tflops:g} T operations a second: {', '.join(parts)}"
