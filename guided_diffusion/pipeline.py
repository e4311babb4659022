"""A checkpoint, ready to turn layouts into images.

pipeline = SDMPipeline.from_checkpoint("OUTPUT/ADE20K-SDM-256CH-FINETUNE/ema_0.9999_best.pt")
images = pipeline("layout.png", s=1.5, sampler="dpmsolver++", num_steps=20, seed=0)
images[0].save("sample.png")
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .data.class_lists import recorded_classes
from .data.transforms import open_map
from .fp16_util import PRECISIONS
from .hosts.memory import available_memory
from .layouts.encode import encode_label_map, to_uint8
from .layouts.spade import GuidedLayout, Layout
from .respace import SpacedDiffusion
from .sampling.solvers import SAMPLERS, dynamic_thresholding, sample_loop
from .script_util import build_config, create_gaussian_diffusion, create_model
from .seeding import ImageNoise, stable_seed, whole_number
from .settings import ConfigError, DiffusionConfig, ModelConfig, as_setting, auto_choice, resolve_precision
from .unet import UNetModel
from .weights import store

MEMORY_SHARE = 0.5  # of the free memory, for what is kept: the passes themselves need nearly as much


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are made; the flags of the same names say more."""

    s: float = 1.5
    sampler: str = "dpmsolver++"
    num_steps: int = 20
    timestep_respacing: str = ""
    eta: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    clip_denoised: bool = True
    dynamic_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Gives every value its field's type, as 2 for "2". :raises ConfigError: a value that no sampler takes."""
        object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))  # the dataclass is frozen
        for field in dataclasses.fields(self):
            if field.name != "guidance_interval":
                object.__setattr__(self, field.name, as_setting(field.name, field.default, getattr(self, field.name)))
        if not math.isfinite(self.s):
            raise ConfigError(f"s must be a finite number; got {self.s} (1 or less: no guidance)")
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"unknown sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ConfigError(f"guidance_interval must be LOW,HIGH with 0 <= LOW < HIGH <= 1; got {low},{high}")
        if not 0 <= self.dynamic_threshold <= 1:
            raise ConfigError(f"dynamic_threshold must lie in (0, 1], or be 0 for none; got {self.dynamic_threshold}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta must lie between 0 and 1; got {self.eta}")


def _interval(value: Any) -> tuple[float, float]:
    """The guidance interval, from two numbers or from text as the flag's. :raises ConfigError: it is neither."""
    try:
        low, high = value.split(",") if isinstance(value, str) else value
        return float(low), float(high)
    except (TypeError, ValueError):
        raise ConfigError(
            f"guidance_interval must be LOW,HIGH, two numbers such as (0.1, 0.8); got {value!r}"
        ) from None


class SDMPipeline:
    """The network of one checkpoint in evaluation mode, with the diffusion that it was trained for.

    Calling it makes images of layouts; `generate` is the same for tensors. For each batch of layouts SPADE's scale and
    shift are computed once and kept for all steps where memory allows (`keep_modulations`: auto, true or false).
    """

    def __init__(
        self,
        model: UNetModel,
        model_config: ModelConfig,
        diffusion_config: DiffusionConfig,
        *,
        precision: str = "fp32",
        device: torch.device | str | None = None,
        keep_modulations: str = "auto",
        compile: bool = False,
        grey: bool = False,
        classes: tuple[tuple[str, ...], np.ndarray] | None = None,
    ):
        """grey: the network was trained on grey pictures, and its images are to be grey as well. classes: the names of
        its classes, and their colours uint8 [num_classes, 3]: `class_names` and `palette`, None where unknown."""
        self.grey = grey
        self.class_names, self.palette = classes or (None, None)
        self.keep_modulations = auto_choice("keep_modulations", keep_modulations)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device, memory_format=torch.channels_last).convert_to(PRECISIONS[precision])
        self.model.eval().requires_grad_(False)
        self.network: Callable[..., torch.Tensor] = torch.compile(self.model) if compile else self.model
        self.model_config, self.diffusion_config = model_config, diffusion_config
        self.sharing_memory = 1  # processes among which the device's free memory is divided
        self._diffusions: dict[tuple[str, int], SpacedDiffusion] = {}
        self._null: tuple[tuple[int, int], Layout] | None = None  # the null layout of the last size

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        precision: str = "",
        device: torch.device | str | None = None,
        keep_modulations: str = "auto",
        compile: bool = False,
        **settings: Any,
    ) -> SDMPipeline:
        """Loads a checkpoint of this project, which has its config beside it, or a published one with `settings`.

        :param settings: of the network and the diffusion; they may repeat but not contradict the config.
        :raises ConfigError: a contradiction, an unknown setting. :raises CheckpointError: a damaged or other file.
        :raises DataError: recorded classes that do not fit the network.
        """
        path = os.fspath(path)  # text from here on: a checkpoint may be a URL, too
        recorded = store.read_config(path)
        known = {field.name for cls in (ModelConfig, DiffusionConfig) for field in dataclasses.fields(cls)}
        if unknown := settings.keys() - known:
            raise ConfigError(f"unknown settings: {', '.join(sorted(unknown))}")
        source = f"{store.CONFIG_NAME} beside {path}"
        model_config = build_config(ModelConfig, settings, recorded and recorded["model"], source)
        diffusion_config = build_config(DiffusionConfig, settings, recorded and recorded["diffusion"], source)
        precision = resolve_precision(precision, "use_fp16" in settings and model_config.use_fp16)
        classes = recorded_classes(recorded, model_config.num_classes, source)
        weights = store.load_weights(path)
        with torch.device("meta"):  # no time spent on initial weights
            model = create_model(model_config, diffusion_config.learn_sigma)
        store.load_state_into(model, weights, path)
        return cls(
            model,
            model_config,
            diffusion_config,
            precision=precision,
            device=device,
            keep_modulations=keep_modulations,
            compile=compile,
            grey=bool(recorded and (recorded.get("dataset_json") or {}).get("grey")),
            classes=classes,
        )

    # -- images -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        label_map: str | os.PathLike | Image.Image | np.ndarray,
        *,
        instance_map: str | os.PathLike | Image.Image | np.ndarray | None = None,
        samples: int = 1,
        batch_size: int = 16,
        seed: int = 0,
        name: str = "",
        progress: bool = False,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Makes `samples` images of one layout.

        :param label_map: a file, picture or array [H, W] of class ids as the network knows them.
        :param instance_map: instance ids, of the same size, for a network with the edge channel.
        :param batch_size: how many are made at a time; memory grows with it.
        :param seed: a whole number of any type (an element of np.arange, too).
        :param name: the layout's name, which is part of the seed (the sampling script uses the file's stem).
        :param sampling: fields of `Sampling`: s, sampler, num_steps, ...
        :raises ValueError: ids or sizes that do not fit, naming them. :raises TypeError: a seed that is not whole.
        """
        if samples < 1 or batch_size < 1:
            raise ValueError(f"samples ({samples}) and batch_size ({batch_size}) must be at least 1")
        if sampling.get("timestep_respacing") and "num_steps" not in sampling:
            sampling["num_steps"] = 0
        label = self._read_map(label_map, "label map")
        if label.max() >= self.model_config.num_classes or label.min() < 0:
            raise ValueError(
                f"the label map has ids {int(label.min())} to {int(label.max())}; the network knows "
                f"0 to {self.model_config.num_classes - 1}"
            )
        if (instance_map is None) != self.model_config.no_instance:
            wants = "takes no" if self.model_config.no_instance else "needs an"
            raise ValueError(f"this network {wants} instance_map")
        instance = None if instance_map is None else self._read_map(instance_map, "instance map")
        seeds, chosen = [image_seed(seed, name, index) for index in range(samples)], Sampling(**sampling)
        return [
            Image.fromarray(picture)
            for first in range(0, samples, batch_size)
            for picture in self.generate(
                label, instance, seeds=seeds[first : first + batch_size], sampling=chosen, progress=progress
            )
        ]

    @torch.inference_mode()
    def generate(
        self,
        label: torch.Tensor,
        instance: torch.Tensor | None,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        progress: bool = False,
        on_step: Callable[[], Any] | None = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3], one for each of the N seeds.

        :param label: integers [N, 1, H, W], or [1, 1, H, W] for N samples of one layout; `instance` likewise.
        :param on_step: called after every step.
        :raises ValueError: maps of different sizes. :raises FloatingPointError: the network's numbers left its
            precision's range.
        """
        height, width = label.shape[2:]
        if instance is not None and instance.shape[2:] != label.shape[2:]:  # one row or column would be spread over all
            raise ValueError(
                f"the instance map is {'x'.join(map(str, instance.shape[2:]))} (height x width), the label map "
                f"{height}x{width}: both must have a value for every pixel"
            )
        self.model.check_size(height, width)
        instance = None if instance is None else instance.to(self.device)
        y = encode_label_map(label.to(self.device), instance, self.model_config.num_classes, self.model.dtype)
        noise = ImageNoise(seeds, (3, height, width), self.device)
        layout = self._layout(y, sampling.s > 1)
        del y  # where scale and shift are kept, nothing else needs the maps
        diffusion = self.diffusion(sampling.timestep_respacing, sampling.num_steps)
        for step in sample_loop(
            diffusion,
            self.network,
            noise(),
            sampler=sampling.sampler,
            eta=sampling.eta,
            model_kwargs={"y": layout, "s": sampling.s},
            clip_denoised=sampling.clip_denoised,
            denoised_fn=dynamic_thresholding(sampling.dynamic_threshold) if sampling.dynamic_threshold else None,
            guidance_interval=sampling.guidance_interval,
            draw_noise=noise,
            progress=progress,
        ):
            sample = step["sample"]
            if on_step is not None:
                on_step()
        if not bool(torch.isfinite(sample).all()):
            precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.model.dtype)
            remedy = "try --precision bf16" if precision == "fp16" else "has the training of this checkpoint diverged?"
            raise FloatingPointError(f"the network's numbers are not finite in {precision}: {remedy}")
        return to_uint8(sample, self.grey)

    def diffusion(self, timestep_respacing: str, num_steps: int) -> SpacedDiffusion:
        """The trained diffusion over the chosen steps. :raises ConfigError: no such steps."""
        key = (timestep_respacing, num_steps)
        if key not in self._diffusions:
            config = dataclasses.replace(self.diffusion_config, timestep_respacing=timestep_respacing)
            self._diffusions[key] = create_gaussian_diffusion(config, num_steps)
        return self._diffusions[key]

    # -- layouts ------------------------------------------------------------------------------------------------------

    def keeps(self, layouts: int, height: int, width: int) -> tuple[bool, str]:
        """Whether the modulations of so many layouts (and the null layout) are kept, and why, as a line for a log."""
        needed = (layouts + 1) * self.model.modulation_bytes(height, width)
        free = free_memory(self.device) // self.sharing_memory
        keep = self.keep_modulations == "true" or (self.keep_modulations == "auto" and needed < MEMORY_SHARE * free)
        return keep, (
            f"SPADE's scale and shift are {'kept for all steps' if keep else 'computed anew in every step'}: "
            f"{needed / 2**30:.2f} GiB for {layouts} layout{'s' if layouts > 1 else ''} and the null layout, "
            f"{free / 2**30:.1f} GiB are free{' for each process' * (self.sharing_memory > 1)} "
            f"(keep_modulations {self.keep_modulations})"
        )

    def _layout(self, y: torch.Tensor, guided: bool) -> Layout | GuidedLayout:
        size = tuple(y.shape[2:])
        if self._null is not None and self._null[0] != size:
            self._null = None
        if not self.keeps(len(y), *size)[0]:
            return self.model.guided_layout(y) if guided else Layout(y)
        layout = self.model.encode_layout(y)
        if not guided:
            return layout
        if self._null is None:
            self._null = (size, self.model.encode_layout(torch.zeros_like(y[:1])))
        return GuidedLayout(layout, self._null[1])

    def _read_map(self, source: Any, kind: str) -> torch.Tensor:
        if isinstance(source, (str, os.PathLike)):
            source = open_map(os.fspath(source), kind)
        ids = np.asarray(source)
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iub":
            raise ValueError(
                f"the {kind} must be whole ids [H, W], one per pixel; got {ids.dtype} of shape {list(ids.shape)}"
            )
        return torch.from_numpy(ids.astype(np.int64))[None, None]


def image_seed(seed: int, name: str, index: int) -> int:
    """The seed of sample `index` of the layout `name` in a run with `seed`, a whole number (else a TypeError)."""
    return stable_seed("image", whole_number("seed", seed), name, index)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device (what PyTorch holds unused counts as free)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory()
