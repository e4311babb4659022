"""A small network of the production classes, and every way of asking it, in one place."""

from __future__ import annotations

import dataclasses

import torch

from guided_diffusion.layouts.spade import LayoutPair
from guided_diffusion.script_util import create_model
from guided_diffusion.settings import DiffusionConfig, ModelConfig
from guided_diffusion.unet import UNetModel

CLASSES = 5
HEIGHT, WIDTH = 16, 32
NETWORK = ModelConfig(
    image_size=HEIGHT,
    num_classes=CLASSES,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions="8",
    num_head_channels=16,
    resblock_updown=True,
    no_instance=True,
)
DIFFUSION = DiffusionConfig(learn_sigma=True)

# How a layout can be given: as a tensor; encoded, with or without kept modulations; beside the null layout.
KINDS = ("tensor", "kept", "guided", "guided and kept")


def network(learn_sigma: bool = True, **changed) -> UNetModel:
    """NETWORK with some settings changed, in training's memory layout."""
    model = create_model(dataclasses.replace(NETWORK, **changed), learn_sigma)
    return model.to(memory_format=torch.channels_last)


def layout_of(model: UNetModel, y: torch.Tensor, kind: str) -> torch.Tensor | object:
    """The layout [N, L, H, W] as one of KINDS. Call it without gradients for those that are kept."""
    if kind == "tensor":
        return y
    layout = model.encode_layout(y, keep="kept" in kind)
    if not kind.startswith("guided"):
        return layout
    return LayoutPair(layout, model.encode_layout(torch.zeros_like(y[:1]), keep="kept" in kind))


def predictions(model: UNetModel, x: torch.Tensor, t: torch.Tensor, layout: object, kind: str) -> list[torch.Tensor]:
    """What the network says, float32 [N, C, H, W] each: of the layout and, where `kind` is guided, of the null one."""
    if kind.startswith("guided"):
        return list(model.denoise(x, t, layout.first, layout.second))
    return [model(x, t, y=layout)]
