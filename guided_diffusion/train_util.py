"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .dist_util import World
from .fp16_util import PRECISIONS, MixedPrecisionTrainer, StepResult, global_norm
from .hosts.memory import keep_freed_memory
from .image_datasets import LayoutDataset, balance_weights, training_batches
from .layouts.encode import to_network
from .logger import Averages, Logger, progress_bar
from .nn import update_ema
from .objectives.objective import Batch, Draws, Objective
from .resample import create_schedule_sampler
from .runs.pictures import save_png
from .runs.resume import (
    Start,
    changed_settings,
    check_base,
    collect_sharded_state,
    find_start,
    load_optimizer_state,
    to_cpu,
)
from .runs.stop_signals import StopSignals
from .runs.validation import PREVIEW_SCALE, Validation, ValidationFailed, preview_page
from .script_util import create_gaussian_diffusion
from .seeding import normals, stable_seed, uniforms
from .settings import ConfigError, DiffusionConfig, TrainConfig, resolve_precision
from .unet import UNetModel
from .weights import store

PREVIEW_STEPS = 20


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite; the message names the last good checkpoint."""


class TrainLoop:
    """Trains `model` on `dataset` until `config.max_steps`, the end of the annealing, or a signal.

    A step's every random choice follows from the run's seed and the positions of its samples, so a run that was
    stopped, or killed, and started again ends in the same weights as an undisturbed one.

    :param objective: what a step minimises, and the validation measures.
    :param validation: the split whose loss decides the best EMA; None: the latest EMA counts as best.
    :param record: the settings to save as config.json beside the checkpoints.
    """

    def __init__(
        self,
        *,
        model: UNetModel,
        objective: Objective,
        diffusion_config: DiffusionConfig,
        dataset: LayoutDataset,
        validation: LayoutDataset | None,
        config: TrainConfig,
        num_workers: int,
        world: World,
        logger: Logger,
        logdir: str,
        record: dict[str, Any],
    ):
        self.config, self.world, self.logger, self.logdir, self.record = config, world, logger, logdir, record
        self.dataset, self.num_workers = dataset, num_workers
        self.objective = objective
        self.preview_diffusion = create_gaussian_diffusion(
            dataclasses.replace(diffusion_config, timestep_respacing=""),
            min(PREVIEW_STEPS, diffusion_config.diffusion_steps),
        )
        self.schedule_sampler = create_schedule_sampler(config.schedule_sampler, self.objective.num_timesteps)
        self.microbatch = config.microbatch if config.microbatch > 0 else config.batch_size
        self.global_batch = config.batch_size * world.size
        self.look_up = config.looks_layouts_up(world.device.type)
        self.step = 0  # optimizer steps taken or skipped; checkpoints carry this number
        self.samples_seen = 0
        self.bad_steps = self.bad_in_a_row = 0
        self.saved_step: int | None = None

        for split in (dataset, validation):
            try:
                model.check_size(*(split or dataset).shape)
            except ValueError as error:
                raise ConfigError(f"{error} (--image_size, --channel_mult)") from error
        logger.log(
            f"{len(dataset)} training images of {dataset.shape[0]}x{dataset.shape[1]}, {dataset.num_classes} classes; "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
        )
        precision = resolve_precision(config.precision, record["model"]["use_fp16"])
        if precision == "fp16" and world.device.type == "cpu":
            logger.log("note: float16 is slow on a CPU; --precision bf16 or fp32 is better there")
        model.dtype = PRECISIONS[precision]
        if world.device.type == "cpu":
            keep_freed_memory()
            # Activations are channels-last here too. Weights are not: their gradients come in the default layout, and
            # every one would have to be copied.
            self.model = model.to(world.device)
        else:
            self.model = model.to(world.device, memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())
        self.emas: dict[str, list[torch.Tensor]] = {}
        self.start: Start = world.on_main(self._find_start)
        self.record["start"] = self.start.base
        self._load_weights()
        self.optimizer = self._make_optimizer()
        self.trainer = MixedPrecisionTrainer(
            self.parameters,
            self.optimizer,
            precision=precision,
            scale_growth=config.fp16_scale_growth,
            max_grad_norm=config.max_grad_norm,
        )
        self._load_optimizer()
        self.distributed: DistributedDataParallel | None = None
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.distributed = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        self.network: torch.nn.Module = self.distributed or self.model
        if config.compile:
            if self.distributed is not None and record["model"]["use_checkpoint"]:
                torch._dynamo.config.optimize_ddp = False  # DDP's division of the graph refuses what is recomputed
            self.network = torch.compile(self.network)
        self.validation = None
        self.validation_set = validation
        if validation is None:
            logger.log("no validation split: the latest EMA counts as the best")
        elif config.val_images > 0:
            self.validation = Validation(
                validation, objective, world, images=config.val_images, batch_size=self.microbatch
            )
            for problem in self.validation.check():  # now, not at the first save
                logger.log(f"note: left out of the validation: {problem}")
        self.averages = Averages(world.device, self.objective.num_timesteps)

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _find_start(self) -> Start:
        """What the log directory or --resume_checkpoint offers. On rank 0."""
        self._lock = None
        if os.path.isdir(self.logdir):  # a run that is just saving its last step must not be read before it has
            self._take_log_directory()
        rates, sizes = self.config.ema_rates(), dict(world_size=self.world.size, global_batch=self.global_batch)
        return find_start(self.logdir, self.config.resume_checkpoint, rates, **sizes, log=self.logger.log)

    def _take_log_directory(self) -> None:
        """:raises CheckpointError: another run has it, or it cannot be written."""
        with self._writing_log_directory():
            os.makedirs(self.logdir, exist_ok=True)
            self._lock = self._lock or store.lock(self.logdir)

    @contextlib.contextmanager
    def _writing_log_directory(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store.CheckpointError(
                f"cannot write to the log directory {self.logdir} ({error}): give another --logdir"
            ) from error

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = dict(lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)
        if self.config.shard_optimizer and self.world.size > 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # here, as importing it takes seconds

            return ZeroRedundancyOptimizer(self.parameters, torch.optim.AdamW, **options)
        return torch.optim.AdamW(self.parameters, **options)

    def _load_weights(self) -> None:
        """The network's weights and its EMAs, in the memory layout of the weights."""
        state = self.world.on_main(self.start.read_model)
        if state is not None:
            store.load_state_into(self.model, state, self.start.model)
        elif self.world.size > 1:  # the seed gives every rank the same weights; make sure of it
            self.model.load_state_dict(self.world.broadcast_tree(to_cpu(self.model.state_dict())))
        del state  # a copy in every rank
        for rate in self.config.ema_rates():
            weights = self.world.on_main(lambda rate=rate: self.start.read_ema(rate)) or self.model.state_dict()
            self.emas[rate] = [
                torch.empty_like(parameter, requires_grad=False).copy_(weights[name])
                for name, parameter in self.model.named_parameters()
            ]
        self.step, self.samples_seen = self.start.step, self.start.samples_seen
        if self.start.continues:
            self.saved_step = self.start.step

    def _load_optimizer(self) -> None:
        optimizer = self.world.on_main(self.start.read_optimizer)
        if optimizer is None:
            return
        trainer = optimizer.pop("trainer", None)  # absent in checkpoints of other programs
        try:
            load_optimizer_state(self.optimizer, optimizer)
        except (KeyError, ValueError) as error:
            raise store.CheckpointError(
                f"{self.start.optimizer} does not fit the network that the flags describe ({error}); "
                "start from model.pt instead, which needs no optimizer"
            ) from error
        for group in self.optimizer.param_groups:  # the flag counts, not what it was when saved
            group["weight_decay"] = self.config.weight_decay
        if trainer is not None:
            self.trainer.load_state_dict(trainer["precision"])
            history = {name: value.numpy() for name, value in trainer["schedule_sampler"].items()}
            if history:
                self.schedule_sampler.load_state_dict(history)
            self.bad_steps, self.bad_in_a_row = trainer["bad_steps"], trainer["bad_in_a_row"]

    def _open_log_directory(self) -> None:
        """Everything that could be refused has been checked: from here on there are files. On rank 0."""
        self._take_log_directory()
        with self._writing_log_directory():
            store.remove_leftovers(self.logdir)
            self.logger.open(self.step)
        if self.start.continues:  # the run may have been killed between writing the set and publishing it
            if changes := changed_settings(self.logdir, self.record):
                self.logger.log(f"note: changed since the run was saved: {', '.join(changes)}")
            manifest = store.read_manifest(self.logdir, self.step)
            losses, measure = manifest["validation_loss"], manifest.get("measure")
            store.publish_set(self.logdir, self.step, list(self.start.emas), losses, measure)

    # -- the loop -----------------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        """The step at which training ends; 0: it does not."""
        ends = [end for end in (self.config.max_steps, self.config.lr_anneal_steps) if end > 0]
        return min(ends, default=0)

    @property
    def finished(self) -> bool:
        """Whether that step is reached."""
        return 0 < self.last_step <= self.step

    def run(self) -> bool:
        """Trains to the end, or until a signal. Returns False where a signal came before the last step.

        :raises TrainingDiverged, CheckpointError, DataError: with everything saved before.
        """
        self.world.on_main(self._open_log_directory)
        if self.finished:
            self.world.on_main(lambda: check_base(self.start, self.config.resume_checkpoint))
            self.logger.log(f"nothing to do: step {self.step} of {self.last_step} is reached")
            if self.saved_step is None:  # started from elsewhere: what comes next looks here
                self.save()
            return True
        weights: np.ndarray | bool = False
        if self.config.class_balance:
            weights = self.world.on_main(lambda: balance_weights(self.dataset, self.num_workers))
        batches = training_batches(
            self.dataset,
            batch_size=self.config.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            start=self.samples_seen,
            num_workers=self.num_workers,
            pin_memory=self.world.device.type == "cuda",
            class_balance=weights,
        )
        with batches, StopSignals() as signals, self._progress_bar() as bar:
            self.model.train()
            self._clock, self._clock_step = time.monotonic(), self.step
            while not self.finished:
                self.train_step(next(batches))
                bar.update()
                if self.step % self.config.log_interval == 0:
                    self._log_row(bar, len(batches.skipped))
                if self.config.sample_interval and self.step % self.config.sample_interval == 0:
                    with self._clock_stopped():
                        self._preview()
                stop = self.world.max(signals.number)
                due = self.step % self.config.save_interval == 0
                if due or stop:
                    with self._clock_stopped():
                        self.save(measure_first=due)
                if stop and not self.finished:
                    name = signal.Signals(stop).name
                    self.logger.log(f"stopped by {name} at step {self.step}; all is saved")
                    return not self.last_step
            if self.saved_step != self.step:
                self.save()
        self.logger.log(f"done: {self.step} steps; the weights are in {self.logdir}")
        return True

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step on this rank's batch. A collective."""
        positions, seed = batch["position"].tolist(), self.config.seed
        t, weights = self.schedule_sampler.sample(uniforms(seed, "timestep", positions))
        dropped = torch.from_numpy(uniforms(seed, "drop", positions) < self.config.drop_rate)
        noise_seeds = [stable_seed(seed, "noise", position) for position in positions]
        # Dropout alone draws from the global generator.
        torch.manual_seed(stable_seed(seed, "dropout", self.step, self.world.rank))
        self._set_learning_rate()
        self.trainer.zero_grad()
        losses = []
        for first in range(0, len(positions), self.microbatch):
            part = slice(first, first + self.microbatch)
            image, layout = to_network(
                {name: value[part] for name, value in batch.items()},
                self.world.device,
                self.dataset.num_classes,
                self.model.dtype,
                dropped=dropped[part],
                look_up=self.look_up,
            )
            draws = Draws(
                torch.from_numpy(t[part]).to(image.device, non_blocking=True),
                normals(noise_seeds[part], image.shape[1:], image.device),
            )
            shares = torch.from_numpy(weights[part] / len(positions)).to(image.device, non_blocking=True)
            last = first + self.microbatch >= len(positions)
            losses.append(self._backward(Batch(image, layout), draws, shares, synchronize=last))
        result = self.trainer.step()
        self.step += 1
        self.samples_seen += self.global_batch
        self._after_step(result, t, torch.cat(losses))

    def _backward(self, batch: Batch, draws: Draws, shares: torch.Tensor, *, synchronize: bool) -> torch.Tensor:
        """Adds the gradient of one microbatch, whose samples have these shares [n] in the step's loss; ranks exchange
        gradients only where `synchronize`. Losses [n]."""
        postpone = self.distributed is not None and not synchronize
        with self.distributed.no_sync() if postpone else contextlib.nullcontext():
            terms = self.objective.losses(self.network, batch, draws)
            self.trainer.scale((terms["loss"] * shares).sum()).backward()
        self.averages.add(draws.timesteps, {name: term.detach() for name, term in terms.items()})
        return terms["loss"].detach()

    def _after_step(self, result: StepResult, t: np.ndarray, losses: torch.Tensor) -> None:
        if self.schedule_sampler.needs_losses and result.applied:
            gathered = self.world.gather((t, losses.cpu().numpy()))
            self.schedule_sampler.update(*(np.concatenate(parts) for parts in zip(*gathered, strict=True)))
        if result.applied:
            self.bad_in_a_row = 0
            self.averages.add_scalar("grad_norm", result.grad_norm)
            for rate, ema in self.emas.items():
                update_ema(ema, self.parameters, float(rate))
            return
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            good = "there is none" if self.saved_step is None else store.model_name(self.saved_step)
            raise TrainingDiverged(
                f"{self.bad_in_a_row} steps in a row had a loss or gradient that is not finite (at step {self.step}). "
                f"Last good checkpoint in {self.logdir}: {good}. Try a lower --lr, --max_grad_norm 1, or bf16."
            )

    def _set_learning_rate(self) -> None:
        rate = self.config.lr
        if self.config.warmup_steps:
            rate *= min(1.0, (self.step + 1) / self.config.warmup_steps)
        if self.config.lr_anneal_steps:
            rate *= 1.0 - self.step / self.config.lr_anneal_steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # -- what is seen of it -------------------------------------------------------------------------------------------

    def _progress_bar(self) -> tqdm:
        total = self.last_step or None
        return progress_bar(
            total=total, initial=self.step, desc="training", unit="step", disable=not self.world.is_main
        )

    def _log_row(self, bar: tqdm, skipped_files: int) -> None:
        """Figures since the last row, the means over all ranks. A collective."""
        means = self.averages.read(self.world.sum_)
        now = time.monotonic()
        rate = (self.step - self._clock_step) * self.global_batch / (now - self._clock)
        self._clock, self._clock_step = now, self.step
        row: dict[str, Any] = {"step": self.step, "samples": self.samples_seen, **means}
        row["param_norm"] = float(global_norm([p.detach() for p in self.parameters]))
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = round(rate, 3)
        row["bad_steps"] = self.bad_steps
        if self.trainer.scaled:
            row["log2_loss_scale"] = self.trainer.log_loss_scale
        if self.dataset.skip_bad:
            row["skipped_files"] = skipped_files
        if self.world.device.type == "cuda":
            row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.logger.row(row)
        bar.set_postfix_str(f"loss {means.get('loss', float('nan')):.4f}, {rate:.1f} images/s", refresh=False)

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Saves and previews do not count in the images per second."""
        since = time.monotonic()
        yield
        self._clock += time.monotonic() - since

    def _named(self, rate: str) -> dict[str, torch.Tensor]:
        return dict(zip((name for name, _ in self.model.named_parameters()), self.emas[rate], strict=True))

    def _preview(self) -> None:
        """A page in the log directory, by rank 0. A collective."""

        def draw() -> None:
            rate, s = self.config.ema_rates()[0], PREVIEW_SCALE if self.config.drop_rate > 0 else 1.0
            page = preview_page(
                self.model,
                self._named(rate),
                self.preview_diffusion,
                self.validation_set or self.dataset,
                self.world.device,
                s=s,
                title=f"step {self.step}, EMA {rate}, s = {s:g}",
            )
            save_png(page, os.path.join(self.logdir, f"preview_{self.step:06d}.png"))
            self.logger.image("preview", page, self.step)

        try:
            self.world.on_main(draw)
        except (RuntimeError, OSError, ValueError) as error:  # a page is not worth a run
            self.logger.log(f"warning: no preview of step {self.step}: {error}")

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, measure_first: bool = True) -> None:
        """Writes this step's checkpoint set, model.pt and, where it is better, ema_{rate}_best.pt. A collective.

        :param measure_first: False: the validation loss comes after the writing, as who sent a signal may not wait.
        :raises CheckpointError: nothing that was there before is harmed.
        """
        val_losses = self._validation_losses() if measure_first else {}
        sharded = hasattr(self.optimizer, "consolidate_state_dict")
        if sharded:
            collect_sharded_state(self.optimizer, self.world)
        self.world.on_main(lambda: self._write(val_losses))
        if sharded:
            self.optimizer._all_state_dicts = []  # it has served
        self.saved_step = self.step
        if not measure_first and (val_losses := self._validation_losses()):
            self.world.on_main(lambda: store.add_losses(self.logdir, self.step, list(self.emas), val_losses))

    def _validation_losses(self) -> dict[str, float]:
        """By EMA rate; empty where there is nothing to measure on, or it failed. A collective."""
        if self.validation is None:
            return {}
        try:
            losses = {rate: self.validation.loss(self.model, self._named(rate)) for rate in self.emas}
        except ValidationFailed as error:
            self.logger.log(f"warning: no validation loss of step {self.step}: {error}")
            return {}
        self.logger.row({"step": self.step} | {f"val_loss_{rate}": loss for rate, loss in losses.items()})
        return losses

    def _write(self, val_losses: dict[str, float]) -> None:
        step, folder = self.step, self.logdir
        trainer = {
            "precision": self.trainer.state_dict(),
            "schedule_sampler": {n: torch.from_numpy(v) for n, v in self.schedule_sampler.state_dict().items()},
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
        }
        # Functions: one file's content at a time is copied from the device.
        contents = {store.model_name(step): lambda: to_cpu(self.model.state_dict())}
        for rate in self.emas:
            contents[store.ema_name(rate, step)] = lambda rate=rate: to_cpu(self._named(rate))
        contents[store.optimizer_name(step)] = lambda: {
            **to_cpu(self.optimizer.state_dict()), "trainer": trainer,
        }  # fmt: skip
        manifest = {"samples_seen": self.samples_seen, "world_size": self.world.size, "validation_loss": val_losses}
        manifest["measure"] = measure = self.validation.measure if self.validation is not None else None
        store.write_json(os.path.join(folder, store.CONFIG_NAME), self.record)
        store.save_set(folder, step, contents, manifest)
        best = store.publish_set(folder, step, list(self.emas), val_losses, measure)
        store.prune(folder, self.config.keep_checkpoints, step)
        figures = ", ".join(f"EMA {rate}: {loss:.5f}" for rate, loss in val_losses.items())
        self.logger.log(
            f"saved step {step} in {folder}" + (f"; validation loss of {figures}" if figures else "")
            + (f"; new best: {', '.join(best)}" if best and val_losses else "")
        )  # fmt: skip
