"""From label maps to what the network reads, on the device, once for training and sampling alike.

The loader hands over integers; the one-hot map of 151 or more channels exists only on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .lookup import LabelLayout


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


def to_network(
    batch: dict[str, Any],
    device: torch.device,
    num_classes: int,
    dtype: torch.dtype,
    dropped: torch.Tensor | None = None,
    look_up: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | LabelLayout]:
    """A loader's batch as the network reads it: images float32 [N, 3, H, W] in [-1, 1] (None without photographs) and
    the layout [N, L, H, W]. Integers travel to the device, the rest is made there.

    :param dropped: bool [N], in training: these samples get the null layout.
    :param look_up: beside `dropped`: the layout stays integers, a `LabelLayout`.
    """
    image = batch.get("image")
    if image is not None:
        image = image.to(device, non_blocking=True).float().div_(127.5).sub_(1.0)
    label, instance = batch["label"].to(device, non_blocking=True), batch.get("instance")
    if instance is not None:
        instance = instance.to(device, non_blocking=True)
    if dropped is None:
        return image, encode_label_map(label, instance, num_classes, dtype)
    dropped = dropped.to(device, non_blocking=True)
    if look_up:
        edge = None if instance is None else instance_edges(instance)
        return image, LabelLayout(label, edge, num_classes, dropped, dtype)
    return image, drop_layouts(encode_label_map(label, instance, num_classes, dtype), dropped)


def to_uint8(images: torch.Tensor, grey: bool = False) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3] on the CPU, rounded to the nearest.

    :param grey: every channel becomes the mean of the three, for a network trained on grey pictures: it draws three
        channels, which noise of their own leaves slightly apart.
    """
    if grey:
        images = images.mean(dim=1, keepdim=True).expand_as(images)
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
