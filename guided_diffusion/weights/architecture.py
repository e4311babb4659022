"""Whose weights a state dict holds: those of SDM, or of a network that is known under another name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .files import CheckpointError

LAYOUT = "middle_block.0.in_norm.mlp_shared.0.weight"  # SPADE reads the layout: only SDM has it
FIRST = "input_blocks.0.0.weight"

# Names (or their beginnings) that a network of that kind has, the most special first.
_KNOWN = (
    (("input_blocks.1.1.transformer_blocks.", "middle_block.1.transformer_blocks."), "a latent diffusion U-Net"),
    (("down_blocks.0.", "conv_in.weight"), "a diffusers U-Net"),
    (("first_stage_model.", "encoder.down.0."), "the autoencoder of a latent diffusion model"),
    (("middle_block.0.in_layers.0.weight",), "guided-diffusion's U-Net, which is given no layout"),
    (("netG.", "head_0.", "up_0.norm_0."), "the generator of a GAN with SPADE"),
)


def architecture_of(state: Mapping[str, torch.Tensor]) -> str:
    """What network the names are those of; empty where it is none of the known ones."""
    for beginnings, words in _KNOWN:
        if any(name.startswith(beginning) for beginning in beginnings for name in state):
            return words
    return ""


def check_family(state: Mapping[str, torch.Tensor], path: str) -> None:
    """:raises CheckpointError: these are not the weights of an SDM network; says of which, where that is known."""
    missing = next((name for name in (FIRST, LAYOUT) if name not in state), None)
    if missing is None:
        return
    looks = architecture_of(state)
    raise CheckpointError(
        f"{path} does not hold the weights of an SDM network: the first that it lacks is {missing}, and the first that "
        f"it has is {next(iter(state))}" + (f". They look like {looks}" if looks else "")
    )
