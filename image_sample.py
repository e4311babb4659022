"""Turns layouts into images with a trained network and classifier-free guidance.

mpiexec -n 8 python image_sample.py --model_path .../ema_0.9999_best.pt --s 1.5 ...   (README.md has the commands)
"""

import dataclasses
import sys

from guided_diffusion import dist_util
from guided_diffusion.hosts.numerics import set_numerics
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.runs.agreement import check_same_flags
from guided_diffusion.runs.picture_record import sampling_record
from guided_diffusion.runs.plan_sampling import plan_sampling, pretended_pipeline
from guided_diffusion.runs.sampling_run import SampleRun
from guided_diffusion.runs.splits import open_layouts
from guided_diffusion.runs.stop_signals import EXIT_UNFINISHED
from guided_diffusion.script_util import build_config, given_of, parse_flags
from guided_diffusion.settings import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    PlanConfig,
    SampleConfig,
    check_guidance,
)
from guided_diffusion.weights import store


def main() -> int:
    flags = parse_flags([SampleConfig, DataConfig, ModelConfig, DiffusionConfig, PlanConfig], description=__doc__)
    set_numerics()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    world = dist_util.setup()
    with dist_util.report_errors(
        world, (ConfigError, ValueError, FileNotFoundError, FloatingPointError, store.CheckpointError)
    ):
        check_same_flags(world, flags)
        config = build_config(SampleConfig, flags)
        check_guidance(config.guidance, flags)
        plan = build_config(PlanConfig, flags)
        config.check(needs_model=not plan.dry_run)
        recorded = store.read_config(config.model_path) if config.model_path else None
        data = build_config(DataConfig, flags, recorded and recorded.get("data"), f"{store.CONFIG_NAME} beside it")
        data.check()
        sampling = config.sampling()

        log = print if world.is_main else lambda message: None
        log(f"results folder: {config.results_path}")
        log(world.describe())
        guided_by = sampling.make_guidance().other
        if guided_by == "null" and recorded and recorded.get("training", {}).get("drop_rate") == 0:
            log(f"note: trained with drop_rate 0, so without null layouts: s {config.s:g} guides by noise; --s 1")
        if not guided_by and sampling.guidance != "cfg":
            log(f"note: guidance {sampling.guidance} does nothing at s {sampling.s:g}, which is no guidance; --s 2")
        pipeline = (pretended_pipeline if plan.dry_run else SDMPipeline.from_checkpoint)(
            config.model_path,
            precision=config.precision,
            device=world.device,
            keep_modulations=config.keep_modulations,
            compile=config.compile,
            weights_key=config.weights_key,
            note=log,
            **given_of(flags, ModelConfig, DiffusionConfig),
        )
        pipeline.diffusion(sampling.timestep_respacing, sampling.num_steps)  # impossible steps are found here
        networks = pipeline.networks(sampling)  # and here a checkpoint that cannot guide
        planning = dict(config=config, sampling=sampling, data=data, world=world, log=log)
        if plan.dry_run and not (config.model_path and (data.data_dir or config.labels_dir)):  # a plan does without
            return plan_sampling(plan, pipeline, None, **planning)
        alone = bool(config.labels_dir) and "data_dir" not in flags and "dataset_mode" not in flags
        dataset = open_layouts(config, data, pipeline.model_config, recorded or {}, alone=alone, log=log)
        for network in networks:
            network.model.check_size(*dataset.shape)
        run = SampleRun(
            pipeline=pipeline,
            dataset=dataset,
            config=config,
            sampling=sampling,
            record=sampling_record(config, sampling, pipeline, dataclasses.asdict(data), dataset.spec),
            inputs=[folder for folder in (config.labels_dir, "" if alone else data.data_dir) if folder],
            num_workers=data.num_workers,
            world=world,
            log=log,
        )
        if plan.dry_run:
            return plan_sampling(plan, pipeline, run, **planning)
        finished = run.run()
    return 0 if finished else EXIT_UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
