"""Guidance: which predictions are made at a noise level, and how they become one.

A method says which other prediction it needs beside the conditional one, and combines the two. Samplers and the
diffusion do not know which method it is. It may keep a state of its own over the steps of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..layouts.spade import LayoutPair
from .denoiser import Denoiser, Layout, as_denoiser


@dataclass(frozen=True)
class Level:
    """A noise level of a run, as a guidance method sees it.

    `x` is the noisy image [N, C, H, W]; `progress` is how far the run has come, from 0 at pure noise towards 1.
    `image(output)` is the predicted image that an output of the network means, `output(image)` the way back.
    """

    x: torch.Tensor
    progress: float
    image: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]


class Guidance(Protocol):
    """One run's method. `other` names the prediction that it needs beside the conditional one: "null" (of the null
    layout), "guide" (of another network, on the same layout) or "" (none)."""

    other: str

    def reset(self) -> None:
        """Forgets the run before."""
        ...

    def active(self, progress: float) -> bool:
        """Whether it guides at this part of the run; elsewhere the other prediction is not made."""
        ...

    def combine(self, conditional: torch.Tensor, other: torch.Tensor, level: Level) -> torch.Tensor:
        """The guided output, from the network's outputs [N, C, H, W], without their halves for the variance."""
        ...


class Unguided:
    """The conditional prediction as it is."""

    other = ""

    def reset(self) -> None:
        pass

    def active(self, progress: float) -> bool:
        return False

    def combine(self, conditional: torch.Tensor, other: torch.Tensor, level: Level) -> torch.Tensor:
        return conditional


class ClassifierFree(Unguided):
    """eps(null) + s (eps(layout) - eps(null)) (Ho & Salimans, arXiv 2207.12598; SDM, arXiv 2207.00050, equation 9).

    Outputs, predicted images and noise are linear in each other: which of them is extrapolated makes no difference.
    """

    other = "null"

    def __init__(self, scale: float):
        self.scale = scale

    def active(self, progress: float) -> bool:
        return self.scale > 1

    def combine(self, conditional: torch.Tensor, other: torch.Tensor, level: Level) -> torch.Tensor:
        return torch.lerp(other, conditional, self.scale)


class Within:
    """A method inside a part of the run, nothing outside (Kynkäänniemi et al., arXiv 2404.07724)."""

    def __init__(self, guidance: Guidance, low: float, high: float):
        """:raises ValueError: not 0 <= low < high <= 1."""
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval must be LOW,HIGH with 0 <= LOW < HIGH <= 1; got {low},{high}")
        self.guidance, self.low, self.high = guidance, low, high
        self.other = guidance.other

    def reset(self) -> None:
        self.guidance.reset()

    def active(self, progress: float) -> bool:
        return self.low <= progress < self.high and self.guidance.active(progress)

    def combine(self, conditional: torch.Tensor, other: torch.Tensor, level: Level) -> torch.Tensor:
        return self.guidance.combine(conditional, other, level)


GUIDANCE: dict[str, Callable[[float], Guidance]] = {"cfg": ClassifierFree}


def make_guidance(scale: float, interval: tuple[float, float] = (0.0, 1.0), method: str = "cfg") -> Guidance:
    """The method `method` at a guidance scale, inside an interval of the run; none where the scale is 1 or less.

    :raises ValueError: an unknown method, or an interval that is not 0 <= low < high <= 1.
    """
    if method not in GUIDANCE:
        raise ValueError(f"unknown guidance {method!r}: choose one of {', '.join(GUIDANCE)}")
    guidance = Within(GUIDANCE[method](scale), *interval)
    return guidance if scale > 1 else Unguided()


@dataclass
class Predictor:
    """A denoiser with the layout and the guidance of a run: what the loop asks at every level.

    :param null: the null layout, encoded; for a guidance that needs it.
    :param guide: another denoiser and the layout as that one has encoded it; for a guidance that needs them.
    :raises ValueError: what the guidance needs is not there.
    """

    denoiser: Denoiser
    layout: Layout
    guidance: Guidance
    null: Layout | None = None
    guide: tuple[Denoiser, Layout] | None = None

    def __post_init__(self) -> None:
        if self.guidance.other == "null" and self.null is None:
            raise ValueError(
                "guidance needs the null layout beside an encoded layout: give LayoutPair(layout, null), where null is "
                "the encoded layout of zeros, or the layout as a tensor"
            )
        if self.guidance.other == "guide" and self.guide is None:
            raise ValueError("this guidance needs a second network, the guide")

    @classmethod
    def from_kwargs(
        cls,
        model: Any,
        model_kwargs: dict[str, Any] | None,
        x: torch.Tensor,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Predictor:
        """From the traditional `model` and `model_kwargs`, for images like x [N, C, H, W].

        `y` is the layout: a tensor, encoded, or a `LayoutPair` with the null layout; `s` is the guidance scale. Other
        arguments are the model's, where it is a function.
        :raises ValueError: a layout of another size than x, or an encoded one without its null layout.
        """
        arguments = dict(model_kwargs or {})
        guidance = make_guidance(arguments.pop("s", 1.0), interval)
        y, null = arguments.pop("y", None), None
        denoiser = as_denoiser(model, arguments)
        if isinstance(y, LayoutPair):
            y, null = y.first, y.second
        elif isinstance(y, torch.Tensor):
            if denoiser is model and y.shape[2:] != x.shape[2:]:
                raise ValueError(f"layout {list(y.shape)} and image {list(x.shape)} differ in size")
            null = denoiser.encode_layout(torch.zeros_like(y[:1])) if guidance.other == "null" else None
            y = denoiser.encode_layout(y)
        return cls(denoiser, y, guidance, null)

    def __call__(self, timesteps: torch.Tensor, level: Level) -> torch.Tensor:
        """The network's output at a level, guided: [N, C or 2C, H, W]. The variance is that of the conditional pass.

        `timesteps` [N] are those that the network was trained with.
        """
        x = level.x
        if not self.guidance.active(level.progress):
            return self.denoiser.denoise(x, timesteps, self.layout)[0]
        output, other = self.denoiser.denoise(
            x, timesteps, self.layout, self.null if self.guidance.other == "null" else None
        )
        if self.guidance.other == "guide":
            guide, layout = self.guide
            other, _ = guide.denoise(x, timesteps, layout)
        channels = x.shape[1]
        guided = self.guidance.combine(output[:, :channels], other[:, :channels], level)
        return torch.cat([guided, output[:, channels:]], dim=1)
