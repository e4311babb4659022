"""Guidance: which predictions are made at a noise level, and how they become one.

A method says which other prediction it needs beside the conditional one, and combines the two. Samplers and the
diffusion do not know which method it is. It may keep a state of its own over the steps of a run.

A scale s means the same in all of them: 1 is the conditional prediction, s moves it (s - 1) times as far away from the
other one as they are apart.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..layouts.spade import LayoutPair
from .denoiser import Denoiser, Layout, as_denoiser
from .prediction import Prediction, Tables


@dataclass(frozen=True)
class Level:
    """A noise level of a run, as a guidance method sees it.

    `x` is the noisy image [N, C, H, W]; `progress` is how far the run has come, from 0 at pure noise towards 1.
    `prediction` is what the network predicts, `at` has the diffusion's tables at this level.
    """

    x: torch.Tensor
    progress: float
    prediction: Prediction
    at: Tables

    def image(self, output: torch.Tensor) -> torch.Tensor:
        """The predicted image [N, C, H, W] that an output of the network means."""
        return self.prediction.image(output, self.x, self.at)

    def output(self, image: torch.Tensor) -> torch.Tensor:
        """The output that means this image: the way back."""
        return self.prediction.output(image, self.x, self.at)


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


PIXELS = (1, 2, 3)  # all dimensions of an image but the batch's: methods look at each image by itself
TINY = 1e-12  # keeps a picture of one value from being divided by 0


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


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share, between 0 and 1; got {value}")
    return value


class Rescaled(ClassifierFree):
    """Classifier-free guidance whose image has the contrast of the conditional one (Lin et al., arXiv 2305.08891,
    section 3.4): its standard deviation over all pixels and channels.

    `rescale_phi` mixes both: 0 is plain guidance, 1 has all of that contrast.
    """

    def __init__(self, scale: float, *, rescale_phi: float):
        """:raises ValueError: rescale_phi is no share."""
        super().__init__(scale)
        self.phi = _share("rescale_phi", rescale_phi)

    def combine(self, conditional: torch.Tensor, other: torch.Tensor, level: Level) -> torch.Tensor:
        image = level.image(conditional)
        guided = torch.lerp(level.image(other), image, self.scale)
        ratio = image.std(dim=PIXELS, keepdim=True) / guided.std(dim=PIXELS, keepdim=True).clamp_min(TINY)
        return level.output(guided * (1 + self.phi * (ratio - 1)))


class AdaptiveProjected(ClassifierFree):
    """Guidance without the part that only makes the image stronger (Sadat et al., arXiv 2410.02416).

    The difference d of the predicted images, conditional less null, is changed in three ways:
        d <- d + apg_momentum * (d of the step before, with what it had gathered): below 0, what repeats counts less
        d <- d * min(1, apg_radius / |d|)
        d <- the part of d that is orthogonal to the conditional image + apg_parallel * the parallel part
    The guided image is the conditional one + (s - 1) d. |d| is the Euclidean norm over all pixels and channels, so a
    radius means more in a larger picture; 0 is no limit. Momentum 0, no limit and parallel 1: plain guidance.
    """

    def __init__(self, scale: float, *, apg_momentum: float, apg_radius: float, apg_parallel: float):
        """:raises ValueError: a value out of its range."""
        super().__init__(scale)
        if not -1 < apg_momentum < 1:
            raise ValueError(f"apg_momentum must lie between -1 and 1, both excluded; got {apg_momentum}")
        if not 0 <= apg_radius < math.inf:
            raise ValueError(f"apg_radius must be at least 0 (no limit) and finite; got {apg_radius}")
        self.momentum, self.radius = apg_momentum, apg_radius
        self.parallel = _share("apg_parallel", apg_parallel)
        self.reset()

    def reset(self) -> None:
        self.gathered: torch.Tensor | None = None  # [N, C, H, W]

    def combine(self, conditional: torch.Tensor, other: torch.Tensor, level: Level) -> torch.Tensor:
        image = level.image(conditional)
        change = image - level.image(other)
        if self.gathered is not None:
            change = torch.add(change, self.gathered, alpha=self.momentum)
        self.gathered = change
        if self.radius > 0:
            norm = change.square().sum(dim=PIXELS, keepdim=True).sqrt()
            change = change * (self.radius / norm).clamp(max=1)
        along = (change * image).sum(dim=PIXELS, keepdim=True)
        along = along / image.square().sum(dim=PIXELS, keepdim=True).clamp_min(TINY) * image
        change = change + (self.parallel - 1) * along
        return level.output(torch.add(image, change, alpha=self.scale - 1))


class AutoGuidance(ClassifierFree):
    """Away from a worse version of the network on the same layout (Karras et al., arXiv 2406.02507, section 4).

    The worse version is trained less, or is smaller, and errs in the same places, only more. It needs no null layout.
    """

    other = "guide"


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


GUIDANCE: dict[str, type[ClassifierFree]] = {
    "cfg": ClassifierFree,
    "apg": AdaptiveProjected,
    "rescale": Rescaled,
    "autoguidance": AutoGuidance,
}
GUIDE = "guide_path"  # the setting of every method that needs another network


def method_options(method: str) -> list[str]:
    """The names of the settings that a method takes beside its scale: its own arguments, and which network guides.

    :raises ValueError: an unknown method.
    """
    cls = _method(method)
    names = [name for name in inspect.signature(cls).parameters if name != "scale"]
    return names + [GUIDE] * (cls.other == "guide")


def check_options(method: str, given: Iterable[str]) -> None:
    """:raises ValueError: an unknown method, or an option among the names `given` that only another one takes."""
    taken = method_options(method)
    for name in given:
        owners = [other for other in GUIDANCE if name in method_options(other)]
        if owners and name not in taken:
            raise ValueError(
                f"{name} is an option of guidance {' and '.join(owners)}, and guidance is {method}: leave out {name}, "
                f"or choose guidance {owners[0]}"
            )


def _method(name: str) -> type[ClassifierFree]:
    if name not in GUIDANCE:
        raise ValueError(f"unknown guidance {name!r}: choose one of {', '.join(GUIDANCE)}")
    return GUIDANCE[name]


def make_guidance(
    scale: float, interval: tuple[float, float] = (0.0, 1.0), method: str = "cfg", **options: float
) -> Guidance:
    """The method `method` at a guidance scale, inside an interval of the run; none where the scale is 1 or less.

    :param options: what the method takes beside its scale (see its class).
    :raises ValueError: an unknown method, or an interval that is not 0 <= low < high <= 1.
    """
    guidance = Within(_method(method)(scale, **options), *interval)
    return guidance if scale > 1 else Unguided()


class Guide(NamedTuple):
    """Another network, and the layout as that one has encoded it. `prediction`: what it predicts, if not the same."""

    denoiser: Denoiser
    layout: Layout
    prediction: Prediction | None = None

    def output(self, timesteps: torch.Tensor, level: Level) -> torch.Tensor:
        """What it says at a level, as an output [N, C, H, W] of the network that it guides."""
        channels = level.x.shape[1]
        output = self.denoiser.denoise(level.x, timesteps, self.layout)[0][:, :channels]
        return output if self.prediction is None else level.output(self.prediction.image(output, level.x, level.at))


@dataclass
class Predictor:
    """A denoiser with the layout and the guidance of a run: what the loop asks at every level.

    :param null: the null layout, encoded; for a guidance that needs it.
    :param guide: another network; for a guidance that needs it.
    :raises ValueError: what the guidance needs is not there.
    """

    denoiser: Denoiser
    layout: Layout
    guidance: Guidance
    null: Layout | None = None
    guide: Guide | None = None

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
            other = self.guide.output(timesteps, level)
        channels = x.shape[1]
        guided = self.guidance.combine(output[:, :channels], other[:, :channels], level)
        return torch.cat([guided, output[:, channels:]], dim=1)
