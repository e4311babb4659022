"""A checkpoint, ready to turn layouts into images.

pipeline = SDMPipeline.from_checkpoint("OUTPUT/ADE20K-SDM-256CH-FINETUNE/ema_0.9999_best.pt")
images = pipeline("layout.png", s=1.5, sampler="dpmsolver++", num_steps=20, seed=0)
images[0].save("sample.png")
pipeline.save_pretrained("ade20k-sdm", example="layout.png")  # a folder to hand on; `from_pretrained` reads it
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .data.class_lists import moved_classes, recorded_classes
from .data.masks import read_ids
from .fp16_util import PRECISIONS
from .hosts.memory import free_memory
from .layouts.encode import encode_label_map, to_uint8
from .layouts.spade import Layout
from .respace import SpacedDiffusion
from .sampling.encoded_layouts import EncodedLayouts
from .sampling.external import as_sampler, make_solver
from .sampling.guidance import Guide, Predictor
from .sampling.loop import Moment, run_moves
from .sampling.solvers import dynamic_thresholding
from .script_util import create_gaussian_diffusion, create_model, network_settings
from .seeding import ImageNoise, stable_seed, whole_number
from .settings import (
    ConfigError,
    DiffusionConfig,
    ModelConfig,
    Sampling,
    auto_choice,
    check_guidance,
    check_known,
    resolve_precision,
)
from .unet import UNetModel
from .weights import hub, store
from .weights.from_shapes import UNSEEN, describe
from .weights.model_card import About, Example, card_files, read_figures
from .weights.unwrapping import SeveralWeightsError

_LOG = logging.getLogger(__name__)
MEMORY_SHARE = 0.5  # of the free memory, for what is kept: the passes themselves need nearly as much


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Whether SPADE's scale and shift are kept for all steps, decided once for a run.

    `layouts` is how many layouts fit at a time; a batch of more is made in parts. `reason` is a line for a log.
    """

    keep: bool
    layouts: int
    reason: str


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
        record: Mapping[str, Any] | None = None,
    ):
        """grey: the network was trained on grey pictures, and its images are to be grey as well. classes: the names of
        its classes, and their colours uint8 [num_classes, 3]: `class_names` and `palette`, None where unknown. record:
        the config of its training, of which `save_pretrained` hands on what ids mean."""
        self.record = dict(record or {})
        self.grey = grey
        self.class_names, self.palette = classes or (None, None)
        self.precision = precision
        self.keep_modulations = auto_choice("keep_modulations", keep_modulations)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device, memory_format=torch.channels_last).convert_to(PRECISIONS[precision])
        self.model.eval().requires_grad_(False)
        self.compiled = compile
        if compile:
            self.model.compile_prediction()
        self.model_config, self.diffusion_config = model_config, diffusion_config
        self.sharing_memory = 1  # processes among which the device's free memory is divided
        self._size_is_noted = False
        self._diffusions: dict[tuple[str, int], SpacedDiffusion] = {}
        self.layouts = EncodedLayouts(self.model, reuse=compile)  # a graph's replay needs maps at one address
        self._guides = threading.Lock()
        self._guide: tuple[str, SDMPipeline] | None = None  # the network of the last guide_path

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        precision: str = "",
        device: torch.device | str | None = None,
        keep_modulations: str = "auto",
        compile: bool = False,
        weights_key: str = "",
        note: Callable[[str], None] = _LOG.warning,
        **settings: Any,
    ) -> SDMPipeline:
        """Loads a checkpoint: one of this project, which has its config beside it, or any file of such weights
        (docs/checkpoints.md). Without a config the weights show most settings; the rest is as published, where
        `settings` do not say otherwise.

        :param weights_key: which weights, where the file holds several.
        :param note: is told what was unwrapped or converted, and which settings are not verified.
        :param settings: of the network and the diffusion; they may repeat but not contradict the config or the weights.
        :raises ConfigError: a contradiction, an unknown setting. :raises CheckpointError: a damaged or other file.
        :raises DataError: recorded classes that do not fit the network.
        """
        path = os.fspath(path)  # text from here on: a checkpoint may be a URL, too
        check_known(settings, ModelConfig, DiffusionConfig)
        recorded, source = store.read_config(path, note), f"{store.CONFIG_NAME} beside {path}"
        weights = None
        if recorded is None:
            weights = store.load_weights(path, weights_key, note)
            recorded, source = describe(weights, settings, path, note)
        model_config, diffusion_config, precision = network_settings(settings, recorded, source, precision=precision)
        classes = recorded_classes(recorded, model_config.num_classes, source)
        if weights is None:  # read last: what contradicts the config is found before
            weights = store.load_weights(path, weights_key, note)
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
            record=recorded,
        )

    # -- handing on ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, revision: str | None = None, precision: str = "", **options: Any
    ) -> SDMPipeline:
        """Loads what `save_pretrained` made: a folder, or a model on a hub (into its cache; HF_HUB_OFFLINE=1: from it).

        :param source: the folder, or OWNER/NAME on the hub. :param revision: a branch, tag or commit on the hub.
        :param precision: by default the one that the folder recommends, else fp32. :param options: device,
            keep_modulations and compile as in `from_checkpoint`.
        :raises CheckpointError: no such folder or model, one of another library, or weights that are missing, too many
            or damaged.
        """
        path, config = hub.locate(source, revision)
        return cls.from_checkpoint(path, precision=precision or config.get("precision", ""), **options)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        name: str = "",
        license: str = "",
        datasets: Sequence[str] = (),
        figures: Sequence[str | os.PathLike] = (),
        example: str | os.PathLike | Image.Image | np.ndarray | None = None,
        instance_map: str | os.PathLike | Image.Image | np.ndarray | None = None,
        precision: str = "",
        **sampling: Any,
    ) -> str:
        """Makes a folder to hand on: float32 weights, config, model card (see `weights.hub`). Returns its path.

        :param folder: new, or empty. :param name: in the card, where it is not the folder's. :param license: for the
            card, as mit. :param datasets: ids of data sets on a hub. :param figures: files that scorers wrote with
            --json.
        :param example: a label map, with `instance_map` and `sampling` as for a call: the card shows what it gives.
        :param precision: for whoever loads it without a choice.
        :raises CheckpointError: the folder holds something, or cannot be written (nothing is left then); bad figures.
        :raises ConfigError: these weights were rounded to 16 bits; an unknown precision or option.
        """
        path = hub.vacant(folder)
        check_known(sampling.keys() - {"seed"}, Sampling)  # a misspelt name is no option of sampling
        if self.precision != "fp32":
            raise ConfigError(
                f"these weights were rounded to {self.precision}: to hand the network on, load its checkpoint with "
                f'precision fp32 (save_pretrained(..., precision="{self.precision}") recommends {self.precision})'
            )
        config = hub.folder_config(
            self.model_config, self.diffusion_config, self.record, names=self.class_names, palette=self.palette,
            grey=self.grey, precision=precision and resolve_precision(precision, False),
        )  # fmt: skip
        about = About(name or os.path.basename(path), license, datasets, read_figures(figures))
        shown = None if example is None else self._example(example, instance_map, sampling)
        hub.write_folder(path, self.model.state_dict(), config, card_files(config, about, self.model, shown))
        return path

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, message: str = "", **saving: Any) -> str:
        """Uploads what `save_pretrained` makes as one commit; returns its address. Makes the repository where needed.

        :param repo_id: OWNER/NAME. :param saving: as in `save_pretrained`.
        :raises CheckpointError: the hub cannot be reached or refuses, and what `save_pretrained` raises.
        """
        hub.check_repository(repo_id)
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save_pretrained(os.path.join(parent, "model"), **{"name": repo_id} | saving)
            return hub.push_folder(folder, repo_id, private=private, message=message or "Add an SDM network")

    def _example(self, label_map: Any, instance_map: Any, sampling: dict[str, Any]) -> Example:
        undropped = (self.record.get("training") or {}).get("drop_rate") == 0  # guidance was not trained
        sampling = ({"s": 1.0} if undropped else {}) | {"seed": 0} | sampling
        sample = self(label_map, instance_map=instance_map, **sampling)[0]
        label, instance = (
            None if source is None else _read_ids(source, "map").numpy()[0, 0] for source in (label_map, instance_map)
        )
        told = {key: getattr(Sampling, key) for key in ("s", "sampler", "num_steps")} | sampling
        told["sampler"] = as_sampler(told["sampler"])  # its name
        return Example(label, instance, sample, ", ".join(f"{key}={value!r}" for key, value in told.items()))

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
        :param instance_map: instance ids, of the same size, for a network with the edge channel; or "from_labels":
            edges between classes take their place.
        :param batch_size: how many are made at a time; memory grows with it.
        :param seed: a whole number of any type (an element of np.arange, too).
        :param name: the layout's name, which is part of the seed (the sampling script uses the file's stem).
        :param sampling: fields of `settings.Sampling`: s, sampler, num_steps, ...
        :raises ConfigError: an unknown one, or a value that no sampler takes.
        :raises ValueError: ids or sizes that do not fit, naming them. :raises TypeError: a seed that is not whole.
        """
        if samples < 1 or batch_size < 1:
            raise ValueError(f"samples ({samples}) and batch_size ({batch_size}) must be at least 1")
        check_known(sampling, Sampling)
        check_guidance(sampling.get("guidance", Sampling.guidance), sampling)
        if sampling.get("timestep_respacing") and "num_steps" not in sampling:
            sampling["num_steps"] = 0
        label = _read_ids(label_map, "label map")
        if label.max() >= self.model_config.num_classes or label.min() < 0:
            raise ValueError(
                f"the label map has ids {int(label.min())} to {int(label.max())}; the network knows "
                f"0 to {self.model_config.num_classes - 1}"
            )
        if (instance_map is None) != self.model_config.no_instance:
            wants = (
                "takes no instance_map"
                if self.model_config.no_instance
                else ('needs an instance_map (or instance_map="from_labels": edges between classes)')
            )
            raise ValueError(f"this network {wants}")
        if isinstance(instance_map, str) and instance_map == "from_labels":
            instance = label
        else:
            instance = None if instance_map is None else _read_ids(instance_map, "instance map")
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
        keeping: Keeping | None = None,
        progress: bool = False,
        on_step: Callable[[Moment], Any] | None = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3], one for each of the N seeds. May be called from several threads.

        :param label: integers [N, 1, H, W], or [1, 1, H, W] for N samples of one layout; `instance` likewise.
        :param keeping: what `keeping` has decided for the run; by default for this call alone.
        :param on_step: called after every step, with what is known then.
        :raises ValueError: maps of different sizes. :raises FloatingPointError: the network's numbers left its
            precision's range.
        """
        height, width = label.shape[2:]
        if instance is not None and instance.shape[2:] != label.shape[2:]:  # one row or column would be spread over all
            raise ValueError(
                f"the instance map is {'x'.join(map(str, instance.shape[2:]))} (height x width), the label map "
                f"{height}x{width}: both must have a value for every pixel"
            )
        for network in self.networks(sampling):
            network.model.check_size(height, width)
        self._note_size(height, width)
        keeping = keeping or self.keeping(len(label), height, width, sampling=sampling)
        size = keeping.layouts if len(label) > 1 else len(seeds)
        return np.concatenate(
            [
                self._generate(
                    label[first : first + size],
                    None if instance is None else instance[first : first + size],
                    ImageNoise(seeds[first : first + size], (3, height, width), self.device),
                    sampling,
                    keeping.keep,
                    progress,
                    on_step,
                )
                for first in range(0, len(seeds), size)
            ]
        )

    def _note_size(self, height: int, width: int) -> None:
        """Warns, once, of a layout far from what the network has seen: its objects come out in the trained size."""
        trained = self.model_config.image_size
        if self._size_is_noted or (min(height, width) <= 1.5 * trained and max(height, width) <= 4 * trained):
            return
        self._size_is_noted = True
        warnings.warn(
            f"the layout is {width} x {height}, and the network was trained on {trained} x {trained} (or that short"
            " side): it draws objects in the sizes that it has seen; resize the layout, or train at its size",
            stacklevel=2,
        )

    def _generate(self, label, instance, noise, sampling, keep, progress, on_step) -> np.ndarray:
        instance = None if instance is None else instance.to(self.device)
        y = encode_label_map(label.to(self.device), instance, self.model_config.num_classes, self.model.dtype)
        diffusion = self.diffusion(sampling.timestep_respacing, sampling.num_steps)
        solver = make_solver(sampling.sampler, diffusion, sampling.eta)
        guidance = sampling.make_guidance()
        worse = self.guide(sampling)
        with contextlib.ExitStack() as stack:
            layout = stack.enter_context(self.layouts.encoded(y, keep))
            null = self.layouts.null(y, keep) if guidance.other == "null" else None
            guide = worse and worse._as_guide_of(diffusion, stack.enter_context(worse.layouts.encoded(y, keep)))
            del y  # where scale and shift are kept, nothing else needs the maps
            for moment in run_moves(
                diffusion,
                Predictor(self.model, layout, guidance, null, guide),
                noise(),
                solver,
                clip_denoised=sampling.clip_denoised,
                denoised_fn=dynamic_thresholding(sampling.dynamic_threshold) if sampling.dynamic_threshold else None,
                draw_noise=noise,
                after=on_step,
                progress=progress,
            ):
                sample = moment.x
        if not bool(torch.isfinite(sample).all()):
            fp16 = self.precision == "fp16"
            remedy = "try --precision bf16" if fp16 else "has the training of this checkpoint diverged?"
            raise FloatingPointError(f"the network's numbers are not finite in {self.precision}: {remedy}")
        return to_uint8(sample, self.grey)

    def diffusion(self, timestep_respacing: str, num_steps: int) -> SpacedDiffusion:
        """The trained diffusion over the chosen steps. :raises ConfigError: no such steps."""
        key = (timestep_respacing, num_steps)
        if key not in self._diffusions:
            config = dataclasses.replace(self.diffusion_config, timestep_respacing=timestep_respacing)
            self._diffusions[key] = create_gaussian_diffusion(config, num_steps)
        return self._diffusions[key]

    # -- guidance by another network ----------------------------------------------------------------------------------

    def guide(self, sampling: Sampling) -> SDMPipeline | None:
        """The network of `guide_path`, where a run is guided by one; it is read once.

        :raises ConfigError: it cannot guide this one. :raises CheckpointError, DataError: see `from_checkpoint`.
        """
        if sampling.make_guidance().other != "guide":
            return None
        path = sampling.guide_path
        with self._guides:
            if self._guide is None or self._guide[0] != path:
                self._guide = None  # freed before the other is read
                self._guide = (path, self._read_guide(path))
            return self._guide[1]

    def networks(self, sampling: Sampling) -> list[SDMPipeline]:
        """This one, and the one that guides it, if any: all whose weights a run holds."""
        return [self, *filter(None, [self.guide(sampling)])]

    def _as_guide_of(self, diffusion: SpacedDiffusion, layout: Layout) -> Guide:
        """This network, with a layout that it has encoded, for a run of that diffusion."""
        own = self.diffusion("", 0).prediction
        return Guide(self.model, layout, None if type(own) is type(diffusion.prediction) else own)

    def _read_guide(self, path: str) -> SDMPipeline:
        settings = {}
        if store.read_config(path) is None:  # what its weights do not show is as in this network
            own = {**dataclasses.asdict(self.model_config), **dataclasses.asdict(self.diffusion_config)}
            settings = {name: own[name] for name in (*UNSEEN, "num_classes", "no_instance")}
        try:
            guide = SDMPipeline.from_checkpoint(
                path,
                precision=self.precision,
                device=self.device,
                keep_modulations=self.keep_modulations,
                compile=self.compiled,
                **settings,
            )
        except SeveralWeightsError as error:  # weights_key chooses in the file of this network
            raise store.CheckpointError(
                f"guide_path {path} holds several sets of weights ({', '.join(error.names)}): make a file of one of "
                f"them: python scripts/convert_checkpoint.py {path} OUT.safetensors --weights_key NAME"
            ) from None
        if differences := guide_differences(self, guide):
            raise ConfigError(
                f"guide_path {path} cannot guide this network ({'; '.join(differences)}): give an earlier checkpoint "
                "of the same training, or a smaller network trained on the same data"
            )
        return guide

    # -- layouts ------------------------------------------------------------------------------------------------------

    def keeping(
        self, layouts: int, height: int, width: int, free: int | None = None, sampling: Sampling | None = None
    ) -> Keeping:
        """Whether the modulations of layouts of height x width are kept, up to `layouts` at a time, in `free` bytes: by
        default what is free now. Fewer at a time rather than none.

        Beside them the null layout's are kept or, where `sampling` is guided by another network, that network's own.
        """
        guide = self.guide(sampling) if sampling else None
        each = self.modulation_bytes(height, width, sampling)
        beside = 0 if guide else 1  # the null layout
        free = free_memory(self.device) // self.sharing_memory if free is None else free
        fit = int(MEMORY_SHARE * free) // each - beside
        keep = self.keep_modulations == "true" or (self.keep_modulations == "auto" and fit >= 1)
        at_once = max(1, min(layouts, fit)) if keep and self.keep_modulations == "auto" else layouts
        return Keeping(
            keep,
            at_once,
            f"SPADE's scale and shift are {'kept for all steps' if keep else 'computed anew in every step'}: "
            f"{(at_once + beside) * each / 2**30:.2f} GiB for {at_once} layout{'s' * (at_once > 1)} "
            f"{'in both networks' if guide else 'and the null layout'}"
            f"{f' ({layouts} at once would not fit)' * (at_once < layouts)}, "
            f"{free / 2**30:.1f} GiB are free{' for each process' * (self.sharing_memory > 1)} "
            f"(keep_modulations {self.keep_modulations})",
        )

    def modulation_bytes(self, height: int, width: int, sampling: Sampling | None = None) -> int:
        """Bytes that are kept for a layout of height x width, with those of a network that guides, if any."""
        networks = self.networks(sampling) if sampling else [self]
        return sum(network.model.modulation_bytes(height, width) for network in networks)


def guide_differences(pipeline: SDMPipeline, guide: SDMPipeline) -> list[str]:
    """Why one network cannot guide another, a phrase for each reason, [] where it can.

    Both must see the same noisy images and layouts and speak of the same timesteps. Width, depth and attention may
    differ, and so may what is predicted: images are compared.
    """
    differences = []
    for config, other, names in (
        (pipeline.model_config, guide.model_config, ("image_size", "num_classes", "no_instance")),
        (
            pipeline.diffusion_config,
            guide.diffusion_config,
            ("diffusion_steps", "noise_schedule", "rescale_timesteps"),
        ),
    ):
        for name in names:
            if getattr(config, name) != getattr(other, name):
                differences.append(f"{name} {getattr(other, name)}, here {getattr(config, name)}")
    if pipeline.grey != guide.grey:
        differences.append(f"trained on {'grey' if guide.grey else 'colour'} pictures")
    return differences + moved_classes(pipeline.class_names or (), guide.class_names or ())


def image_seed(seed: int, name: str, index: int) -> int:
    """The seed of sample `index` of the layout `name` in a run with `seed`, a whole number (else a TypeError)."""
    return stable_seed("image", whole_number("seed", seed), name, index)


def _read_ids(source: Any, kind: str) -> torch.Tensor:
    """The map of a caller, int64 [1, 1, H, W]."""
    return torch.from_numpy(read_ids(source, kind))[None, None]
