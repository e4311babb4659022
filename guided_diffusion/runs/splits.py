"""The two splits that a training run reads."""

from __future__ import annotations

from ..data.specs import MissingSplitError
from ..image_datasets import LayoutDataset, open_dataset
from ..settings import ConfigError, DataConfig, ModelConfig, TrainConfig


def open_splits(
    data: DataConfig, config: TrainConfig, model: ModelConfig
) -> tuple[LayoutDataset, LayoutDataset | None]:
    """The training split, and the evaluation split where there is one.

    :raises ConfigError: instance maps where the network takes none, or none where it does.
    :raises DataError: see `open_dataset`.
    """
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
        validation = open_dataset(split="val", **common)
    except MissingSplitError:
        return dataset, None
    if validation.has_instances != dataset.has_instances:
        raise ConfigError(
            f"{data.data_dir}: the training split has instance maps, the validation split has none; add them, or give "
            "--no_instance True"
        )
    return dataset, validation
