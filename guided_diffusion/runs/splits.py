"""The splits that a training run reads, and the layouts that a sampling run does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..data.class_lists import check_same_meaning
from ..data.specs import MissingSplitError, read_dataset_json
from ..image_datasets import LayoutDataset, holds_network_ids, open_dataset
from ..settings import ConfigError, DataConfig, ModelConfig, SampleConfig, TrainConfig


def open_splits(
    data: DataConfig, config: TrainConfig, model: ModelConfig, recorded: dict[str, Any] | None = None
) -> tuple[LayoutDataset, LayoutDataset | None]:
    """The training split, and the evaluation split where there is one.

    :param recorded: the config of the run that goes on, or of the checkpoint that a new one starts from.
    :raises ConfigError: instance maps where the network takes none, or none where it does.
    :raises DataError: see `open_dataset`; or ids mean something else than what was recorded.
    """
    recorded = recorded or {}
    _check_meaning(recorded, data, model)
    common = dict(
        data_dir=data.data_dir,
        dataset_mode=data.dataset_mode,
        image_size=model.image_size,
        num_classes=model.num_classes,
        use_instances=not model.no_instance,
        instances=data.instances or recorded.get("data", {}).get("instances", ""),
        seed=config.seed,
        skip_bad=config.skip_bad,
    )
    dataset = open_dataset(
        split="train", random_crop=config.random_crop, random_flip=config.random_flip,
        scale_jitter=config.scale_jitter, **common,
    )  # fmt: skip
    if dataset.has_instances == model.no_instance:
        raise ConfigError(
            f"{data.data_dir} has no instance maps, and the network expects their edges: give --instances from_labels"
            " (edges between classes take their place), or --no_instance True"
        )
    try:
        validation = open_dataset(split="val", **common)
    except MissingSplitError:
        return dataset, None
    if validation.has_instances != dataset.has_instances:
        raise ConfigError(
            f"{data.data_dir}: the training split has instance maps, the validation split has none; add them, or give "
            "--instances from_labels (edges between classes take their place) or --no_instance True"
        )
    return dataset, validation


def open_layouts(
    config: SampleConfig,
    data: DataConfig,
    model: ModelConfig,
    recorded: dict[str, Any],
    *,
    alone: bool,
    log: Callable[[str], None],
) -> LayoutDataset:
    """What a sampling run reads: a split, or the label maps of `labels_dir`.

    :param recorded: the checkpoint's config; empty where there is none. :param alone: label maps without a data set:
        their ids mean what those of the training meant, wherever its data is now.
    :raises ConfigError: there are no instance maps, and the network needs their edges. :raises DataError: see
        `open_dataset`; or the ids mean something else than in the training.
    """
    results = bool(config.labels_dir) and holds_network_ids(config.labels_dir)
    if not (alone or results):
        _check_meaning(recorded, data, model)
    dataset = open_dataset(
        data_dir=data.data_dir,
        dataset_mode=data.dataset_mode,
        split=config.split,
        image_size=model.image_size,
        num_classes=model.num_classes,
        use_instances=not model.no_instance,
        labels_dir=config.labels_dir or None,
        instances=data.instances,
        training=False,
        dataset_json=recorded.get("dataset_json") if alone else None,
    )
    log(
        f"layouts: {os.path.dirname(dataset.items[0].label)}"  # the split's folder may have another name
        + (", of a results folder: its ids are taken as the network's" if results else "")
    )
    if dataset.has_instances == model.no_instance:
        raise ConfigError(
            "the network needs instance maps (it was trained with their edges), the data has none: add them, or give"
            " --instances from_labels (edges between classes take their place)"
        )
    return dataset


def _check_meaning(recorded: dict[str, Any], data: DataConfig, model: ModelConfig) -> None:
    """:raises DataError: data of one's own gives ids another meaning than they had in the recorded training."""
    trained_with = recorded.get("dataset_json")
    if trained_with is not None and data.dataset_mode == "custom" and data.data_dir:
        path = os.path.join(data.data_dir, "dataset.json")
        check_same_meaning(trained_with, read_dataset_json(data.data_dir), model.num_classes, path)
