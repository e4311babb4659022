"""Trains SDM on a data set of images and layouts, or fine-tunes it with --drop_rate 0.2.

mpiexec -n 8 python image_train.py --data_dir ./data/ade20k --dataset_mode ade20k ...   (README.md has the commands)
"""

import dataclasses
import os
import sys

import torch

from guided_diffusion import dist_util
from guided_diffusion.checkpoints import CheckpointError, recorded_config
from guided_diffusion.dataset_specs import DataError, MissingSplitError, get_spec
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.logger import Logger
from guided_diffusion.script_util import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TrainConfig,
    build_config,
    create_model,
    parse_flags,
    resolve_precision,
)
from guided_diffusion.train_util import TrainingDiverged, TrainLoop


def main() -> None:
    flags = parse_flags([DataConfig, TrainConfig, ModelConfig, DiffusionConfig], description=__doc__)
    world = dist_util.setup()
    with dist_util.report_errors(
        world, (ConfigError, DataError, CheckpointError, TrainingDiverged, OSError, ImportError)
    ):
        data, config = build_config(DataConfig, flags), build_config(TrainConfig, flags)
        config.check()
        logdir = config.logdir or os.environ.get("OPENAI_LOGDIR") or "OUTPUT/run"
        # Rank 0 reads for all: the other hosts need not see its log directory.
        recorded, source = world.on_main(lambda: recorded_config(logdir, config.resume_checkpoint))
        if recorded is None and "num_classes" not in flags:  # as many as the data set has
            flags["num_classes"] = get_spec(data.dataset_mode, data.data_dir or None).num_classes
        model_config = build_config(ModelConfig, flags, recorded and recorded["model"], source)
        diffusion_config = build_config(DiffusionConfig, flags, recorded and recorded["diffusion"], source)
        resolve_precision(config.precision, model_config.use_fp16)

        dataset, validation = open_splits(data, config, model_config)
        logger = Logger(logdir, active=world.is_main, tensorboard=config.tensorboard)
        logger.log(f"log directory: {os.path.abspath(logdir)}")
        logger.log(world.describe())
        torch.manual_seed(config.seed)
        model = create_model(model_config, diffusion_config.learn_sigma)
        settings = [("data", data), ("training", config), ("model", model_config), ("diffusion", diffusion_config)]
        record = {name: dataclasses.asdict(part) for name, part in settings} | {"torch": torch.__version__}
        logger.log(f"settings: {record}")
        TrainLoop(
            model=model,
            diffusion_config=diffusion_config,
            dataset=dataset,
            validation=validation,
            config=config,
            num_workers=data.num_workers,
            world=world,
            logger=logger,
            logdir=logdir,
            record=record,
        ).run()
        logger.close()


def open_splits(data: DataConfig, config: TrainConfig, model: ModelConfig):
    """The training split, and the evaluation split where there is one."""
    common = dict(
        data_dir=data.data_dir,
        dataset_mode=data.dataset_mode,
        image_size=model.image_size,
        num_classes=model.num_classes,
        use_instances=not model.no_instance,
        seed=config.seed,
        skip_bad=config.skip_bad,
    )
    dataset = open_dataset(
        split="train", random_crop=config.random_crop, random_flip=config.random_flip,
        scale_jitter=config.scale_jitter, **common,
    )  # fmt: skip
    if dataset.has_instances == model.no_instance:
        raise ConfigError(
            f"{data.data_dir} has no instance maps, and the network expects their edges: give --no_instance True"
        )
    try:
        return dataset, open_dataset(split="val", **common)
    except MissingSplitError:
        return dataset, None


if __name__ == "__main__":
    sys.exit(main())
