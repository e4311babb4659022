"""The settings that a training is bound to before it starts: those on record, or those that its weights show."""

from __future__ import annotations

from typing import Any

from ..data.specs import get_spec
from ..dist_util import World
from ..settings import DataConfig, TrainConfig
from ..weights import store
from ..weights.from_shapes import describe
from ..weights.transfer_settings import settings_to_start


def recorded_settings(
    flags: dict[str, Any], data: DataConfig, config: TrainConfig, logdir: str, world: World
) -> tuple[dict[str, Any] | None, str, list[str]]:
    """The config of the run in `logdir`, else that of the checkpoint to start from, else what that checkpoint's weights
    show; None for new weights. Of a checkpoint of other classes: what does not depend on them. With it the file
    that it stands in, and lines for a log (of the main rank).

    Where no config says the number of classes and no flag does, `flags` gets the data set's. A collective: rank 0 reads
    for all, as the other hosts need not see its log directory.

    :raises CheckpointError: a checkpoint that cannot be read, or holds something else. :raises ConfigError: the data
        set's classes contradict its weights. :raises DataError: see `get_spec`.
    """
    notes: list[str] = []
    resume = config.resume_checkpoint
    recorded, source = world.on_main(lambda: settings_to_start(flags, config, data, logdir, notes.append))
    if recorded is None and "num_classes" not in flags:
        flags["num_classes"] = get_spec(data.dataset_mode, data.data_dir or None).num_classes
    if recorded is None and resume:
        recorded, source = world.on_main(
            lambda: describe(store.load_weights(resume, config.weights_key), flags, resume, notes.append)
        )
    return recorded, source, notes
