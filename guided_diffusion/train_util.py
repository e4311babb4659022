"""The training loop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .dist_util import World
from .fp16_util import StepResult, as_found_inf, global_norm
from .image_datasets import LayoutDataset, TrainingBatches, balance_weights, training_batches
from .layouts.encode import to_network
from .logger import Averages, Logger, progress_bar
from .nn import update_ema
from .objectives.objective import Batch, Draws, Objective
from .runs.log_directory import LogDirectory
from .runs.previews import Previews
from .runs.rescue import Rescue
from .runs.resume import begin_training, check_base
from .runs.saving import Saving
from .runs.state import TrainingState
from .runs.stop_signals import LoaderDeaths, StopRequests, StopSignals
from .runs.validation import open_validation
from .seeding import normals, stable_seed, uniforms
from .settings import DiffusionConfig, TrainConfig, resolve_precision
from .unet import UNetModel
from .weights import store


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite; the message names the last good checkpoint."""


def prepare_training(
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
) -> TrainLoop:
    """The training that the settings describe, with all read that it goes on from; no file is made. A collective.

    :param model: with new weights, on the CPU; for the rest see `TrainLoop`.
    :raises ConfigError, CheckpointError, DataError: see `begin_training`; a validation image cannot be read.
    """
    directory = LogDirectory(logdir, keep=config.keep_checkpoints)
    state = begin_training(
        model=model,
        precision=resolve_precision(config.precision, record["model"]["use_fp16"]),
        num_timesteps=objective.num_timesteps,
        sizes=[split.shape for split in (dataset, validation) if split is not None],
        class_names=dataset.spec.class_names,
        config=config,
        directory=directory,
        world=world,
        log=logger.log,
    )
    drawn, guided = validation or dataset, config.drop_rate > 0
    return TrainLoop(
        state=state,
        objective=objective,
        dataset=dataset,
        validation=validation,
        previews=Previews(diffusion_config, drawn, logdir, guided=guided, world=world, logger=logger),
        directory=directory,
        config=config,
        num_workers=num_workers,
        world=world,
        logger=logger,
        record=record,
    )


class TrainLoop:
    """Takes a training from `state` to `config.max_steps`, the end of the annealing, or a signal.

    A step's every random choice follows from the run's seed and the positions of its samples, so a run that was
    stopped, or killed, and started again ends in the same weights as an undisturbed one.

    :param state: where it starts, all read (`begin_training`).
    :param objective: what a step minimises, and the validation measures.
    :param validation: the split whose loss decides the best EMA; None: the latest EMA counts as best.
    :param directory: where checkpoints go. :param record: the settings to save as config.json beside them.
    """

    def __init__(
        self,
        *,
        state: TrainingState,
        objective: Objective,
        dataset: LayoutDataset,
        validation: LayoutDataset | None,
        previews: Previews,
        directory: LogDirectory,
        config: TrainConfig,
        num_workers: int,
        world: World,
        logger: Logger,
        record: dict[str, Any],
    ):
        self.state, self.objective, self.previews, self.config = state, objective, previews, config
        self.dataset, self.num_workers, self.world, self.logger = dataset, num_workers, world, logger
        self.model, self.trainer = state.model, state.trainer
        self.microbatch = config.microbatch if config.microbatch > 0 else config.batch_size
        self.global_batch = config.batch_size * world.size
        self.look_up = config.looks_layouts_up(world.device.type)
        # A look at the count of bad steps makes the host wait for a GPU; on a CPU it is free.
        self.look_interval = 1 if world.device.type == "cpu" else min(config.log_interval, config.max_bad_steps)
        logger.log(
            f"{len(dataset)} training images of {dataset.shape[0]}x{dataset.shape[1]}, {dataset.num_classes} classes; "
            f"{sum(p.numel() for p in state.parameters) / 1e6:.1f} M parameters"
        )
        self.distributed, self.network = self._wrap(record["model"]["use_checkpoint"])
        self.validation = open_validation(
            validation, objective, world, images=config.val_images, batch_size=self.microbatch, log=logger.log
        )
        self.folder = directory.folder
        self.saving = Saving(state, directory, self.validation, world=world, logger=logger, record=record)
        self.rescue = Rescue(state, self.saving, world=world, logger=logger)
        self.averages = Averages(world.device, objective.num_timesteps)

    def _wrap(self, recomputes: bool) -> tuple[DistributedDataParallel | None, torch.nn.Module]:
        """The network as the ranks share its gradients (None: there is one), and as a step calls it. A collective."""
        distributed = None
        if self.world.size > 1:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            distributed = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        network = distributed or self.model
        if self.config.compile:
            if distributed is not None and recomputes:
                torch._dynamo.config.optimize_ddp = False  # DDP's division of the graph refuses what is recomputed
            network = torch.compile(network)
        return distributed, network

    # -- the loop -----------------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        """The step at which training ends; 0: it does not."""
        ends = [end for end in (self.config.max_steps, self.config.lr_anneal_steps) if end > 0]
        return min(ends, default=0)

    @property
    def finished(self) -> bool:
        """Whether that step is reached."""
        return 0 < self.last_step <= self.state.step

    def run(self) -> bool:
        """Trains to the end, or until a signal. Returns False where a signal came before the last step.

        Whatever else ends it, a checkpoint of this moment is saved first, where that can be done (`Rescue`).

        :raises TrainingDiverged: with nothing saved of the steps that were not finite.
        :raises CheckpointError, DataError, RemoteError: a file could not be written or read, here or on another rank.
        """
        self.saving.open()
        if self.finished:
            return self._nothing_to_do()
        with (
            self._open_batches() as batches, LoaderDeaths() as deaths, StopSignals() as signals,
            self._progress_bar() as bar, self.rescue.at_any_end(but=TrainingDiverged),
        ):  # fmt: skip
            if stop := self._train(batches, deaths, StopRequests(signals, self.world), bar):
                return self._stopped(stop)
        self.logger.log(f"done: {self.state.step} steps; the weights are in {self.folder}")
        return True

    def _train(self, batches: TrainingBatches, deaths: LoaderDeaths, requests: StopRequests, bar: tqdm) -> int:
        """The steps. Returns the number of the signal that ended them before the last one; 0: none has."""
        self.model.train()
        self._clock, self._clock_step = time.monotonic(), self.state.step
        while not self.finished:
            self.train_step(self.world.together(lambda: deaths.next_of(batches)))
            bar.update()
            if self._due(self.look_interval):
                self._check_bad_steps()
            if self._due(self.config.log_interval):
                self._log_row(bar, len(batches.skipped))
            if self._due(self.config.sample_interval):
                with self._clock_stopped():
                    self.previews.draw(self.state)
            stop, save = requests.after_step(), self._due(self.config.save_interval)
            if save or stop:
                self._save(measure_first=save)
            if stop and not self.finished:
                return stop
        if self.state.saved_step != self.state.step:
            self._save()
        return 0

    def _due(self, interval: int) -> bool:
        """Whether this step is the one in `interval`; 0: none is."""
        return interval > 0 and self.state.step % interval == 0

    def _nothing_to_do(self) -> bool:
        self.world.on_main(lambda: check_base(self.state.base, self.config))
        self.logger.log(f"nothing to do: step {self.state.step} of {self.last_step} is reached")
        if self.state.saved_step is None:  # started from elsewhere: what comes next looks here
            self.saving.save()
        return True

    def _save(self, measure_first: bool = True) -> None:
        """A collective. :raises TrainingDiverged: there is nothing good to save."""
        self._check_bad_steps()
        if not self.state.finite():
            self._diverged(f"the weights of step {self.state.step} are not finite")
        with self._clock_stopped():
            self.saving.save(measure_first=measure_first)

    def _stopped(self, number: int) -> bool:
        name = signal.Signals(number).name
        self.logger.log(f"stopped by {name} at step {self.state.step}; all is saved")
        return not self.last_step

    def _open_batches(self) -> TrainingBatches:
        """This rank's batches, from the samples seen so far on. A collective."""
        weights: np.ndarray | bool = False
        if self.config.class_balance:
            weights = self.world.on_main(lambda: balance_weights(self.dataset, self.num_workers))
        return training_batches(
            self.dataset,
            batch_size=self.config.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            start=self.state.samples_seen,
            num_workers=self.num_workers,
            pin_memory=self.world.device.type == "cuda",
            class_balance=weights,
            log=self.logger.log,
        )

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step on this rank's batch. A collective."""
        positions, seed = batch["position"].tolist(), self.config.seed
        t, weights = self.state.schedule_sampler.sample(uniforms(seed, "timestep", positions))
        dropped = self._upload(uniforms(seed, "drop", positions) < self.config.drop_rate)
        timesteps, shares = self._upload(t), self._upload(weights / len(positions))
        noise_seeds = [stable_seed(seed, "noise", position) for position in positions]
        # Dropout alone draws from the global generator.
        torch.manual_seed(stable_seed(seed, "dropout", self.state.step, self.world.rank))
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
            draws = Draws(timesteps[part], normals(noise_seeds[part], image.shape[1:], image.device))
            last = first + self.microbatch >= len(positions)
            losses.append(self._backward(Batch(image, layout), draws, shares[part], synchronize=last))
        with self.rescue.changing_weights():
            result = self.trainer.step()
            self.state.step += 1
            self.state.samples_seen += self.global_batch
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

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        """On the device, without waiting for it: a copy from memory that is not pinned may wait."""
        tensor = torch.from_numpy(values)
        if self.world.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.world.device, non_blocking=True)

    def _after_step(self, result: StepResult, t: np.ndarray, losses: torch.Tensor) -> None:
        sampler = self.state.schedule_sampler
        if sampler.needs_losses and bool(result.applied):  # they decide the next timesteps, so this waits for them
            gathered = self.world.gather((t, losses.cpu().numpy()))
            sampler.update(*(np.concatenate(parts) for parts in zip(*gathered, strict=True)))
        self.averages.add_scalar("grad_norm", result.grad_norm)
        for rate, ema in self.state.emas.items():
            update_ema(ema, self.state.parameters, float(rate), as_found_inf(result.applied))

    def _check_bad_steps(self) -> None:
        """:raises TrainingDiverged: too many steps in a row were not finite, at most `look_interval` - 1 steps ago."""
        _, _, in_a_row = self.trainer.bad_steps.read()
        if in_a_row >= self.config.max_bad_steps:
            self._diverged(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite (at step {self.state.step})"
            )

    def _diverged(self, what: str) -> NoReturn:
        """A collective. :raises TrainingDiverged: always."""
        good = self.world.on_main(self.saving.directory.note_divergence)
        raise TrainingDiverged(
            f"{what}. Last good checkpoint in {self.folder}: "
            f"{'there is none' if good is None else f'{store.model_name(good)}, from which the next start goes on'}. "
            "Try a lower --lr, --max_grad_norm 1, or bf16."
        )

    def _set_learning_rate(self) -> None:
        rate = self.config.lr
        if self.config.warmup_steps:
            rate *= min(1.0, (self.state.step + 1) / self.config.warmup_steps)
        if self.config.lr_anneal_steps:
            rate *= 1.0 - self.state.step / self.config.lr_anneal_steps
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate

    # -- what is seen of it -------------------------------------------------------------------------------------------

    def _progress_bar(self) -> tqdm:
        options = dict(total=self.last_step or None, initial=self.state.step, disable=not self.world.is_main)
        return progress_bar(desc="training", unit="step", **options)

    def _log_row(self, bar: tqdm, skipped_files: int) -> None:
        """Figures since the last row, the means over all ranks. A collective."""
        means = self.averages.read(self.world.sum_)
        now = time.monotonic()
        rate = (self.state.step - self._clock_step) * self.global_batch / (now - self._clock)
        self._clock, self._clock_step = now, self.state.step
        row: dict[str, Any] = {"step": self.state.step, "samples": self.state.samples_seen, **means}
        row["param_norm"] = float(global_norm([p.detach() for p in self.state.parameters]))
        row["lr"] = self.state.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = round(rate, 3)
        row["bad_steps"] = self.trainer.bad_steps.read()[0]
        if self.trainer.scaled:
            row["log2_loss_scale"] = self.trainer.log_loss_scale
        if self.dataset.skip_bad:
            row["skipped_files"] = skipped_files
        if self.world.device.type == "cuda":
            row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.world.on_main(lambda: self.logger.row(row))
        bar.set_postfix_str(f"loss {means.get('loss', float('nan')):.4f}, {rate:.1f} images/s", refresh=False)

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Saves and previews do not count in the images per second."""
        since = time.monotonic()
        yield
        self._clock += time.monotonic() - since
