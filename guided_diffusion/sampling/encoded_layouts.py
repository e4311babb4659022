"""The layouts of a run, encoded: kept over its steps where they fit, and the null layout beside them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..layouts.spade import Layout


class EncodedLayouts:
    """Encodes layouts by a network. Several threads may ask at a time.

    :param network: a denoiser that encodes (`UNetModel.encode_layout`).
    :param reuse: kept maps of a run take the memory of those before, if they have their shape.
    """

    def __init__(self, network: Any, reuse: bool):
        self.network, self.reuse = network, reuse
        self._lock = threading.Lock()
        self._null: tuple[tuple[int, int], Layout] | None = None  # the null layout of the last size
        self.buffers: tuple[tuple[int, ...], Layout] | None = None  # the kept layout of the last run, of that shape

    @contextlib.contextmanager
    def encoded(self, y: torch.Tensor, keep: bool) -> Iterator[Layout]:
        """The encoded layout of y [N, layout channels, H, W], for as long as it is needed."""
        if not (keep and self.reuse):
            layout = self.network.encode_layout(y, keep)
            del y  # this frame lives as long as the layout, and must not hold the maps
            yield layout
            return
        shape = tuple(y.shape)
        with self._lock:  # whoever takes the buffers has them alone
            (known, buffers), self.buffers = self.buffers or (None, None), None
        layout = self.network.encode_layout(y, keep, buffers if known == shape else None)
        del y
        try:
            yield layout
        finally:
            with self._lock:
                self.buffers = (shape, layout)

    def null(self, y: torch.Tensor, keep: bool) -> Layout:
        """The null layout of the size of y; a kept one is remembered for the next run of that size."""
        if not keep:
            return self.network.encode_layout(torch.zeros_like(y[:1]))
        size = tuple(y.shape[2:])
        with self._lock:
            if self._null is None or self._null[0] != size:
                self._null = None  # freed before the other is made
                self._null = (size, self.network.encode_layout(torch.zeros_like(y[:1]), keep=True))
            return self._null[1]
