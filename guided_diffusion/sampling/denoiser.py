"""What a sampler asks of a network: encode a layout, and denoise under it.

`UNetModel` is one; a wrapper around it (a window of a larger image, a teacher, a cache) is another. A plain function
`model(x, t, y=y)`, as the tradition has it, becomes one here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

Layout = Any
"""A layout that a denoiser has encoded; only that denoiser knows what it is."""


class Denoiser(Protocol):
    """x, t and an encoded layout in, predictions out."""

    def encode_layout(self, y: torch.Tensor, keep: bool = False) -> Layout:
        """The layout [N, L, H, W] (all zeros: the null layout; N = 1 serves any batch) as `denoise` reads it. `keep`:
        what can be computed once for many steps is."""
        ...

    def denoise(
        self, x: torch.Tensor, timesteps: torch.Tensor, layout: Layout, other: Layout | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction [N, C or 2C, H, W] at x [N, C, H, W] and timesteps [N], and the one under `other`, if any."""
        ...


class FunctionDenoiser:
    """A function `model(x, timesteps, y=y, **arguments)` as a denoiser; two predictions are a batch of twice the size.

    Layouts stay tensors; the function is called without `y` where there is none.
    """

    def __init__(self, model: Callable[..., torch.Tensor], arguments: dict[str, Any]):
        self.model, self.arguments = model, arguments

    def encode_layout(self, y: torch.Tensor, keep: bool = False) -> torch.Tensor:
        return y

    def denoise(
        self, x: torch.Tensor, timesteps: torch.Tensor, layout: torch.Tensor | None, other: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if other is None:
            condition = {} if layout is None else {"y": layout}
            return self.model(x, timesteps, **condition, **self.arguments), None
        y = torch.cat([layout, other.expand_as(layout)])
        outputs = self.model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), y=y, **self.arguments)
        return outputs.chunk(2)


def as_denoiser(model: Any, arguments: dict[str, Any]) -> Denoiser:
    """`model` itself where its class is a denoiser's, else the function that it is, called with `arguments` as well.

    :raises ValueError: arguments that a denoiser does not take.
    """
    # The class is asked: what wraps a network (torch.compile, DDP) passes its attributes on, but is called itself.
    if not hasattr(type(model), "denoise"):
        return FunctionDenoiser(model, arguments)
    if arguments:
        raise ValueError(f"model_kwargs may hold y and s; got {', '.join(sorted(arguments))} as well")
    return model
