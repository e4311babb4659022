"""Flags and saved configs of the settings, and the builders of the network and its diffusion."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from .gaussian_diffusion import get_named_beta_schedule
from .hosts.memory import available_memory
from .respace import SpacedDiffusion, space_timesteps, trailing_timesteps
from .settings import ConfigError, DiffusionConfig, ModelConfig, as_setting, check_known, resolve_precision, str2bool
from .unet import UNetModel

Config = TypeVar("Config")


# -- flags ------------------------------------------------------------------------------------------------------------


def parse_flags(classes: Sequence[type], argv: Sequence[str] | None = None, description: str = "") -> dict[str, Any]:
    """The settings that were given as flags, by name, and no others."""
    parser = argparse.ArgumentParser(
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    seen: set[str] = set()
    for cls in classes:
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).splitlines()[0])
        for field in dataclasses.fields(cls):
            if field.name in seen:  # two groups share it
                continue
            seen.add(field.name)
            default, kind, metavar = field.default, type(field.default), type(field.default).__name__.upper()
            if kind is bool:
                kind, metavar = str2bool, "BOOL"
            elif kind is tuple:  # text here; `build_config` makes numbers of it
                kind, metavar, default = str, "LOW,HIGH", ",".join(f"{value:g}" for value in default)
            group.add_argument(
                f"--{field.name}",
                type=kind,
                metavar=metavar,
                help=f"{field.metadata['help']} (default: {default or repr(default)})".replace("%", "%%"),
            )
    given, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse alone would print every flag there is, and not the one that is meant
        near = {
            word: difflib.get_close_matches(word.split("=")[0], [f"--{name}" for name in seen], n=1) for word in unknown
        }
        words = [f"{word} (is {match[0]} meant?)" if match else word for word, match in near.items()]
        parser.exit(2, f"error: unknown arguments: {' '.join(words)}; --help lists the known ones\n")
    return vars(given)


def build_config(
    cls: type[Config], given: dict[str, Any], recorded: dict[str, Any] | None = None, source: str = ""
) -> Config:
    """A config from flags, over what a checkpoint's config recorded, over the defaults.

    :param given: as the flags' parser makes them, or Python values that mean the same, as channel_mult=(1, 2).
    :param source: the file that `recorded` comes from.
    :raises ConfigError: a value of another type, or a flag that contradicts a recorded value that binds the network.
    """
    names = {field.name: field for field in dataclasses.fields(cls)}
    own = {name: as_setting(name, names[name].default, value) for name, value in given.items() if name in names}
    old = {name: value for name, value in (recorded or {}).items() if name in names}
    config = cls(**{**old, **own})
    if recorded is not None:
        before = cls(**old)
        for name in own:
            if names[name].metadata["binding"] and _comparable(config, name) != _comparable(before, name):
                raise ConfigError(
                    f"--{name} {own[name]} contradicts the checkpoint, which was trained with {name} "
                    f"{getattr(before, name)!r} ({source}); leave the flag out, or choose another checkpoint"
                )
    return config


def given_of(flags: dict[str, Any], *classes: type) -> dict[str, Any]:
    """Those of the flags that are settings of the `classes`."""
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    return {name: value for name, value in flags.items() if name in names}


def network_settings(
    given: dict[str, Any],
    recorded: dict[str, Any] | None,
    source: str = "",
    *,
    precision: str = "",
    training: bool = False,
) -> tuple[ModelConfig, DiffusionConfig, str]:
    """The network, its diffusion and its precision, from flags or keyword arguments over a checkpoint's config over the
    defaults: what training, sampling and the pipeline share.

    :param given: may hold other settings as well. :param recorded: the content of config.json; None without one.
    :param precision: as it was asked for; empty: not at all. :param training: it then is that of the recorded run;
        sampling takes float32, unless `given` says use_fp16.
    :return: with `precision` as a key of PRECISIONS, or empty where a new training leaves it to use_fp16.
    :raises ConfigError: see `build_config`; use_fp16 and precision contradict each other; or a new training asks for
        attention at a height that no level of the network has.
    """
    groups = recorded or {"model": None, "diffusion": None}
    model = build_config(ModelConfig, given, groups["model"], source)
    if training and not recorded and "attention_resolutions" in given:
        model.check_attention()
    diffusion = build_config(DiffusionConfig, given, groups["diffusion"], source)
    if not training:
        return model, diffusion, resolve_precision(precision, "use_fp16" in given and model.use_fp16)
    # Neither setting is binding: where one is given, it counts, else what the run was trained in.
    if precision and "use_fp16" not in given:
        model = dataclasses.replace(model, use_fp16=False)
    elif recorded and "use_fp16" not in given:
        precision = (recorded.get("training") or {}).get("precision", "")
    resolve_precision(precision, model.use_fp16)
    return model, diffusion, precision


def _comparable(config: Any, name: str) -> Any:
    """The meaning of a value: two spellings of one network are no contradiction."""
    if name == "channel_mult":
        return config.multipliers()
    if name == "attention_resolutions":
        return sorted(config.attention_downsamplings())
    return getattr(config, name)


# -- builders ---------------------------------------------------------------------------------------------------------


def create_model(config: ModelConfig, learn_sigma: bool) -> UNetModel:
    """The network, in float32; with `learn_sigma` its output has a second half for the variance.

    :raises ConfigError: settings that do not make a network, or one whose weights exceed the free memory (not on
        PyTorch's meta device, where they take none).
    """
    if not torch.empty(0).is_meta:
        with torch.device("meta"):
            _check_memory(create_model(config, learn_sigma))
    if not config.class_cond:
        raise ConfigError("class_cond False: SDM is always conditioned on the layout; leave the flag out")
    config.check()
    try:
        return UNetModel(
            model_channels=config.num_channels,
            out_channels=6 if learn_sigma else 3,
            layout_channels=config.layout_channels(),
            num_res_blocks=config.num_res_blocks,
            attention_downsamplings=config.attention_downsamplings(),
            dropout=config.dropout,
            channel_mult=config.multipliers(),
            use_checkpoint=config.use_checkpoint,
            num_heads=config.num_heads,
            num_head_channels=config.num_head_channels,
            num_heads_upsample=config.num_heads_upsample,
            use_scale_shift_norm=config.use_scale_shift_norm,
            resblock_updown=config.resblock_updown,
            use_new_attention_order=config.use_new_attention_order,
        )
    except ValueError as error:
        raise ConfigError(f"these settings make no network: {error}") from error


def _check_memory(model: UNetModel) -> None:
    count, free = sum(parameter.numel() for parameter in model.parameters()), available_memory()
    if 4 * count > free:
        raise ConfigError(
            f"these settings make a network of {count / 1e6:,.0f} M parameters, {4 * count / 2**30:,.1f} GiB in "
            f"float32, and {free / 2**30:.1f} GiB are free: lower num_channels, channel_mult or num_res_blocks "
            "(--dry_run True tells what a network takes)"
        )


def create_gaussian_diffusion(config: DiffusionConfig, num_steps: int = 0) -> SpacedDiffusion:
    """The diffusion, over all steps, over those of timestep_respacing, or over `num_steps` trailing ones.

    :raises ConfigError: an impossible respacing or schedule.
    """
    config.check()
    if num_steps and config.timestep_respacing:
        raise ConfigError(
            f"num_steps {num_steps} and timestep_respacing {config.timestep_respacing!r}: give one of them"
        )
    try:
        betas = get_named_beta_schedule(config.noise_schedule, config.diffusion_steps)
        if num_steps:
            timesteps = trailing_timesteps(config.diffusion_steps, num_steps)
        else:
            timesteps = space_timesteps(
                config.diffusion_steps, config.timestep_respacing or str(config.diffusion_steps)
            )
        return SpacedDiffusion(
            timesteps,
            betas=betas,
            predict_xstart=config.predict_xstart,
            predict_v=config.predict_v,
            learn_sigma=config.learn_sigma,
            use_kl=config.use_kl,
            rescale_learned_sigmas=config.rescale_learned_sigmas,
            rescale_timesteps=config.rescale_timesteps,
            loss_weighting=config.loss_weighting,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def create_model_and_diffusion(**kwargs: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """The network and its diffusion from traditional keyword arguments; `use_fp16` sets the network's precision.

    Lists of numbers are strings, as on the command line ("1,2,2"), or tuples; a single number may stand alone.

    :raises ConfigError: a name that is no setting of theirs, or settings that do not fit together.
    """
    check_known(kwargs, ModelConfig, DiffusionConfig)
    model_config, diffusion_config = build_config(ModelConfig, kwargs), build_config(DiffusionConfig, kwargs)
    model = create_model(model_config, diffusion_config.learn_sigma)
    if model_config.use_fp16:
        model.convert_to_fp16()
    return model, create_gaussian_diffusion(diffusion_config)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Every setting of the network and the diffusion, with its default."""
    return {**dataclasses.asdict(ModelConfig()), **dataclasses.asdict(DiffusionConfig())}
