"""Settings of a network from the names and shapes of its weights: published checkpoints come without a config.

What shapes do not show is taken from flags, else from the published settings (arXiv 2207.00050 and its scripts), and
listed as unverified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..settings import ConfigError, DiffusionConfig, ModelConfig, as_setting
from .architecture import LAYOUT, check_family
from .files import CheckpointError

IN_CHANNELS = 3


@dataclass(frozen=True)
class Shapes:
    """What names and shapes show of a network."""

    num_channels: int
    widths: tuple[int, ...]  # of the levels, from full resolution down
    num_res_blocks: int
    attention_levels: tuple[int, ...]  # level l has height image_size / 2^l
    layout_channels: int
    learn_sigma: bool
    use_scale_shift_norm: bool
    resblock_updown: bool | None  # None: with one level, nothing is resampled

    def channel_mult(self) -> str:
        return ",".join(f"{_multiplier(width, self.num_channels):.17g}" for width in self.widths)


@dataclass(frozen=True)
class Published:
    """A published network: its data set, and the split of its layout channels."""

    data_set: str
    num_classes: int
    no_instance: bool

    def layout_channels(self) -> int:
        return self.num_classes + (not self.no_instance)


# The four differ in these; the rest is UNSEEN and the shapes of `_is_published`.
PUBLISHED = (
    Published("ade20k", 151, True),
    Published("celeba", 19, False),
    Published("cityscapes", 35, False),
    Published("coco", 183, False),
)
# Settings that bind the network and that no shape shows, with the published values. num_classes and no_instance, the
# split of the layout channels, are added where they are not given.
UNSEEN: dict[str, Any] = {
    "image_size": 256,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": 64,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "predict_xstart": False,
    "predict_v": False,
    "rescale_timesteps": False,
}
_HEADS = ("num_head_channels", "num_heads", "num_heads_upsample")


def read_shapes(state: Mapping[str, torch.Tensor], path: str = "the file") -> Shapes:
    """What the names and shapes of a state dict show. Only shapes are looked at: tensors may be on the meta device.

    :raises CheckpointError: they are not those of an SDM network; names `path`, what differs, and what it may be.
    """
    check_family(state, path)

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise CheckpointError(f"{path} does not hold the weights of an SDM network: {name} is missing")
        return state[name].shape

    try:
        num_channels = shape("time_embed.0.weight")[1]
        stages = len({name.split(".")[1] for name in state if name.startswith("output_blocks.")})
        period = _blocks_of_a_level(state, stages)
        levels = range(stages // period)
        first = [1 + level * period for level in levels]  # the first block of each level in the encoder
        widths = tuple(shape(f"input_blocks.{index}.0.out_layers.3.weight")[0] for index in first)
        out, image = shape("out.2.weight")[0], shape("input_blocks.0.0.weight")[1]
        embedding = shape("input_blocks.1.0.emb_layers.1.weight")[0]
        resampling = None
        if len(widths) > 1:
            resampling = f"input_blocks.{period}.0.op.weight" not in state
        seen = Shapes(
            num_channels=num_channels,
            widths=widths,
            num_res_blocks=period - 1,
            attention_levels=tuple(level for level in levels if f"input_blocks.{first[level]}.1.qkv.weight" in state),
            layout_channels=shape(LAYOUT)[1],
            learn_sigma=out == 2 * IN_CHANNELS,
            use_scale_shift_norm=embedding == 2 * widths[0],
            resblock_updown=resampling,
        )
    except IndexError as error:
        raise CheckpointError(f"{path} does not hold the weights of an SDM network: {error}") from None
    if image != IN_CHANNELS or out not in (IN_CHANNELS, 2 * IN_CHANNELS):
        raise CheckpointError(
            f"{path} is of a network for {image} image channels that predicts {out}; this one reads {IN_CHANNELS} and "
            f"predicts {IN_CHANNELS}, or {2 * IN_CHANNELS} with the variance"
        )
    return seen


def _blocks_of_a_level(state: Mapping[str, torch.Tensor], stages: int) -> int:
    """The residual blocks of a level in the decoder, one more than in the encoder: its last one enlarges."""
    for index in range(stages):
        last = [f"output_blocks.{index}.{place}" for place in (1, 2)]
        if any(f"{block}.{name}" in state for block in last for name in ("conv.weight", "in_layers.1.weight")):
            return index + 1
    return max(stages, 1)


def read_settings(
    state: Mapping[str, torch.Tensor], given: Mapping[str, Any] | None = None, path: str = "the file"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """All settings that bind a network, by name, from its weights; and the names of those that the weights do not show.

    :param given: flags or keyword arguments: they decide what is not shown (other settings in it are welcome).
    :raises CheckpointError: see `read_shapes`. :raises ConfigError: a class count that the layout channels contradict.
    """
    given = given or {}
    seen = read_shapes(state, path)
    settings: dict[str, Any] = {
        "num_channels": seen.num_channels,
        "channel_mult": seen.channel_mult(),
        "num_res_blocks": seen.num_res_blocks,
        "use_scale_shift_norm": seen.use_scale_shift_norm,
        "resblock_updown": seen.resblock_updown,
        "learn_sigma": seen.learn_sigma,
    }
    if seen.resblock_updown is None:
        del settings["resblock_updown"]
    unseen = UNSEEN | ({} if seen.resblock_updown is not None else {"resblock_updown": True})
    settings |= {name: _given(given, name, value) for name, value in unseen.items()}
    if any(name in given for name in _HEADS) and "num_head_channels" not in given:
        settings["num_head_channels"] = -1  # or it would override the count that was given
    settings |= _split(seen, given, path)
    size = settings["image_size"]
    heights = [size // 2**level for level in seen.attention_levels]
    if any(height * 2**level != size for height, level in zip(heights, seen.attention_levels, strict=True)):
        raise ConfigError(
            f"--image_size {size} contradicts {path}: its attention stands where the image has been halved "
            f"{max(seen.attention_levels)} times, so the size must be a multiple of {2 ** max(seen.attention_levels)}"
        )
    # Nowhere: a height that is larger than the image is no level's.
    settings["attention_resolutions"] = ",".join(map(str, heights)) or str(2 * size)
    return settings, (*unseen, "num_classes", "no_instance")


def _given(given: Mapping[str, Any], name: str, default: Any) -> Any:
    return as_setting(name, default, given[name]) if name in given else default


def _split(seen: Shapes, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """num_classes and no_instance: how the layout channels divide into classes and the edge."""
    channels = seen.layout_channels
    known = [one for one in PUBLISHED if one.layout_channels() == channels and _is_published(seen)]
    no_instance = known[0].no_instance if known else False
    if "num_classes" in given:
        num_classes = _given(given, "num_classes", 1)
        no_instance = num_classes == channels
        fits = num_classes in (channels, channels - 1)
        if not fits or _given(given, "no_instance", no_instance) != no_instance:
            asked = f"num_classes {num_classes}"
            if "no_instance" in given:
                asked += f" with no_instance {given['no_instance']}"
            raise ConfigError(
                f"{asked} contradicts {path}: its weights read {channels} layout channels, which are num_classes "
                f"{channels} with no_instance True, or {channels - 1} and the instance edge"
            )
    else:
        no_instance = _given(given, "no_instance", no_instance)
    return {"num_classes": channels - (not no_instance), "no_instance": no_instance}


def _is_published(seen: Shapes) -> bool:
    """Whether a network is one of the published ones, but for its width and its layout channels."""
    multipliers = [width / seen.num_channels for width in seen.widths]
    return (multipliers, seen.num_res_blocks, seen.attention_levels, seen.learn_sigma, seen.resblock_updown) == (
        [1, 1, 2, 2, 4, 4], 2, (3, 4, 5), True, True
    ) and seen.use_scale_shift_norm  # fmt: skip


def _multiplier(width: int, unit: int) -> float:
    """The smallest number close to width / unit whose product with `unit` is not cut off below `width`."""
    multiplier = width / unit
    return multiplier if int(multiplier * unit) == width else math.nextafter(multiplier, math.inf)


def as_config(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings in the groups of a config.json."""
    groups: Sequence[tuple[str, type]] = (("model", ModelConfig), ("diffusion", DiffusionConfig))
    return {
        group: {field.name: settings[field.name] for field in fields(kind) if field.name in settings}
        for group, kind in groups
    }


def describe(
    state: Mapping[str, torch.Tensor],
    given: Mapping[str, Any],
    path: str,
    note: Callable[[str], None],
    silent: Collection[str] = (),
) -> tuple[dict[str, dict[str, Any]], str]:
    """What stands in for the config that a checkpoint comes without, and where it comes from, for messages.

    :param note: is told in one line what was seen, and by name and value what was not, but for the names `silent`.
    :raises CheckpointError, ConfigError: see `read_settings`.
    """
    settings, unseen = read_settings(state, given, path)
    seen = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in unseen)
    # A count of heads that the channels per head override says nothing.
    unsaid = {*silent, *(_HEADS[1:] if settings["num_head_channels"] != -1 else ())}
    asked, taken = (
        ", ".join(f"{name} {settings[name]}" for name in unseen if name not in unsaid and (name in given) == as_asked)
        for as_asked in (True, False)
    )
    note(
        f"{path} has no config.json; its weights show {seen}. They do not show, so that it is unverified: "
        + "; ".join([f"as given, {asked}"] * bool(asked) + [f"as published, {taken}"] * bool(taken))
    )
    return as_config(settings), f"the weights in {path}"
