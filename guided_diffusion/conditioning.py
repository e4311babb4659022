"""From label maps to what the network reads, on the device, once for training and sampling alike.

The loader hands over integers; the one-hot map of 151 or more channels exists only on the device.
"""

from __future__ import annotations

import torch


def instance_edges(instance: torch.Tensor) -> torch.Tensor:
    """Where an instance map changes: [N, 1, H, W] integers -> bool, true on both sides of every boundary.

    Boundaries are between horizontal and vertical neighbours (Wang et al., arXiv 1711.11585, section 3.3).
    """
    edges = torch.zeros_like(instance, dtype=torch.bool)
    horizontal = instance[..., 1:] != instance[..., :-1]
    vertical = instance[..., 1:, :] != instance[..., :-1, :]
    edges[..., 1:] |= horizontal
    edges[..., :-1] |= horizontal
    edges[..., 1:, :] |= vertical
    edges[..., :-1, :] |= vertical
    return edges


def encode_label_map(
    label: torch.Tensor, instance: torch.Tensor | None, num_classes: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The network's condition: one-hot classes, then the instance edge where `instance` is given.

    :param label: integers [N, 1, H, W], all below `num_classes` (the loader has seen to that).
    :param instance: integers [N, 1, H, W], or None for a network without the edge channel.
    :return: [N, num_classes (+ 1), H, W] on the device of `label`, channels-last in memory.
    """
    batch, _, height, width = label.shape
    channels = num_classes + (instance is not None)
    y = torch.zeros(batch, height, width, channels, dtype=dtype, device=label.device)
    y.scatter_(3, label.permute(0, 2, 3, 1).long(), 1.0)
    if instance is not None:
        y[..., -1] = instance_edges(instance)[:, 0].to(dtype)
    return y.permute(0, 3, 1, 2)


def null_layout(y: torch.Tensor) -> torch.Tensor:
    """The layout that stands for 'no layout' in classifier-free guidance: all zeros, the edge channel too."""
    return torch.zeros_like(y)


def drop_layouts(y: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """`y` [N, L, H, W] with the samples where `drop` [N] is true replaced by the null layout, in place."""
    return y.masked_fill_(drop.view(-1, 1, 1, 1), 0.0)
