"""Random numbers that depend on what they are for, not on who draws them or when.

A training sample's crop, timestep, noise and label drop follow from the run's seed and the sample's position in the
run; a generated image's noise from the run's seed, the layout's name and the sample's index. Batch size, the number of
ranks and resuming change nothing, and there is no generator state to save.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`, the same on every machine and in every run of Python.

    :raises TypeError: a part that is neither text nor a whole number.
    """
    # The type is hashed, so that 1 and "1" differ; a whole number is one whether Python, NumPy or PyTorch holds it.
    values = [part if isinstance(part, str) else whole_number("a part of a seed", part) for part in parts]
    text = "\x1f".join(f"{type(value).__name__}:{value}" for value in values)
    content = text.encode("utf-8", "surrogatepass")  # the name of a file may hold bytes of no text
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def whole_number(name: str, value: Any) -> int:
    """`value` as Python's int, from any type of whole number. :raises TypeError: another type, naming it."""
    try:
        return int(operator.index(value))  # int: the index of True is True
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number, as 0; got {value!r} ({type(value).__name__}): convert it with int()"
        ) from None


def uniforms(seed: int, purpose: str, positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each position, float64 [N]."""
    return np.array([np.random.default_rng(stable_seed(seed, purpose, int(p))).random() for p in positions])


def normals(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Standard normal noise [len(seeds), *shape], row i from its own generator on `device`, seeded with seeds[i]."""
    noise = torch.empty(len(seeds), *shape, device=device, dtype=dtype)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator(device).manual_seed(seed))
    return noise


class ImageNoise:
    """The noise of a batch of images, step after step: call it for the next [N, *shape].

    Drawn on the CPU, so that an image is the same (to rounding) on every device; for another device a thread draws it
    ahead, while that one computes.

    :param ahead: whether it does; by default where `device` is not the CPU.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        ahead: bool | None = None,
    ):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.ahead = self.device.type != "cpu" if ahead is None else ahead
        self._calls = 0
        self._next: Future[torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        noise = self._draw() if self._next is None else self._next.result()
        self._calls += 1
        if self.ahead and self._calls > 1:  # from the second call on it is known that the sampler draws in every step
            self._next = _drawing_thread().submit(self._draw)
        return noise.to(self.device, non_blocking=True)

    def _draw(self) -> torch.Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        # pinned, it travels while the device is busy
        return noise.pin_memory() if self.device.type == "cuda" else noise


@functools.cache
def _drawing_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="noise")
