"""What a sampling would take, before it is paid for: image_sample.py --dry_run True."""

from __future__ import annotations

from typing import Any

import torch

from ..dist_util import World
from ..fp16_util import PRECISIONS
from ..pipeline import MEMORY_SHARE, SDMPipeline
from ..script_util import build_config, create_gaussian_diffusion, create_model
from ..settings import DataConfig, DiffusionConfig, ModelConfig, PlanConfig, SampleConfig, Sampling, resolve_precision
from ..unet import UNetModel
from .footprint import Pass, Passes, Pretence, blank_batch, largest_batch, sampling_pass
from .plan import (
    NO_TIME,
    NOT_COUNTED,
    OPERATIONS,
    Log,
    check_folder,
    device_words,
    duration,
    gib,
    memory_limit,
    picture_size,
    planned_device,
    tell_network,
    tell_table,
)
from .sampling_run import SampleRun


def pretended_pipeline(
    path: str,
    *,
    precision: str,
    device: Any,
    keep_modulations: str,
    compile: bool,
    weights_key: str = "",
    note: Log = print,
    **settings: Any,
) -> SDMPipeline:
    """`SDMPipeline.from_checkpoint`, of which only shapes remain once the file is read and checked. An empty path: the
    network of `settings` alone. `device` and `compile` are those of the run to come, and not used.

    :raises ConfigError, CheckpointError: as `from_checkpoint` does.
    """
    options = dict(device="meta", keep_modulations=keep_modulations)
    if path:
        reading = dict(precision=precision, weights_key=weights_key, note=note)
        return SDMPipeline.from_checkpoint(path, **reading, **options, **settings)
    model_config, diffusion_config = build_config(ModelConfig, settings), build_config(DiffusionConfig, settings)
    with torch.device("meta"):
        model = create_model(model_config, diffusion_config.learn_sigma)
    precision = resolve_precision(precision, model_config.use_fp16)
    return SDMPipeline(model, model_config, diffusion_config, precision=precision, **options)


def count_sampling(
    pipeline: SDMPipeline,
    device_type: str,
    size: tuple[int, int],
    *,
    scale: float,
    keep: bool,
    one_layout: bool = False,
    guide: SDMPipeline | None = None,
) -> Passes:
    """Counts the encoding of a batch's layouts and one step, beside the weights.

    :param pipeline: of `pretended_pipeline`. :param device_type: "cpu", or any other for a GPU.
    :param size: (height, width). :param scale: of guidance. :param keep: whether modulations are kept.
    :param one_layout: all images of a batch are of the same layout. :param guide: the network that guides, in place of
        the null layout.
    """
    pretence, config = Pretence.of(device_type), pipeline.model_config

    def network(of: SDMPipeline) -> UNetModel:
        with torch.device("meta"):
            model = create_model(of.model_config, of.diffusion_config.learn_sigma).convert_to(of.model.dtype)
        return pretence.network(model, training=False)

    model, worse = network(pipeline), guide and network(guide)

    def count(images: int) -> Pass:
        return sampling_pass(
            pretence,
            model,
            create_gaussian_diffusion(pipeline.diffusion_config).p_mean_variance,
            blank_batch(1 if one_layout else images, size, config.num_classes, not config.no_instance),
            config.num_classes,
            images=images,
            scale=1.0 if guide else scale,
            keep=keep,
            guide=worse,
        )

    return Passes(count(2), count(3))


def plan_sampling(
    plan: PlanConfig,
    pipeline: SDMPipeline,
    run: SampleRun | None,
    *,
    config: SampleConfig,
    sampling: Sampling,
    data: DataConfig,
    world: World,
    log: Log,
) -> int:
    """Prints what the sampling would take, on rank 0. A collective. Returns the exit status.

    :param pipeline: of `pretended_pipeline`. :param run: None: there are no layouts at hand.
    :raises ConfigError, DataError, CheckpointError: what a start would be refused for.
    """
    sharing = world.sharing_memory()
    ranks, device_type = plan.plan_ranks or world.size, planned_device(plan, world)
    steps = pipeline.diffusion(sampling.timestep_respacing, sampling.num_steps).num_timesteps
    batch, one_layout, guided = config.batch_size, config.samples_per_layout > 1, sampling.s > 1
    guide = pipeline.guide(sampling)

    def tell() -> None:
        check_folder(config.results_path, "results_path", "results folder")
        size = picture_size(data, pipeline.model_config) if run is None else run.dataset.shape
        for network in pipeline.networks(sampling):
            network.model.check_size(*size)
        missing, total = (0, 0) if run is None else run.missing()
        passes = {
            keep: count_sampling(
                pipeline, device_type, size, scale=sampling.s, keep=keep, one_layout=one_layout, guide=guide
            )
            for keep in (True, False)
        }
        log(f"plan of a sampling, for each of {ranks} rank{'s' * (ranks > 1)}; nothing is written, no step is made")
        tell_network(pipeline.model_config, pipeline.diffusion_config, size, log)
        if guide:
            count = sum(parameter.numel() for parameter in guide.model.parameters())
            log(f"guided by {sampling.guide_path}: {count / 1e6:.4g} M parameters; counted below with it")
        layout = passes[True].first(batch) / batch
        step = {keep: (counted.operations(batch) - counted.first(batch)) / batch for keep, counted in passes.items()}
        log(
            f"{OPERATIONS}: {layout / 1e12:.4g} once for its layout, then {step[True] / 1e12:.4g} in each "
            f"{'guided ' * guided}step; {step[False] / 1e12:.4g} in a step where modulations are not kept"
        )
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == pipeline.model.dtype)
        log(
            f"memory, in GiB, in {precision}, {batch} image{'s' * (batch > 1)} of {size[0]}x{size[1]} at a time, "
            f"counted for {device_words(device_type)}"
        )
        layouts = 1 if one_layout else batch
        networks = [network.model for network in pipeline.networks(sampling)]
        weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
        modulations = pipeline.modulation_bytes(*size, sampling)
        limit = memory_limit(plan, device_type, world, sharing)
        keep, why = _keeps(pipeline, sampling, layouts, size, None if limit is None else limit - weights)
        _tell_memory(passes, weights, (layouts + (guided and not guide)) * modulations, batch, keep, log)
        log(f"  (keep_modulations {config.keep_modulations}: {why})")
        if limit is None:
            log("largest batch: give --memory_gib, as the planned device is not at hand")
        else:
            most = [largest_batch(lambda n, p=p: weights + p.peak(n), limit) or "none" for p in passes.values()]
            log(f"largest batch in {limit / 2**30:.4g} GiB: {most[0]} with kept modulations, {most[1]} without")
        log(NOT_COUNTED)
        if run is not None:
            log(f"images: {missing} to make, of {total}")
        operations = layout * keep + steps * step[keep]
        log(NO_TIME if not plan.peak_tflops else _time(plan, operations, steps, -(-missing // ranks)))
        unchecked = [] if config.model_path else ["the checkpoint (no --model_path)"]
        unchecked += [] if run is not None else ["the layouts (no --data_dir), and what the results folder holds"]
        if unchecked:
            log(f"not checked: {'; '.join(unchecked)}")

    world.on_main(tell)
    return 0


def _keeps(
    pipeline: SDMPipeline, sampling: Sampling, layouts: int, size: tuple[int, int], free: int | None
) -> tuple[bool, str]:
    """Whether modulations are kept, as the pipeline decides it in `free` bytes, and why."""
    if pipeline.keep_modulations != "auto":
        return pipeline.keep_modulations == "true", "as set"
    if free is None:
        return True, "kept where memory allows; --memory_gib tells"
    keeping = pipeline.keeping(layouts, *size, free=free, sampling=sampling)
    guide = pipeline.guide(sampling)
    needed = (keeping.layouts + (not guide)) * pipeline.modulation_bytes(*size, sampling)
    parts = f", {keeping.layouts} layouts at a time" if keeping.layouts < layouts else ""
    share = f"{MEMORY_SHARE:.0%} of the memory beside the weights"
    return keeping.keep, f"{gib(needed)} GiB, with the {'guide' if guide else 'null layout'}'s, against {share}{parts}"


def _tell_memory(passes: dict[bool, Passes], weights: int, kept: int, batch: int, keep: bool, log: Log) -> None:
    """Bytes by part; `passes` by whether modulations are kept."""
    tell_table(
        [
            ("part", "modulations kept", "computed anew in every step"),
            ("weights", gib(weights), gib(weights)),
            ("kept modulations", gib(kept), "-"),
            ("at most", *(gib(weights + passes[kept].peak(batch)) for kept in (True, False))),
            ("as set", "*" if keep else "", "" if keep else "*"),
        ],
        log,
    )


def _time(plan: PlanConfig, operations: float, steps: int, images: int) -> str:
    """How long an image of `steps` steps, and a rank's `images` of them, take at the given speed."""
    seconds = operations / (plan.peak_tflops * 1e12 * plan.peak_share)
    line = (
        f"time at {100 * plan.peak_share:g} % of {plan.peak_tflops:g} T operations a second: {duration(seconds)} for "
    )
    return f"{line}an image of {steps} steps" + (f", {duration(seconds * images)} for all" if images else "")
