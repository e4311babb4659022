"""Trains SDM on a data set of images and layouts, or fine-tunes it with --drop_rate 0.2.

mpiexec -n 8 python image_train.py --data_dir ./data/ade20k --dataset_mode ade20k ...   (README.md has the commands)
"""

import dataclasses
import os
import sys

import torch

from guided_diffusion import dist_util
from guided_diffusion.data.class_lists import CLASSES_KEY, class_record
from guided_diffusion.data.specs import DataError, read_dataset_json
from guided_diffusion.hosts.numerics import set_numerics
from guided_diffusion.logger import Logger
from guided_diffusion.objectives.denoising import Denoising
from guided_diffusion.runs.agreement import check_same_flags
from guided_diffusion.runs.plan_training import plan_training
from guided_diffusion.runs.recorded import recorded_settings
from guided_diffusion.runs.splits import open_splits
from guided_diffusion.runs.stop_signals import EXIT_UNFINISHED
from guided_diffusion.script_util import (
    build_config,
    create_gaussian_diffusion,
    create_model,
    network_settings,
    parse_flags,
)
from guided_diffusion.settings import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from guided_diffusion.train_util import TrainingDiverged, prepare_training
from guided_diffusion.weights.store import CheckpointError


def main() -> int:
    flags = parse_flags([DataConfig, TrainConfig, ModelConfig, DiffusionConfig, PlanConfig], description=__doc__)
    set_numerics()
    world = dist_util.setup()
    with dist_util.report_errors(
        world, (ConfigError, DataError, CheckpointError, TrainingDiverged, OSError, ImportError)
    ):
        check_same_flags(world, flags)
        data, config = build_config(DataConfig, flags), build_config(TrainConfig, flags)
        config.check()
        plan = build_config(PlanConfig, flags)
        data.check()
        logdir = config.logdir or os.environ.get("OPENAI_LOGDIR") or "OUTPUT/run"
        recorded, source, notes = recorded_settings(flags, data, config, logdir, world)
        model_config, diffusion_config, config.precision = network_settings(
            flags, recorded, source, precision=config.precision, training=True
        )
        alone = plan.dry_run and not data.data_dir  # a plan can do without data
        dataset, validation = (None, None) if alone else open_splits(data, config, model_config, recorded)
        logger = Logger(logdir, active=world.is_main, tensorboard=config.tensorboard)
        logger.log(f"log directory: {os.path.abspath(logdir)}")
        for line in (world.describe(), *notes):
            logger.log(line)
        if plan.dry_run:
            return plan_training(
                plan, config=config, model_config=model_config, diffusion_config=diffusion_config, data=data,
                dataset=dataset, validation=validation, world=world, logdir=logdir, log=logger.log,
            )  # fmt: skip
        torch.manual_seed(config.seed)
        model = create_model(model_config, diffusion_config.learn_sigma)
        settings = [("data", data), ("training", config), ("model", model_config), ("diffusion", diffusion_config)]
        record = {name: dataclasses.asdict(part) for name, part in settings} | {"torch": torch.__version__}
        if data.dataset_mode == "custom":  # what ids mean: sampling from label maps alone needs it
            record["dataset_json"] = read_dataset_json(data.data_dir)
        logger.log(f"settings: {record}")
        record[CLASSES_KEY] = class_record(dataset.spec)
        diffusion = create_gaussian_diffusion(dataclasses.replace(diffusion_config, timestep_respacing=""))
        loop = prepare_training(
            model=model,
            objective=Denoising(diffusion),
            diffusion_config=diffusion_config,
            dataset=dataset,
            validation=validation,
            config=config,
            num_workers=data.num_workers,
            world=world,
            logger=logger,
            logdir=logdir,
            record=record,
        )
        finished = loop.run()
        logger.close()
    return 0 if finished else EXIT_UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
