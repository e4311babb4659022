"""Which settings of a checkpoint's run hold for a training that takes its weights over to other data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.listing import has_instance_maps
from ..data.specs import get_spec
from ..settings import ConfigError, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from . import store
from .checkpoint_classes import known_classes
from .from_shapes import describe, read_shapes

_PREDICTIONS = ("predict_xstart", "predict_v")
# What a flag says of these is of the new network, and need not be so in the checkpoint.
_ADAPTED = ("image_size", "attention_resolutions", "channel_mult", "learn_sigma", "num_classes", "no_instance")


def settings_to_start(
    given: dict[str, Any], config: TrainConfig, data: DataConfig, logdir: str, note: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str]:
    """The settings that a new start is bound to, and the file they stand in: see `store.recorded_config`. For a run
    that begins with a transfer, those of the checkpoint that do not depend on its data (see `carried_settings`).

    :param given: the flags. :param note: is told how a checkpoint was read.
    :raises CheckpointError: there is no such checkpoint; or the run in `logdir` did not begin with a transfer.
    :raises ConfigError: see `carried_settings`. :raises DataError: see `get_spec`.
    """
    recorded, source = store.recorded_config(logdir, config.resume_checkpoint, note)
    if config.transfer_from and not store.manifest_steps(logdir):
        return _settings_of(config.transfer_from, config.weights_key, given, data, note)
    if config.transfer_from and "transfer_from" not in (recorded or {}).get("start", {}):
        raise store.CheckpointError(
            f"the run in {logdir} did not begin with --transfer_from, and would go on: give another --logdir to begin "
            f"one from {config.transfer_from}, or leave --transfer_from out"
        )
    return recorded, source


def _settings_of(
    checkpoint: str, key: str, given: dict[str, Any], data: DataConfig, note: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """What is carried over from the config beside a checkpoint, else from what its weights show."""
    if not store.exists(checkpoint):
        raise store.CheckpointError(f"there is no checkpoint {checkpoint} (--transfer_from)")
    recorded, source = store.read_config(checkpoint, note), f"{store.CONFIG_NAME} beside {checkpoint}"
    if recorded is None:
        weights = store.load_weights(checkpoint, key)
        names, edge = known_classes(checkpoint, read_shapes(weights, checkpoint).layout_channels)
        own = {name: value for name, value in given.items() if name not in _ADAPTED}
        split = {"num_classes": len(names), "no_instance": not edge}
        # The split is known by the classes' names, and the checkpoint's own image size counts for nothing.
        recorded, source = describe(weights, own | split, checkpoint, note, silent=("image_size", *split))
    classes = {}
    if "num_classes" not in given or "no_instance" not in given:
        spec = get_spec(data.dataset_mode, data.data_dir or None, given.get("num_classes"))
        classes["num_classes"] = spec.num_classes
        classes["no_instance"] = bool(data.data_dir) and not has_instance_maps(spec, data.data_dir, "train")
    return carried_settings(recorded, {**classes, **given}, source), source


def carried_settings(recorded: dict[str, Any], given: dict[str, Any], source: str) -> dict[str, Any]:
    """A record like config.json's with what a transfer carries over, so that a flag which contradicts it is refused.

    Carried over: the network and what it predicts. Free: number of classes, instance edge, learned variance, and the
    image size, as no weight depends on it: attention keeps its downsampling factors.

    :param recorded: the checkpoint's config. :param given: flags, with num_classes and no_instance of the new data.
    :param source: the file that `recorded` comes from.
    :raises ConfigError: another prediction; attention or widths at other resolutions.
    """
    model = ModelConfig(**_known(ModelConfig, recorded["model"]))
    diffusion = DiffusionConfig(**_known(DiffusionConfig, recorded["diffusion"]))
    _check_prediction(diffusion, given, source)
    old_size, size = model.image_size, given.get("image_size", model.image_size)
    multipliers = model.channel_mult or ",".join(map(str, model.multipliers()))
    factors = _attention_factors(model)
    if misfit := [factor for factor in factors if size % factor]:
        raise ConfigError(
            f"--image_size {size} cannot be divided by {max(misfit)}: the checkpoint has attention where its images "
            f"are {max(misfit)} times smaller; choose a multiple of {2 ** (len(model.multipliers()) - 1)}"
        )
    resolutions = ",".join(str(size // factor) for factor in factors)
    carried = recorded["model"] | {
        "image_size": size, "channel_mult": multipliers, "attention_resolutions": resolutions,
        "num_classes": given["num_classes"], "no_instance": given["no_instance"],
    }  # fmt: skip
    _check_resolutions(ModelConfig(**_known(ModelConfig, carried)), given, factors, old_size, source)
    return {
        "model": carried,
        "diffusion": recorded["diffusion"] | {"learn_sigma": given.get("learn_sigma", diffusion.learn_sigma)},
        "training": {"precision": recorded.get("training", {}).get("precision", "")},
    }


def _known(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in cls.__dataclass_fields__}


def _attention_factors(model: ModelConfig) -> list[int]:
    """The downsampling factors, of those that the network has, at which it has attention."""
    levels = [2**level for level in range(len(model.multipliers()))]
    return [factor for factor in levels if factor in model.attention_downsamplings()]


def _check_prediction(before: DiffusionConfig, given: dict[str, Any], source: str) -> None:
    now = {name: given.get(name, getattr(before, name)) for name in _PREDICTIONS}
    if now != {name: getattr(before, name) for name in _PREDICTIONS}:
        was, wanted = (
            "the image" if p["predict_xstart"] else "the velocity" if p["predict_v"] else "the noise"
            for p in ({name: getattr(before, name) for name in _PREDICTIONS}, now)
        )
        raise ConfigError(
            f"the checkpoint predicts {was} ({source}), and {wanted} is asked for: weights cannot be converted, as one "
            "follows from the other, and from the noisy image, by factors that change with the timestep; leave "
            "--predict_v and --predict_xstart out"
        )


def _check_resolutions(
    carried: ModelConfig, given: dict[str, Any], factors: list[int], old_size: int, source: str
) -> None:
    """:raises ConfigError: flags put widths or attention elsewhere than the checkpoint has them."""
    flags = {name: given[name] for name in ("channel_mult", "attention_resolutions") if name in given}
    asked = ModelConfig(**vars(carried) | flags)
    if asked.multipliers() != carried.multipliers():
        raise ConfigError(
            f"--channel_mult {asked.channel_mult} contradicts the checkpoint, whose network has {carried.channel_mult} "
            f"({source}); leave the flag out"
        )
    if _attention_factors(asked) != factors:
        raise ConfigError(
            f"--attention_resolutions {asked.attention_resolutions} puts attention elsewhere than the checkpoint has "
            f"it, at 1/{', 1/'.join(map(str, factors))} of image_size {old_size} ({source}): for image_size "
            f"{carried.image_size} give --attention_resolutions {carried.attention_resolutions}, or leave it out"
        )
