"""A sampling run: which images are still to be made, by whom, and where they go."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.json_text import parse_json
from ..data.listing import some_names
from ..data.specs import DatasetSpec
from ..dist_util import World
from ..image_datasets import SAMPLING_RECORD, LayoutDataset, sampling_batches
from ..logger import progress_bar
from ..pipeline import Keeping, SDMPipeline, image_seed
from ..sampling.loop import Moment
from ..settings import ConfigError, SampleConfig, Sampling, binding_settings
from ..weights import store
from .pictures import colorize, contact_sheet, save_png
from .stop_signals import StopSignals
from .writer import PictureWriter

OVERVIEW_ROWS = 8
OVERVIEW_SAMPLES = 4


class _Stopped(Exception):
    """A signal asks the run to end."""


class SampleRun:
    """Samples the layouts of `dataset` into `config.results_path`.

    `images/NAME.png` is the photograph at the sampled size, `labels/NAME.png` the ids, `samples/NAME.png` the image
    (`samples_00/` ... with several per layout). A file is there whole or not at all; what is there is not made again.
    """

    def __init__(
        self,
        *,
        pipeline: SDMPipeline,
        dataset: LayoutDataset,
        config: SampleConfig,
        sampling: Sampling,
        record: dict[str, Any],
        num_workers: int,
        world: World,
        log: Callable[[str], None],
    ):
        self.pipeline, self.dataset, self.config, self.sampling = pipeline, dataset, config, sampling
        self.record, self.num_workers, self.world, self.log = record, num_workers, world, log
        self.folder = config.results_path
        self.layouts = min(config.num_samples, len(dataset))
        self.several = config.samples_per_layout > 1
        digits = max(2, len(str(config.samples_per_layout - 1)))
        self.sample_folders = [
            f"samples_{i:0{digits}d}" if self.several else "samples" for i in range(config.samples_per_layout)
        ]

    def run(self) -> bool:
        """Makes what is missing; a signal ends it in order, between two steps. Returns whether all is there. A
        collective.

        :raises ConfigError: the folder holds images made in another way. :raises DataError: a bad label map.
        :raises CheckpointError: the folder cannot be written.
        """
        todo, inputs = self.world.on_main(self._prepare)
        count = sum(len(indices) for indices in todo.values())
        self.log(
            f"{count} images to make of {self.layouts} layouts"
            + (f" ({self.layouts * len(self.sample_folders) - count} are there)" if count else ": all are there")
        )
        self.pipeline.sharing_memory = self.world.sharing_memory()
        self.keeping = self._decide_keeping(count)
        batches = self._batches(todo)[self.world.rank :: self.world.size]
        steps = self.pipeline.diffusion(self.sampling.timestep_respacing, self.sampling.num_steps).num_timesteps
        since = time.perf_counter()
        total = len(batches) * steps
        bar = progress_bar(total=total, desc="denoising", unit="step", disable=not self.world.is_main)
        done = 0
        with bar, StopSignals() as signals, contextlib.suppress(_Stopped), PictureWriter() as self.writer:

            def on_step(_: Moment) -> None:
                bar.update()
                if signals.number:
                    raise _Stopped

            self._restore_inputs(inputs[self.world.rank :: self.world.size])
            for pairs, batch in zip(batches, self._read(batches), strict=True):
                self._make(pairs, batch, on_step)
                done += len(pairs)
                bar.set_postfix_str(f"{done} of {sum(map(len, batches))} images of this rank", refresh=False)
        stopped, done = self.world.max(signals.number), sum(self.world.gather(done))
        if done:
            seconds = time.perf_counter() - since
            self.world.on_main(lambda: self._note_time(done, seconds))
        if stopped and done < count:
            name = signal.Signals(stopped).name
            self.log(f"stopped by {name} after {done} of {count} images; the same command goes on with the others")
            return False
        self.world.on_main(self._finish)
        self.log(f"results: {os.path.abspath(self.folder)} (overview.png shows some)")
        return True

    def missing(self) -> tuple[int, int]:
        """(images that `run` would make, images in all). Checks what `run` would check, and writes nothing.

        :raises ConfigError, DataError, CheckpointError: as `run` does.
        """
        store.lock(self.folder, "results_path", look=True)
        samples = [(layout, folder) for layout in range(self.layouts) for folder in self.sample_folders]
        afresh, changed = self._check_record(), set(self._check_layouts())
        missing = [
            layout
            for layout, folder in samples
            if afresh or layout in changed or not os.path.exists(self._path(folder, self.dataset.names[layout]))
        ]
        return len(missing), len(samples)

    # -- before -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> tuple[dict[int, list[int]], list[int]]:
        """Checks the folder and the layouts. Returns the samples to make, by layout, and the layouts whose samples are
        there but whose label map or photograph is not. On rank 0."""
        path = self.folder
        try:
            os.makedirs(path, exist_ok=True)
            self._lock = store.lock(path, "results_path")  # held until the process ends
            for name in ("images", "labels", *self.sample_folders):
                path = os.path.join(self.folder, name)
                if name != "images" or self.dataset.has_images:
                    os.makedirs(path, exist_ok=True)
                store.remove_leftovers(path)
        except OSError as error:
            raise store.CheckpointError(f"cannot write {path}: {error}; choose another --results_path") from error
        afresh = self._check_record()
        changed = self._check_layouts()
        if afresh:  # all of them: what remains must not pass for having been made with these settings
            self._remove_samples()
        elif changed:
            names = [self.dataset.names[layout] for layout in changed]
            self.log(f"sampled again, because their layouts have changed: {some_names(names)} ({len(names)} in all)")
            self._remove_samples({f"{name}.png" for name in names})
        if self.config.overwrite:  # until it is done: a start after a stop goes on
            self.record["run"]["overwriting"] = True
        todo = {}
        for layout, name in enumerate(self.dataset.names[: self.layouts]):
            missing = [
                i for i, folder in enumerate(self.sample_folders) if not os.path.exists(self._path(folder, name))
            ]
            if missing:
                todo[layout] = missing
        store.write_json(os.path.join(self.folder, SAMPLING_RECORD), self.record)
        kinds = ["labels", *(["images"] if self.dataset.has_images else [])]
        inputs = [
            layout
            for layout, name in enumerate(self.dataset.names[: self.layouts])
            if layout not in todo and not all(os.path.exists(self._path(kind, name)) for kind in kinds)
        ]
        return todo, inputs

    def _check_record(self) -> bool:
        """Compares with what made the samples that are there. Returns whether they are to be made afresh."""
        path, overwrite = os.path.join(self.folder, SAMPLING_RECORD), self.config.overwrite
        if not os.path.exists(path):
            return overwrite
        try:
            with open(path, "rb") as file:
                record = parse_json(file.read())
            before, run = dict(record["images"]), dict(record["run"])
        except (ValueError, KeyError, TypeError) as error:
            if overwrite:
                return True
            raise ConfigError(
                f"{path} is damaged ({type(error).__name__}: {error}); --overwrite True makes the images again"
            ) from error
        now = json.loads(json.dumps(self.record["images"]))
        differences = [
            f"{key}: {before[key]!r} there, {now[key]!r} now"
            for key in now
            if key in before and _comparable(key, before[key]) != _comparable(key, now[key])
        ]
        if overwrite and (differences or "overwriting" not in run):
            return True
        if differences:
            raise ConfigError(
                f"{self.folder} holds images made with other settings ({'; '.join(differences)}); choose another "
                "--results_path, or --overwrite True to make them again"
            )
        self.record["run"] |= {"made": run["made"]} if "made" in run else {}
        return False

    def _check_layouts(self) -> list[int]:
        """Reads every layout and photograph: what is wrong is found before the first image is made. Returns the layouts
        that are not the ones in `labels/`, from which samples may have been made."""

        def has_changed(layout: int) -> bool:
            ids = self.dataset[layout]["label"][0].numpy()
            path = self._path("labels", self.dataset.names[layout])
            try:
                with Image.open(path) as stored:
                    return not np.array_equal(np.asarray(stored), ids)
            except FileNotFoundError:
                return False
            except OSError:  # no picture any more: what it was is not known
                return True

        with ThreadPoolExecutor() as pool:
            results = pool.map(has_changed, range(self.layouts))
            results = progress_bar(iterable=results, total=self.layouts, desc="checking layouts", leave=False)
            return [layout for layout, changed in enumerate(results) if changed]

    def _remove_samples(self, names: set[str] | None = None) -> None:
        """Removes the samples with these file names, else all, from every folder of samples that a run makes."""
        for folder in os.listdir(self.folder):
            if re.fullmatch(r"samples(_\d+)?", folder):
                for name in os.listdir(os.path.join(self.folder, folder)):
                    if name.endswith(".png") if names is None else name in names:
                        os.remove(os.path.join(self.folder, folder, name))

    def _batches(self, todo: dict[int, list[int]]) -> list[list[tuple[int, int]]]:
        """(layout, sample index) pairs, a batch at a time. Several samples of one layout share a batch, and so what
        was computed for the layout."""
        size = self.config.batch_size
        if not self.several:
            pairs = [(layout, index) for layout, indices in todo.items() for index in indices]
            size = min(self.keeping.layouts, self._largest_share(len(pairs)))
            return [pairs[first : first + size] for first in range(0, len(pairs), size)]
        return [
            [(layout, index) for index in indices[first : first + size]]
            for layout, indices in todo.items()
            for first in range(0, len(indices), size)
        ]

    def _largest_share(self, count: int) -> int:
        """Images of the largest batch, where no rank is to be left without work."""
        return max(1, min(self.config.batch_size, -(-count // self.world.size)))

    def _decide_keeping(self, count: int) -> Keeping:
        """Whether modulations are kept, and how many layouts a batch may have, the same on every rank. A collective."""
        layouts = 1 if self.several else self._largest_share(count)
        keeping = self.world.broadcast(self.pipeline.keeping(layouts, *self.dataset.shape))
        if count:
            self.log(keeping.reason)
        return keeping

    # -- making -------------------------------------------------------------------------------------------------------

    def _read(self, batches: list[list[tuple[int, int]]]) -> Iterator[dict[str, Any]]:
        """The layouts of each batch: all different ones, or the one that several samples share."""
        layouts = [pair[0] for pairs in batches for pair in (pairs[:1] if self.several else pairs)]
        size = 1 if self.several or not batches else len(batches[0])
        return sampling_batches(self.dataset, layouts, size, self.num_workers)

    def _restore_inputs(self, layouts: list[int]) -> None:
        for batch in sampling_batches(self.dataset, layouts, 1):
            self._save_inputs(batch)

    def _make(self, pairs: list[tuple[int, int]], batch: dict[str, Any], on_step: Callable[[Moment], Any]) -> None:
        self._save_inputs(batch)
        try:
            pictures = self.pipeline.generate(
                batch["label"],
                batch.get("instance"),
                seeds=[image_seed(self.config.seed, self.dataset.names[layout], index) for layout, index in pairs],
                sampling=self.sampling,
                keeping=self.keeping,
                on_step=on_step,
            )
        except FloatingPointError as error:
            names = ", ".join(dict.fromkeys(self.dataset.names[layout] for layout, _ in pairs))
            raise FloatingPointError(f"layouts {names}: {error}") from error
        for (layout, index), picture in zip(pairs, pictures, strict=True):
            self.writer.save(picture, self._path(self.sample_folders[index], self.dataset.names[layout]))

    def _save_inputs(self, batch: dict[str, Any]) -> None:
        for row, name in enumerate(batch["name"]):
            if "image" in batch:
                self.writer.save(batch["image"][row].permute(1, 2, 0).numpy(), self._path("images", name))
            ids = batch["label"][row, 0].numpy()
            self.writer.save(ids if ids.dtype == np.uint8 else ids.astype(np.uint16), self._path("labels", name))

    def _path(self, folder: str, name: str) -> str:
        return os.path.join(self.folder, folder, f"{name}.png")

    # -- after --------------------------------------------------------------------------------------------------------

    def _note_time(self, count: int, seconds: float) -> None:
        """Into the log and sampling.json: how long this run's images took, reading and saving included. On rank 0."""
        self.log(f"{count} images in {seconds:.1f} s, {seconds / count:.3g} s each")
        before = self.record["run"].get("made", {"images": 0, "seconds": 0.0})
        seconds = round(before["seconds"] + seconds, 3)
        self.record["run"]["made"] = {"images": before["images"] + count, "seconds": seconds, "ranks": self.world.size}
        store.write_json(os.path.join(self.folder, SAMPLING_RECORD), self.record)

    def _finish(self) -> None:
        """Notes that all is there, and draws the overview. On rank 0."""
        if self.record["run"].pop("overwriting", False):
            store.write_json(os.path.join(self.folder, SAMPLING_RECORD), self.record)
        self._overview()

    def _overview(self) -> None:
        """A page of layout, photograph and samples, from what is in the folder. On rank 0."""
        shown = self.sample_folders[:OVERVIEW_SAMPLES]
        columns = ["layout", *(["photograph"] if self.dataset.has_images else [])]
        columns += ["sample"] if len(shown) == 1 else [f"sample {i}" for i in range(len(shown))]
        rows, names, present = [], [], set()
        for name in self.dataset.names[: self.layouts][:OVERVIEW_ROWS]:
            label = np.asarray(self._open("labels", name))
            present |= set(np.unique(label).tolist())
            row = [colorize(label, self.dataset.spec.palette)]
            row += [self._open("images", name)] if self.dataset.has_images else []
            rows.append(row + [self._open(folder, name) for folder in shown])
            names.append(name)
        legend = [(self.dataset.spec.class_names[i], self.dataset.spec.palette[i]) for i in sorted(present)]
        s = self.sampling
        steps = self.pipeline.diffusion(s.timestep_respacing, s.num_steps).num_timesteps
        title = f"{s.sampler}, {steps} steps, s = {s.s:g}"
        page = contact_sheet(rows, column_titles=columns, row_titles=names, title=title, legend=legend[:24])
        save_png(page, os.path.join(self.folder, "overview.png"))

    def _open(self, folder: str, name: str) -> Image.Image:
        with Image.open(self._path(folder, name)) as picture:
            picture.load()
            return picture


def _comparable(key: str, value: Any) -> Any:
    """The meaning of a recorded value: two spellings of one folder are no difference."""
    return os.path.normpath(value) if key in ("data_dir", "labels_dir") and value else value


def sampling_record(
    config: SampleConfig,
    sampling: Sampling,
    pipeline: SDMPipeline,
    data: dict[str, Any],
    spec: DatasetSpec,
) -> dict[str, Any]:
    """What sampling.json holds: under `images` all that decides an image, under `run` the rest."""
    layouts = {"labels_dir": config.labels_dir} if config.labels_dir else {"data_dir": data["data_dir"]}
    layouts |= {} if config.labels_dir else {"split": config.split}
    return {
        "images": {
            "model_sha256": store.file_hash(config.model_path),
            "seed": config.seed,
            "precision": pipeline.precision,
            **dataclasses.asdict(sampling),
            "dataset_mode": data["dataset_mode"],
            **layouts,
            **({"remap": dict(spec.remap), "crop": spec.crop} if spec.name == "custom" else {}),
            "grey": pipeline.grey,
            **binding_settings(pipeline.model_config),
            **binding_settings(pipeline.diffusion_config),
        },
        "run": {
            "settings": dataclasses.asdict(config),
            "data": data,
            "model": dataclasses.asdict(pipeline.model_config),
            "diffusion": dataclasses.asdict(pipeline.diffusion_config),
            "torch": torch.__version__,
        },
    }
