"""Settings: one field of a dataclass each, with its help line.

The flag, its default and its entry in the saved config follow from it (`script_util`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from .resample import SCHEDULE_SAMPLERS
from .sampling.external import SchedulerSampler, as_sampler
from .sampling.guidance import GUIDE, Guidance, check_options, make_guidance, method_options
from .sampling.solvers import SAMPLERS
from .setting_values import (  # noqa: F401 (callers know them as settings.*)
    ConfigError,
    another_default,
    as_setting,
    auto_choice,
    binding_settings,
    check_known,
    check_place,
    check_range,
    numbers_of,
    resolve_precision,
    setting,
    str2bool,
)

MOST_GUIDANCE = 1000.0  # far beyond any use; what is larger leaves the range of float32 in the steps
# Far beyond any use, too: what is larger is a slip of the finger, and would take memory for hours before it fails.
MOST_PIXELS, MOST_CLASSES, MOST_WIDTH, MOST_BLOCKS, MOST_LEVELS = 2**14, 2**15, 2**16, 100, 16
MOST_STEPS, MOST_BATCH, MOST_PROCESSES, MOST_RANKS, MOST_JITTER = 10**5, 2**16, 2**10, 10**6, 100


@dataclass
class ModelConfig:
    """The network. Defaults are the traditional ones; see the scripts for the published settings."""

    image_size: int = setting(
        64, "side of the (square) training images; the short side where the aspect is kept", binding=True
    )
    num_classes: int = setting(
        151, "label ids, with the one of unlabelled pixels; training takes the data set's", binding=True
    )
    num_channels: int = setting(128, "width of the network at full resolution", binding=True)
    num_res_blocks: int = setting(2, "residual blocks per resolution", binding=True)
    num_heads: int = setting(4, "attention heads, where num_head_channels is -1", binding=True)
    num_heads_upsample: int = setting(-1, "attention heads in the decoder; -1: as in the encoder", binding=True)
    num_head_channels: int = setting(-1, "channels per attention head; overrides num_heads", binding=True)
    attention_resolutions: str = setting("16,8", "heights (for image_size) at which attention is placed", binding=True)
    channel_mult: str = setting(
        "", "width multipliers per resolution, as 1,2,2; empty: chosen by image_size", binding=True
    )
    dropout: float = setting(0.0, "dropout rate in the residual blocks")
    class_cond: bool = setting(True, "condition on the layout; SDM always does")
    use_checkpoint: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    use_scale_shift_norm: bool = setting(
        True, "the timestep scales and shifts the norm, rather than being added", binding=True
    )
    resblock_updown: bool = setting(False, "resample inside residual blocks", binding=True)
    use_fp16: bool = setting(False, "the same as --precision fp16")
    use_new_attention_order: bool = setting(False, "q, k, v before heads in the attention's channels", binding=True)
    no_instance: bool = setting(False, "no instance-edge channel, whatever the data offers", binding=True)

    def check(self) -> None:
        """:raises ConfigError: a value out of its range."""
        check_range(self, 1, "image_size", below=MOST_PIXELS + 1)
        check_range(self, 1, "num_classes", below=MOST_CLASSES)
        check_range(self, 1, "num_channels", "num_heads", below=MOST_WIDTH)
        check_range(self, 1, "num_res_blocks", below=MOST_BLOCKS + 1)
        for name in ("num_heads_upsample", "num_head_channels"):
            if getattr(self, name) != -1:
                check_range(self, 1, name, below=MOST_WIDTH)
        check_range(self, 0, "dropout", below=1)
        if len(self.multipliers()) > MOST_LEVELS:
            raise ConfigError(f"channel_mult has {len(self.multipliers())} numbers; at most {MOST_LEVELS} are possible")
        for multiplier in self.multipliers():
            width = multiplier * self.num_channels
            if not 0 < multiplier < math.inf or not 1 <= width < MOST_WIDTH:
                raise ConfigError(
                    f"channel_mult {self.channel_mult!r} times num_channels {self.num_channels} makes a layer of "
                    f"{width:g} channels; there must be at least 1, and less than {MOST_WIDTH}"
                )
        self.attention_downsamplings()

    def check_attention(self) -> None:
        """For a new training: one that goes on, and a checkpoint, may have such a height among others.

        :raises ConfigError: attention at a height that no level of the network has.
        """
        levels = range(len(self.multipliers()))
        asked = numbers_of("attention_resolutions", self.attention_resolutions, int)
        for resolution, factor in zip(asked, self.attention_downsamplings(), strict=True):
            if factor not in [2**level for level in levels]:
                heights = ", ".join(str(self.image_size // 2**level) for level in levels)
                raise ConfigError(
                    f"attention_resolutions {self.attention_resolutions!r}: no level of the network has the height"
                    f" {resolution}; the heights are {heights} (image_size {self.image_size}, {len(levels)} levels)"
                )

    def layout_channels(self) -> int:
        return self.num_classes + (not self.no_instance)

    def multipliers(self) -> tuple[float, ...]:
        """The width multipliers, from the flag or, as traditionally, from image_size."""
        if self.channel_mult:
            return tuple(numbers_of("channel_mult", self.channel_mult, float))
        by_size = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
        if self.image_size not in by_size:
            raise ConfigError(
                f"image_size {self.image_size} has no traditional channel_mult (only {', '.join(map(str, by_size))} "
                "have): give one, for example --channel_mult 1,2,2"
            )
        return by_size[self.image_size]

    def attention_downsamplings(self) -> list[int]:
        factors = []
        for resolution in numbers_of("attention_resolutions", self.attention_resolutions, int):
            if resolution < 1:
                raise ConfigError(f"attention_resolutions {self.attention_resolutions!r}: {resolution} is not a height")
            if resolution <= self.image_size and self.image_size % resolution:
                raise ConfigError(
                    f"attention_resolutions {self.attention_resolutions!r}: {resolution} does not divide image_size "
                    f"{self.image_size}, so that no layer has this height"
                )
            factor = self.image_size // resolution
            if factor & (factor - 1):  # it would silently get no attention
                raise ConfigError(
                    f"attention_resolutions {self.attention_resolutions!r}: heights halve from image_size "
                    f"{self.image_size} on, so that no layer has the height {resolution}"
                )
            factors.append(factor)
        return factors


@dataclass
class DiffusionConfig:
    """The diffusion process and its loss."""

    learn_sigma: bool = setting(False, "the network also predicts the variance", binding=True)
    diffusion_steps: int = setting(1000, "steps of the trained process", binding=True)
    noise_schedule: str = setting("linear", "linear or cosine", binding=True)
    timestep_respacing: str = setting("", "steps to sample with, as 250, 10,15,20 or ddim25; empty: all")
    use_kl: bool = setting(False, "train on the variational bound alone")
    predict_xstart: bool = setting(False, "the network predicts the image, not the noise", binding=True)
    predict_v: bool = setting(False, "it predicts the velocity, between both (arXiv 2202.00512)", binding=True)
    rescale_timesteps: bool = setting(False, "the network sees timesteps scaled to 0..1000", binding=True)
    rescale_learned_sigmas: bool = setting(False, "scale the variance's loss term by diffusion_steps / 1000")
    loss_weighting: str = setting("none", "none, or min_snr (arXiv 2303.09556)")

    def check(self) -> None:
        """:raises ConfigError: a value out of its range."""
        check_range(self, 1, "diffusion_steps", below=MOST_STEPS + 1)


@dataclass
class DataConfig:
    """Where images and layouts come from."""

    data_dir: str = setting("", "folder (or gs://, az://, https:// address) of the data set")
    dataset_mode: str = setting("ade20k", "ade20k, cityscapes, celeba, coco or custom")
    num_workers: int = setting(2, "loader processes per rank")
    instances: str = setting(
        "", "from_labels: edges between classes in place of instance maps; empty: the data set's, or as in training"
    )

    def check(self) -> None:
        """:raises ConfigError: a value out of its range."""
        check_range(self, 0, "num_workers", below=MOST_PROCESSES + 1)
        if self.instances not in ("", "from_labels"):
            raise ConfigError(f"instances must be from_labels, or be left out; got {self.instances!r}")
        check_place("data_dir", self.data_dir, ("gs", "az", "https"))


@dataclass
class TrainConfig:
    """Training."""

    logdir: str = setting("", "where everything goes; default: the environment's OPENAI_LOGDIR, else OUTPUT/run")
    resume_checkpoint: str = setting(
        "", "weights to start from: model.pt begins a new run (fine-tuning), a numbered file continues"
    )
    transfer_from: str = setting("", "weights of a network of other classes, for a new run (docs/checkpoints.md)")
    class_map: str = setting("", 'JSON file: what new classes start from, as {"road": "street"}; with transfer_from')
    weights_key: str = setting("", "which weights of resume_checkpoint or transfer_from, where that file holds several")
    batch_size: int = setting(1, "images per rank and step")
    microbatch: int = setting(-1, "images per forward pass, gradients being accumulated; -1: batch_size")
    lr: float = setting(1e-4, "learning rate")
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    lr_anneal_steps: int = setting(0, "steps over which it falls to 0, where training ends; 0: it stays")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    ema_rate: str = setting("0.9999", "rates of the averaged weights, as 0.999,0.9999")
    drop_rate: float = setting(0.0, "share of samples whose layout is dropped, for guidance")
    schedule_sampler: str = setting("uniform", "timesteps to train on: uniform or loss-second-moment")
    max_steps: int = setting(0, "steps after which training ends; 0: until interrupted")
    seed: int = setting(0, "of initial weights, data order, crops, noise and label drop")
    precision: str = setting("", "fp32, fp16 or bf16; empty: the checkpoint's, or fp16 with use_fp16, else fp32")
    fp16_scale_growth: float = setting(1e-3, "growth of log2 of the loss scale per step in fp16")
    max_grad_norm: float = setting(0.0, "gradients are clipped to this norm; 0: never")
    max_bad_steps: int = setting(
        50, "non-finite steps in a row after which training stops; a GPU is asked at every row of figures"
    )
    layout_lookup: str = setting(
        "auto", "SPADE's maps once for each neighbourhood of labels: auto (on a CPU, not compiled), true or false"
    )
    compile: bool = setting(
        False, "torch.compile the network: minutes to start; sampling on a CPU is no faster with it"
    )
    shard_optimizer: bool = setting(False, "spread the optimizer's state over the ranks")
    log_interval: int = setting(10, "steps between rows of figures")
    save_interval: int = setting(10000, "steps between checkpoints; each also measures the validation loss")
    keep_checkpoints: int = setting(
        0, "numbered checkpoints to keep, newest first, besides model.pt and the best; 0: all"
    )
    val_images: int = setting(64, "validation images, with fixed timesteps and noise, whose loss decides the best EMA")
    sample_interval: int = setting(0, "steps between preview pages; 0: none")
    tensorboard: bool = setting(False, "also write TensorBoard files")
    random_crop: bool = setting(True, "train on random crops; else on centre crops")
    random_flip: bool = setting(True, "mirror half of the training images")
    scale_jitter: float = setting(0.0, "training images are enlarged by up to this fraction more before the crop")
    skip_bad: bool = setting(False, "pass over unreadable files, counting them, instead of stopping")
    class_balance: bool = setting(False, "draw images with rare classes more often")

    def ema_rates(self) -> list[str]:
        """The rates as they were written: they are part of file names."""
        rates = [rate.strip() for rate in self.ema_rate.split(",")]
        if not self.ema_rate.strip() or len(set(rates)) < len(rates):
            raise ConfigError(f"ema_rate {self.ema_rate!r} must be one or more different rates, as 0.999,0.9999")
        for rate, value in zip(rates, numbers_of("ema_rate", self.ema_rate, float), strict=True):
            if not 0 <= value < 1:
                raise ConfigError(f"ema_rate {rate} is not in [0, 1)")
        return rates

    def check(self) -> None:
        """:raises ConfigError: a value out of its range."""
        self.ema_rates()
        resolve_precision(self.precision, False)
        check_range(self, 1, "batch_size", below=MOST_BATCH + 1)
        check_range(self, 1, "log_interval", "save_interval", "max_bad_steps")
        check_range(self, 0, "max_steps", "warmup_steps", "lr_anneal_steps", "sample_interval", "keep_checkpoints")
        check_range(self, 0, "val_images", "lr", "weight_decay", "max_grad_norm", "fp16_scale_growth")
        check_range(self, 0, "scale_jitter", below=MOST_JITTER)
        check_range(self, 0, "seed", below=2**64)
        check_place("logdir", self.logdir)
        for name in ("resume_checkpoint", "transfer_from"):
            check_place(name, getattr(self, name), ("gs", "az", "https"))
        check_place("class_map", self.class_map)
        if self.transfer_from and self.resume_checkpoint:
            raise ConfigError(
                f"--transfer_from {self.transfer_from} and --resume_checkpoint {self.resume_checkpoint} exclude each "
                "other: the first begins with other classes, the second goes on with the same"
            )
        if self.class_map and not self.transfer_from:
            raise ConfigError(f"--class_map {self.class_map} goes with --transfer_from: give both, or neither")
        if self.schedule_sampler not in SCHEDULE_SAMPLERS:
            raise ConfigError(
                f"unknown schedule_sampler {self.schedule_sampler!r}: choose one of {', '.join(SCHEDULE_SAMPLERS)}"
            )
        if not 0 <= self.drop_rate <= 1:
            raise ConfigError(f"drop_rate is a share, between 0 and 1; got {self.drop_rate}")
        if self.microbatch == 0 or self.microbatch < -1:
            raise ConfigError(f"microbatch must be -1 or at least 1; got {self.microbatch}")
        if auto_choice("layout_lookup", self.layout_lookup) == "true" and self.compile:
            raise ConfigError("layout_lookup true cannot be compiled: leave out --layout_lookup or --compile")

    def looks_layouts_up(self, device_type: str) -> bool:
        """Whether training on that kind of device looks layouts up (see `layouts.lookup`)."""
        choice = auto_choice("layout_lookup", self.layout_lookup)
        # Not timed on a GPU yet. Compiled: what is looked up has other shapes in every step, each to be compiled anew.
        return choice == "true" or (choice == "auto" and device_type == "cpu" and not self.compile)


@dataclass
class Sampling:
    """How images are made. These are the defaults of `pipeline(...)` in Python; `SampleConfig` has the command's, which
    are the published ones."""

    s: float = setting(1.5, "guidance scale; 1 or less: no guidance")
    sampler: str = setting("dpmsolver++", "ddpm, ddim or dpmsolver++ (in Python, a diffusers scheduler too)")
    num_steps: int = setting(20, "steps, evenly spaced from the noisiest; 0: as timestep_respacing says")
    timestep_respacing: str = setting("", "steps to sample with, as 250, 10,15,20 or ddim25; empty: all")
    eta: float = setting(0.0, "randomness of ddim: 0 none, 1 that of ddpm")
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "LOW,HIGH: part of the trajectory that is guided, 0 the noise, 1 the image"
    )
    guidance: str = setting("cfg", "how the prediction is guided: cfg (as published), apg, rescale or autoguidance")
    apg_momentum: float = setting(-0.5, "apg: weight of the changes of the steps before; below 0 they are taken off")
    apg_radius: float = setting(15.0, "apg: the largest change, as a norm over all pixels and channels; 0: no limit")
    apg_parallel: float = setting(0.0, "apg: share that is kept of the change along the image itself")
    rescale_phi: float = setting(0.7, "rescale: share of the contrast of an image that is not guided")
    guide_path: str = setting("", "autoguidance: checkpoint of the worse network, as an early one of the same training")
    clip_denoised: bool = setting(True, "clip the predicted image to [-1, 1] in every step")
    dynamic_threshold: float = setting(0.0, "Imagen's dynamic thresholding at this quantile, as 0.995; 0: off")

    def __post_init__(self) -> None:
        """Gives every value its field's type, as 2 for "2". :raises ConfigError: a value that no sampler takes."""
        try:
            self.sampler = as_sampler(self.sampler)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for field in dataclasses.fields(Sampling):
            setattr(self, field.name, as_setting(field.name, field.default, getattr(self, field.name)))
        self._check_sampling()

    def _check_sampling(self) -> None:
        if not abs(self.s) <= MOST_GUIDANCE:  # nor is NaN
            raise ConfigError(
                f"s must be a finite number; got {self.s:g} (1 or less: no guidance; at most {MOST_GUIDANCE:g})"
            )
        if self.sampler not in SAMPLERS and not isinstance(self.sampler, SchedulerSampler):
            raise ConfigError(f"unknown sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        check_place(GUIDE, self.guide_path, ("gs", "az", "https"))
        fields = dataclasses.fields(Sampling)
        check_guidance(self.guidance, [f.name for f in fields if getattr(self, f.name) != f.default])
        try:
            needs_guide = self.make_guidance().other == "guide"
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if needs_guide and not self.guide_path:
            raise ConfigError(f"guidance {self.guidance} needs a worse network: name its checkpoint as {GUIDE}")
        if not 0 <= self.dynamic_threshold <= 1:
            raise ConfigError(f"dynamic_threshold must lie in (0, 1], or be 0 for none; got {self.dynamic_threshold}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta must lie between 0 and 1; got {self.eta}")

    def make_guidance(self) -> Guidance:
        """The guidance of one run. :raises ValueError: values that it does not take."""
        options = {name: getattr(self, name) for name in method_options(self.guidance) if name != GUIDE}
        return make_guidance(self.s, self.guidance_interval, self.guidance, **options)


@dataclass
class SampleConfig(Sampling):
    """Sampling."""

    s: float = another_default(Sampling, "s", 1.0)
    sampler: str = setting("", "ddpm, ddim or dpmsolver++; empty: ddim with use_ddim, else ddpm")
    num_steps: int = another_default(Sampling, "num_steps", 0)
    model_path: str = setting("", "the checkpoint: an ema or model file; flags are read from config.json beside it")
    weights_key: str = setting("", "which weights of model_path, where that file holds several, as ema")
    results_path: str = setting("RESULTS", "folder for images/, labels/, samples/ and the overview")
    labels_dir: str = setting("", "sample from the label maps in this folder alone, without photographs")
    split: str = setting("val", "split whose layouts are sampled: val (or what the data set calls it), test or train")
    num_samples: int = setting(10000, "layouts to sample at most")
    samples_per_layout: int = setting(1, "images per layout; more than one go to samples_00/, samples_01/, ...")
    batch_size: int = setting(16, "images at a time and rank")
    use_ddim: bool = setting(False, "the same as --sampler ddim")
    seed: int = setting(0, "with the layout's name and the sample's index, the seed of each image")
    precision: str = setting("", "fp32, fp16 or bf16; empty: fp16 with use_fp16, else fp32")
    keep_modulations: str = setting(
        "auto", "keep each layout's SPADE maps for all steps: auto (if memory allows), true or false"
    )
    compile: bool = setting(
        False, "torch.compile the network: minutes to start; sampling on a CPU is no faster with it"
    )
    overwrite: bool = setting(False, "make images again that are there already")

    def _check_sampling(self) -> None:
        """`sampling` does it, once it is known which sampler is meant."""

    def sampling(self) -> Sampling:
        """The part that decides how images are made. :raises ConfigError: a value that no sampler takes."""
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ConfigError(f"--use_ddim True contradicts --sampler {self.sampler}")
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
        return Sampling(**chosen | {"sampler": self.sampler or ("ddim" if self.use_ddim else "ddpm")})

    def check(self, needs_model: bool = True) -> None:
        """:raises ConfigError: a value out of its range."""
        self.sampling()
        if not self.results_path:
            raise ConfigError("results_path is empty; name a folder for the results")
        check_place("results_path", self.results_path)
        check_place("model_path", self.model_path, ("gs", "az", "https"))
        if needs_model and not self.model_path:
            raise ConfigError("give the checkpoint: --model_path OUTPUT/.../ema_0.9999_best.pt")
        if self.guide_path and self.guide_path == self.model_path:
            raise ConfigError(f"guide_path is the checkpoint itself, {self.guide_path}: name a worse one")
        check_range(self, 1, "num_samples")
        check_range(self, 1, "batch_size", "samples_per_layout", below=MOST_BATCH + 1)


@dataclass
class PlanConfig:
    """A plan instead of a run: what it would take (docs/memory.md)."""

    dry_run: bool = setting(False, "check everything and print what the run would take; write and train nothing")
    memory_gib: float = setting(0.0, "plan for so many GiB per rank; 0: what is free on the device")
    plan_device: str = setting("", "plan for a cpu or a gpu; empty: the device at hand")
    plan_ranks: int = setting(0, "plan for so many ranks; 0: as many as were started")
    peak_tflops: float = setting(0.0, "operations per second of one device, in 10^12; with peak_share, tells times")
    peak_share: float = setting(0.0, "share of them that the run reaches, as 0.4")

    def __post_init__(self) -> None:
        """:raises ConfigError: a value out of its range."""
        if self.plan_device not in ("", "cpu", "gpu"):
            raise ConfigError(f"plan_device must be cpu or gpu (or empty); got {self.plan_device!r}")
        check_range(self, 0, "memory_gib", "peak_tflops")
        check_range(self, 0, "plan_ranks", below=MOST_RANKS + 1)
        if not 0 <= self.peak_share <= 1:
            raise ConfigError(f"peak_share is a share, between 0 and 1; got {self.peak_share}")
        if (self.peak_tflops > 0) != (self.peak_share > 0):
            raise ConfigError(
                f"peak_tflops is {self.peak_tflops:g} and peak_share {self.peak_share:g}: give both, or neither"
            )


def check_guidance(method: str, given: Iterable[str]) -> None:
    """:raises ConfigError: an unknown guidance method, or an option among the names `given` that another one takes."""
    try:
        check_options(method, given)
    except ValueError as error:
        raise ConfigError(str(error)) from None
