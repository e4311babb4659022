"""Diffusion over a subset of the trained timesteps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | list[int]) -> list[int]:
    """The timesteps, ascending, that a traditional respacing keeps of `num_timesteps`.

    "250": that many, evenly spaced with both ends; "10,15,20": so many in each equal section; "ddim25": the fixed
    stride of the DDIM paper (arXiv 2010.02502), which leaves out the noisiest steps.

    :raises ValueError: no stride or section gives that many.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            wanted = _whole(section_counts[len("ddim") :], section_counts)
            for stride in range(1, num_timesteps + 1):
                if len(range(0, num_timesteps, stride)) == wanted:
                    return list(range(0, num_timesteps, stride))
            raise ValueError(
                f"timestep_respacing {section_counts!r}: no whole stride gives {wanted} of {num_timesteps} steps"
            )
        section_counts = [_whole(part, section_counts) for part in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(section_counts))
    start, kept = 0, []
    for i, count in enumerate(section_counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"timestep_respacing {section_counts}: a section of {length} steps cannot be spaced to {count}"
            )
        stride = 1 if count == 1 else (length - 1) / (count - 1)
        kept += [start + round(k * stride) for k in range(count)]
        start += length
    return sorted(set(kept))


def trailing_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` of `num_timesteps`, ascending, evenly spaced back from the noisiest.

    The first step starts where the noise is strongest, so that pure noise is what the network expects there; the last
    goes straight to the image (arXiv 2305.08891, section 3.3, "trailing").

    :raises ValueError: fewer than one step, or more than were trained.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must lie between 1 and the {num_timesteps} trained steps; got {num_steps}")
    return [round(num_timesteps * i / num_steps) - 1 for i in range(1, num_steps + 1)]


def _whole(text: str, option: str) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text) or int(text) < 1:
        raise ValueError(f"timestep_respacing {option!r}: {text!r} is not a positive whole number")
    return int(text)


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion that takes only `use_timesteps` of the process given by `betas`; the network still sees the
    original timesteps. The kept steps have the same noise levels (cumulative products) as before."""

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        original = np.asarray(kwargs.pop("betas"), dtype=np.float64)
        self.timestep_map = sorted(set(use_timesteps))
        kept = np.cumprod(1.0 - original)[self.timestep_map]
        super().__init__(betas=1.0 - kept / np.append(1.0, kept[:-1]), **kwargs)
        self.original_num_steps = len(original)
        self._map_on_device: dict[torch.device, torch.Tensor] = {}

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        if t.device not in self._map_on_device:
            self._map_on_device[t.device] = torch.tensor(self.timestep_map, device=t.device)
        return super().model_timesteps(self._map_on_device[t.device][t])
