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
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoints
from .conditioning import drop_layouts
from .dist_util import World
from .fp16_util import PRECISIONS, MixedPrecisionTrainer, global_norm
from .image_datasets import LayoutDataset, balance_weights, training_batches
from .logger import Logger
from .nn import update_ema
from .pictures import save_png
from .resample import create_schedule_sampler
from .script_util import DiffusionConfig, TrainConfig, create_gaussian_diffusion, resolve_precision
from .seeding import normals, stable_seed, uniforms
from .unet import UNetModel
from .validation import Validation, preview_page, to_network

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what SLURM sends before a time limit
PREVIEW_STEPS = 20


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite; the message names the last good checkpoint."""


class TrainLoop:
    """Trains `model` on `dataset` until `config.max_steps`, the end of the annealing, or a signal.

    A step's every random choice follows from the run's seed and the positions of its samples, so a run that was
    stopped, or killed, and started again ends in the same weights as an undisturbed one.

    :param validation: the split whose denoising loss decides the best EMA; None: the latest EMA counts as best.
    :param record: the settings to save as config.json beside the checkpoints.
    """

    def __init__(
        self,
        *,
        model: UNetModel,
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
        self.diffusion = create_gaussian_diffusion(dataclasses.replace(diffusion_config, timestep_respacing=""))
        self.preview_diffusion = create_gaussian_diffusion(
            dataclasses.replace(diffusion_config, timestep_respacing=""),
            min(PREVIEW_STEPS, diffusion_config.diffusion_steps),
        )
        self.schedule_sampler = create_schedule_sampler(config.schedule_sampler, self.diffusion.num_timesteps)
        self.microbatch = config.microbatch if config.microbatch > 0 else config.batch_size
        self.global_batch = config.batch_size * world.size
        self.step = 0  # optimizer steps taken or skipped; checkpoints carry this number
        self.samples_seen = 0
        self.bad_steps = self.bad_in_a_row = 0
        self.saved_step: int | None = None
        self.stop_signal: str | None = None

        precision = resolve_precision(config.precision, record["model"]["use_fp16"])
        if precision == "fp16" and world.device.type == "cpu":
            logger.log("note: float16 is slow on a CPU; --precision bf16 or fp32 is better there")
        model.dtype = PRECISIONS[precision]
        self.model = model.to(world.device, memory_format=torch.channels_last)
        self.emas: dict[str, list[torch.Tensor]] = {}
        state = self._load()
        self.parameters = list(self.model.parameters())
        self.optimizer = self._make_optimizer()
        self.trainer = MixedPrecisionTrainer(
            self.parameters,
            self.optimizer,
            precision=precision,
            scale_growth=config.fp16_scale_growth,
            max_grad_norm=config.max_grad_norm,
        )
        self._restore(state)
        self.network: torch.nn.Module = self.model
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        if config.compile:
            self.network = torch.compile(self.network)
        self.validation = None
        self.validation_set = validation
        if validation is None:
            logger.log("no validation split: the latest EMA counts as the best")
        elif config.val_images > 0:
            self.validation = Validation(
                validation, self.diffusion, world, images=config.val_images, batch_size=self.microbatch
            )
        self.averages = Averages(world.device, self.diffusion.num_timesteps)

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = dict(lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)
        if self.config.shard_optimizer and self.world.size > 1:
            return ZeroRedundancyOptimizer(self.parameters, torch.optim.AdamW, **options)
        return torch.optim.AdamW(self.parameters, **options)

    def _load(self) -> dict[str, Any]:
        """Loads weights and EMAs: of the newest complete checkpoint in the log directory, else of resume_checkpoint,
        else those the model has. Returns what the optimizer is to be given. A collective."""
        found = self.world.on_main(lambda: self._find_start())
        state = self.world.broadcast_tree(self._read_start(found) if self.world.is_main else None)
        if state["model"] is not None:
            checkpoints.load_state_into(self.model, state["model"], found["model"])
        elif self.world.size > 1:  # the seed gives every rank the same weights; make sure of it
            self.model.load_state_dict(self.world.broadcast_tree(dict(self.model.state_dict())))
        for rate in self.config.ema_rates():
            weights = state["emas"].get(rate)
            names = [name for name, _ in self.model.named_parameters()]
            source = self.model.state_dict() if weights is None else weights
            self.emas[rate] = [source[name].detach().to(self.world.device).clone() for name in names]
        self.step, self.samples_seen = found["step"], found["samples_seen"]
        if found["step"]:
            self.saved_step = found["step"] if found["own"] else None
        return state

    def _find_start(self) -> dict[str, Any]:
        """Which files to start from; says so in the log. On rank 0."""
        os.makedirs(self.logdir, exist_ok=True)
        checkpoints.remove_leftovers(self.logdir)
        log, resume = self.logger.log, self.config.resume_checkpoint
        manifest = checkpoints.newest_complete(self.logdir, log)
        if manifest is not None:
            step = manifest["step"]
            log(f"continuing this log directory's run at step {step}")
            if resume and checkpoints.step_of(resume) not in (None, step):
                log(f"note: {resume} is not used; give another --logdir to start from it")
            if manifest["world_size"] != self.world.size:
                log(f"note: saved with {manifest['world_size']} ranks; the data goes on from the samples seen then")
            folder, own = self.logdir, True
            samples_seen = manifest["samples_seen"]
        elif not resume:
            log("starting from new weights")
            return {"model": None, "emas": {}, "optimizer": None, "step": 0, "samples_seen": 0, "own": False}
        else:
            step, folder, own = checkpoints.step_of(resume), os.path.dirname(resume), False
            if step is None:
                log(f"starting a new run from the weights in {resume}")
                return {"model": resume, "emas": {}, "optimizer": None, "step": 0, "samples_seen": 0, "own": False}
            log(f"continuing at step {step} from {resume}")
            beside = checkpoints.read_manifest(folder, step)
            samples_seen = beside.get("samples_seen", step * self.global_batch)
        emas = {rate: os.path.join(folder, checkpoints.ema_name(rate, step)) for rate in self.config.ema_rates()}
        optimizer = os.path.join(folder, checkpoints.optimizer_name(step))
        for rate in [rate for rate, path in emas.items() if not os.path.exists(path)]:
            log(f"note: there is no {emas.pop(rate)}; the EMA of rate {rate} starts from the weights")
        if not os.path.exists(optimizer):
            log(f"note: there is no {optimizer}; the optimizer starts fresh")
            optimizer = None
        model = os.path.join(folder, checkpoints.model_name(step)) if own else resume
        return {
            "model": model, "emas": emas, "optimizer": optimizer,
            "step": step, "samples_seen": samples_seen, "own": own,
        }  # fmt: skip

    def _read_start(self, found: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": checkpoints.load_weights(found["model"]) if found["model"] else None,
            "emas": {rate: checkpoints.load_weights(path) for rate, path in found["emas"].items()},
            "optimizer": checkpoints.load(found["optimizer"]) if found["optimizer"] else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["optimizer"] is None:
            return
        optimizer = dict(state["optimizer"])
        trainer = optimizer.pop("trainer", None)  # absent in checkpoints of other programs
        self.optimizer.load_state_dict(optimizer)
        if trainer is not None:
            self.trainer.load_state_dict(trainer["precision"])
            history = {name: value.numpy() for name, value in trainer["schedule_sampler"].items()}
            if history:
                self.schedule_sampler.load_state_dict(history)
            self.bad_steps = trainer["bad_steps"]

    # -- the loop -----------------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        """The step at which training ends; 0: it does not."""
        ends = [end for end in (self.config.max_steps, self.config.lr_anneal_steps) if end > 0]
        return min(ends, default=0)

    def run(self) -> None:
        """Trains to the end. :raises TrainingDiverged, CheckpointError, DataError: with everything saved before."""
        if self.last_step and self.step >= self.last_step:
            self.logger.log(f"nothing to do: step {self.step} of {self.last_step} is reached")
            return
        weights = balance_weights(self.dataset, self.num_workers) if self.config.class_balance else False
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
        with batches, self._catch_signals(), self._progress_bar() as bar:
            self.model.train()
            self._clock = time.monotonic()
            while not (self.last_step and self.step >= self.last_step):
                self.train_step(next(batches))
                bar.update()
                if self.step % self.config.log_interval == 0:
                    self._log_row(bar, len(batches.skipped))
                if self.config.sample_interval and self.step % self.config.sample_interval == 0:
                    self._preview()
                stop = self.world.max(STOP_SIGNALS.index(self.stop_signal) + 1 if self.stop_signal else 0)
                if self.step % self.config.save_interval == 0 or stop:
                    self.save()
                if stop:
                    self.logger.log(f"stopped by {STOP_SIGNALS[stop - 1].name} at step {self.step}; all is saved")
                    return
            if self.saved_step != self.step:
                self.save()
        self.logger.log(f"done: {self.step} steps; the weights are in {self.logdir}")

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
            x_start, y = to_network(
                {name: value[part] for name, value in batch.items()},
                self.world.device,
                self.dataset.num_classes,
                self.model.dtype,
            )
            drop_layouts(y, dropped[part].to(y.device))
            last = first + self.microbatch >= len(positions)
            losses.append(
                self._backward(
                    x_start,
                    y,
                    torch.from_numpy(t[part]).to(y.device),
                    torch.from_numpy(weights[part]).to(y.device) / len(positions),
                    normals(noise_seeds[part], x_start.shape[1:], y.device),
                    synchronize=last,
                )
            )
        result = self.trainer.step()
        self.step += 1
        self.samples_seen += self.global_batch
        self._after_step(result, t, torch.cat(losses))

    def _backward(self, x_start, y, t, weights, noise, *, synchronize: bool) -> torch.Tensor:
        """Adds the gradient of one microbatch; ranks exchange gradients only where `synchronize`. Losses [n]."""
        postpone = isinstance(self.network, DistributedDataParallel) and not synchronize
        with self.network.no_sync() if postpone else contextlib.nullcontext():
            terms = self.diffusion.training_losses(self.network, x_start, t, {"y": y}, noise)
            self.trainer.scale((terms["loss"] * weights).sum()).backward()
        self.averages.add(t, {name: term.detach() for name, term in terms.items()})
        return terms["loss"].detach()

    def _after_step(self, result: Any, t: np.ndarray, losses: torch.Tensor) -> None:
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
            good = "there is none" if self.saved_step is None else checkpoints.model_name(self.saved_step)
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
        return tqdm(
            total=self.last_step or None,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.world.is_main,
            dynamic_ncols=True,
        )

    def _log_row(self, bar: tqdm, skipped_files: int) -> None:
        """Figures since the last row, the means over all ranks. A collective."""
        means = self.averages.read(self.world)
        now = time.monotonic()
        rate = self.config.log_interval * self.global_batch / (now - self._clock)
        self._clock = now
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

    def _named(self, rate: str) -> dict[str, torch.Tensor]:
        return dict(zip((name for name, _ in self.model.named_parameters()), self.emas[rate], strict=True))

    def _preview(self) -> None:
        """A page in the log directory, by rank 0. A collective."""

        def draw() -> None:
            rate = self.config.ema_rates()[0]
            page = preview_page(
                self.model,
                self._named(rate),
                self.preview_diffusion,
                self.validation_set or self.dataset,
                self.world.device,
                f"step {self.step}, EMA {rate}",
            )
            save_png(page, os.path.join(self.logdir, f"preview_{self.step:06d}.png"))
            self.logger.image("preview", page, self.step)

        self.world.on_main(draw)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes this step's checkpoint set, model.pt and, where it is better, ema_{rate}_best.pt. A collective.

        :raises CheckpointError: nothing that was there before is harmed.
        """
        val_losses = {}
        if self.validation is not None:
            val_losses = {rate: self.validation.loss(self.model, self._named(rate)) for rate in self.emas}
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict(to=0)
        self.world.on_main(lambda: self._write(val_losses))
        self.saved_step = self.step

    def _write(self, val_losses: dict[str, float]) -> None:
        step, folder = self.step, self.logdir
        trainer = {
            "precision": self.trainer.state_dict(),
            "schedule_sampler": {n: torch.from_numpy(v) for n, v in self.schedule_sampler.state_dict().items()},
            "bad_steps": self.bad_steps,
        }
        contents: dict[str, Any] = {checkpoints.model_name(step): _to_cpu(self.model.state_dict())}
        contents |= {checkpoints.ema_name(rate, step): _to_cpu(self._named(rate)) for rate in self.emas}
        contents[checkpoints.optimizer_name(step)] = {**_to_cpu(self.optimizer.state_dict()), "trainer": trainer}
        manifest = {"samples_seen": self.samples_seen, "world_size": self.world.size, "validation_loss": val_losses}
        checkpoints.write_json(os.path.join(folder, checkpoints.CONFIG_NAME), self.record)
        checkpoints.save_set(folder, step, contents, manifest)
        checkpoints.publish(os.path.join(folder, checkpoints.model_name(step)), os.path.join(folder, "model.pt"))
        best = checkpoints.update_best(folder, step, list(self.emas), val_losses)
        checkpoints.prune(folder, self.config.keep_checkpoints)
        figures = ", ".join(f"EMA {rate}: {loss:.5f}" for rate, loss in val_losses.items())
        self.logger.log(
            f"saved step {step} in {folder}" + (f"; validation loss of {figures}" if figures else "")
            + (f"; new best: {', '.join(best)}" if best and val_losses else "")
        )  # fmt: skip

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """A first signal asks for a save and an end after this step; a second one, seconds later, ends at once.

        (`mpiexec` passes on a Ctrl-C that the terminal has already sent to every process: that is not a second one.)
        """
        first = 0.0

        def note(number: int, _: Any) -> None:
            nonlocal first
            if self.stop_signal is None:
                self.stop_signal, first = signal.Signals(number), time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - first > 3:
                raise KeyboardInterrupt

        old = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Averages:
    """Means of losses since the last reading, by quarter of the timesteps too, kept on the device until read."""

    def __init__(self, device: torch.device, num_timesteps: int):
        self.device, self.num_timesteps = device, num_timesteps
        self.sums: dict[str, torch.Tensor] = {}  # name -> [4 quarters, (sum, count)], or [1, ...] of a scalar

    def add(self, t: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Losses [n] by name, at timesteps t [n]. A loss that is not finite is left out."""
        quarter = 4 * t // self.num_timesteps
        for name, values in terms.items():
            finite = torch.isfinite(values)
            pairs = torch.stack([torch.where(finite, values, 0.0), finite.to(values.dtype)], dim=1)
            self._sums(name, 4).index_add_(0, quarter, pairs)

    def add_scalar(self, name: str, value: torch.Tensor) -> None:
        self._sums(name, 1).add_(torch.stack([value, torch.ones_like(value)])[None])

    def _sums(self, name: str, rows: int) -> torch.Tensor:
        return self.sums.setdefault(name, torch.zeros(rows, 2, device=self.device))

    def read(self, world: World) -> dict[str, float]:
        """The means over all ranks, as `loss`, `loss_q0` ... `loss_q3`; starts anew. One transfer. A collective."""
        if not self.sums:
            return {}
        sizes = [len(sums) for sums in self.sums.values()]
        flat = world.sum_(torch.cat(list(self.sums.values())).double().cpu())
        means: dict[str, float] = {}
        for name, rows in zip(self.sums, flat.split(sizes), strict=True):
            total = rows.sum(dim=0)
            if total[1] > 0:
                means[name] = float(total[0] / total[1])
            if len(rows) > 1:
                means |= {f"{name}_q{i}": float(row[0] / row[1]) for i, row in enumerate(rows) if row[1] > 0}
        self.sums.clear()
        return means


def _to_cpu(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu().contiguous()
    if isinstance(tree, dict):
        return {key: _to_cpu(value) for key, value in tree.items()}
    return [_to_cpu(value) for value in tree] if isinstance(tree, list) else tree
