"""A sampling run: which images are still to be made, by whom, and where they go."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from ..data.listing import printable, some_names
from ..data.pictures import colorize, contact_sheet, save_png
from ..data.specs import DataError
from ..dist_util import World
from ..image_datasets import LayoutDataset, sampling_batches
from ..logger import progress_bar
from ..pipeline import Keeping, SDMPipeline, image_seed
from ..sampling.loop import Moment
from ..settings import ConfigError, SampleConfig, Sampling
from ..weights import store
from .made_samples import MadeSamples, read_made
from .picture_record import Entry, Look, entry_of, fingerprint, input_pictures, samples_of, settings_differences
from .results_folder import ResultsFolder
from .stop_signals import StopSignals
from .writer import PictureWriter

OVERVIEW_ROWS = 8
OVERVIEW_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a results folder has, beside what is to be: the entries of its record, each layout now, whether all samples
    are to be made afresh, else the names of those made from something else, the samples to make by layout, and the
    paths of pictures that have taken the place of samples."""

    recorded: dict[str, Entry]
    looks: list[Look]
    afresh: bool
    changed: list[str]
    todo: dict[int, list[int]]
    foreign: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run has to do: the samples to make by layout, the layouts whose label map or photograph alone is to be
    written, and what each layout's pictures are made from."""

    todo: dict[int, list[int]]
    inputs: list[int]
    entries: list[Entry]


class _Stopped(Exception):
    """A signal asks the run to end."""


class SampleRun:
    """Samples the layouts of `dataset` into `config.results_path`.

    `images/NAME.png` is the photograph at the sampled size, `labels/NAME.png` the ids, `samples/NAME.png` the image
    (`samples_00/` ... with several per layout). A file is there whole or not at all; what is there, and was made from
    what the data holds now (`picture_record`), is not made again.
    """

    def __init__(
        self,
        *,
        pipeline: SDMPipeline,
        dataset: LayoutDataset,
        config: SampleConfig,
        sampling: Sampling,
        record: dict[str, Any],
        inputs: Sequence[str] = (),
        num_workers: int,
        world: World,
        log: Callable[[str], None],
    ):
        """record: what `sampling_record` makes. inputs: folders that the run reads, besides those of the data's files;
        the results folder must lie apart from them."""
        self.pipeline, self.dataset, self.config, self.sampling = pipeline, dataset, config, sampling
        self.record, self.num_workers, self.world, self.log = record, num_workers, world, log
        self.folder, self.results, self.inputs = config.results_path, ResultsFolder(config.results_path), inputs
        self.layouts = min(config.num_samples, len(dataset))
        self.several = config.samples_per_layout > 1
        digits = max(2, len(str(config.samples_per_layout - 1)))
        self.sample_folders = [
            f"samples_{i:0{digits}d}" if self.several else "samples" for i in range(config.samples_per_layout)
        ]
        self.folders = ["labels", *(["images"] if dataset.has_images else []), *self.sample_folders]

    def run(self) -> bool:
        """Makes what is missing; a signal ends it in order, between two steps. Returns whether all is there. A
        collective.

        :raises ConfigError: the folder holds images made in another way, or files that are not ours to replace.
        :raises DataError: a bad label map.
        :raises CheckpointError: the folder cannot be written.
        """
        plan = self.world.on_main(self._prepare)
        todo, self.entries = plan.todo, plan.entries
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
        self.made = MadeSamples(self.results.path, self.world.rank)
        made = contextlib.closing(self.made)
        with bar, StopSignals() as signals, contextlib.suppress(_Stopped), made, PictureWriter() as self.writer:

            def on_step(_: Moment) -> None:
                bar.update()
                if signals.number:
                    raise _Stopped

            self._restore_inputs(plan.inputs[self.world.rank :: self.world.size])
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
        if os.path.isdir(self.folder):
            store.lock(self.folder, "results_path", look=True)
        self._check_folder()
        survey = self._survey()
        return sum(map(len, survey.todo.values())), self.layouts * len(self.sample_folders)

    # -- before -------------------------------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        """:raises ConfigError: nothing may be written there, not even a lock."""
        files = (path for item in self.dataset.items for path in (item.label, item.image, item.instance) if path)
        self.results.check_apart([*self.inputs, *files])
        self.results.read_record()

    def _survey(self) -> Survey:
        """Compares the folder with the layouts; writes nothing."""
        before = self.results.read_record()
        afresh = before is not None and self._check_settings(before)
        recorded = before["pictures"] if before else {}
        names = self.dataset.names[: self.layouts]
        self.results.check_vacant(names, recorded, self.folders)
        looks = self._look()
        changed = [] if afresh else self._changed(recorded, looks)
        anew, todo = set(names if afresh else changed), {}
        foreign = []
        for layout, (name, look) in enumerate(zip(names, looks, strict=True)):
            entry = recorded.get(name, {})
            if missing := list(range(len(look.samples))) if name in anew else look.missing_samples(entry):
                todo[layout] = missing
            foreign += [self.results.picture(folder, name) for folder in look.foreign_samples(entry)]
        return Survey(recorded, looks, afresh, changed, todo, foreign)

    def _prepare(self) -> Plan:
        """Checks the folder and the layouts, takes away what does not belong, and writes the record. On rank 0."""
        results, names, everything = self.results, self.dataset.names[: self.layouts], set(self.dataset.names)
        self._check_folder()
        self._lock = results.open(self.folders)  # held until the process ends
        survey = self._survey()
        gone = [name for name in survey.recorded if name not in everything]
        if gone and (target := results.set_aside(gone)):
            self._tell(f"moved to {target}, because they are no layouts of this run any more", gone)
        kept = {name: entry for name, entry in survey.recorded.items() if name in everything}
        going = kept if survey.afresh else {name: kept[name] for name in survey.changed}
        if foreign := sorted({*survey.foreign, *results.foreign(going)}):
            target = results.move_aside(foreign)
            self._tell(
                f"moved to {target}, because they are not the samples that were made",
                [os.path.relpath(path, results.path) for path in foreign],
            )
        if survey.afresh:  # all of them: what remains must not pass for having been made with these settings
            results.remove(kept, inputs=True)
            kept = {}
        results.remove(survey.changed)
        if strangers := results.strangers(everything | survey.recorded.keys()):
            self._tell("note: pictures of no layout of this run, which scorers count; move them away", strangers)
        if self.config.overwrite:  # until it is done: a start after a stop goes on
            self.record["run"]["overwriting"] = True
        entries = [look.entry for look in survey.looks]
        self.record["pictures"] = kept | {
            name: look.entry | self._remaining(layout, look, survey, kept.get(name, {}))
            for layout, (name, look) in enumerate(zip(names, survey.looks, strict=True))
        }
        store.write_json(results.record_path, self.record)
        results.remove_made()
        inputs = [i for i, look in enumerate(survey.looks) if i not in survey.todo and not look.inputs_agree()]
        return Plan(survey.todo, inputs, entries)

    def _remaining(self, layout: int, look: Look, survey: Survey, before: Entry) -> Entry:
        """The hashes of a layout's samples that stay: those of this run, as they are, and those of others that the
        record names."""
        if survey.afresh or self.dataset.names[layout] in survey.changed:
            return {"samples": {}}
        todo = {self.sample_folders[index] for index in survey.todo.get(layout, ())}
        samples = (samples_of(before) or {}) | {folder: found for folder, found in look.samples.items() if found}
        return {"samples": {folder: found for folder, found in samples.items() if folder not in todo}}

    def _check_settings(self, before: dict[str, Any]) -> bool:
        """Compares with what made the samples that are there. Returns whether all are to be made afresh."""
        differences = settings_differences(before["images"], self.record["images"])
        if self.config.overwrite and (differences or "overwriting" not in before["run"]):
            return True
        if differences:
            raise ConfigError(
                f"{self.folder} holds images made with other settings ({'; '.join(differences)}); choose another "
                "--results_path, or --overwrite True to make them again"
            )
        self.record["run"] |= {"made": before["run"]["made"]} if "made" in before["run"] else {}
        return False

    def _look(self) -> list[Look]:
        """Reads every layout, photograph and sample: what is wrong is found before the first image is made."""

        def look(layout: int) -> Look:
            sample, name = self.dataset[layout], self.dataset.names[layout]
            inputs = {folder: self.results.holds(folder, name, pixels) for folder, pixels in input_pictures(sample)}
            shape = (*self.dataset.shape, 3)
            return Look(entry_of(sample), inputs, {f: self.results.found(f, name, shape) for f in self.sample_folders})

        with ThreadPoolExecutor() as pool:
            looks = pool.map(look, range(self.layouts))
            return list(progress_bar(iterable=looks, total=self.layouts, desc="checking layouts", leave=False))

    def _changed(self, recorded: dict[str, Entry], looks: list[Look]) -> list[str]:
        """Names of the layouts with samples that were made from another layout, or cannot be shown not to be."""
        changed, unreadable, refreshed, adopted = [], [], [], []
        own_instances = self.dataset.has_instances and self.dataset.spec.instances != "labels"
        for name, look in zip(self.dataset.names, looks, strict=False):
            entry = recorded.get(name)
            if entry is None or all(found is None for found in look.samples.values()):
                continue
            if not entry and own_instances:
                raise ConfigError(
                    f"{self.folder} is of an older version of this program, which did not note the instance maps that "
                    f"the image of {name} was made from; choose another --results_path, or --overwrite True"
                )
            if look.differs(entry):
                changed.append(name)
                continue
            unreadable += [name] if "" in look.samples.values() else []
            adopted += [] if entry else [name]
            refreshed += [name] if entry and entry.get("photograph") != look.entry.get("photograph") else []
        self._tell("sampled again, because their layouts have changed", changed)
        self._tell("sampled again, because what is there is no whole picture", unreadable)
        self._tell("taken over from an older version of this program, since their label maps agree", adopted)
        self._tell("written again to images/, because the photographs have changed", refreshed)
        return changed

    def _tell(self, what: str, names: Sequence[str]) -> None:
        if names:
            self.log(f"{what}: {some_names(names)} ({len(names)} in all)")

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
        keeping = self.world.broadcast(self.pipeline.keeping(layouts, *self.dataset.shape, sampling=self.sampling))
        if count:
            self.log(keeping.reason)
        return keeping

    # -- making -------------------------------------------------------------------------------------------------------

    def _read(self, batches: list[list[tuple[int, int]]]) -> Iterator[dict[str, Any]]:
        """The layouts of each batch: all different ones, or the one that several samples share."""
        layouts = [pair[0] for pairs in batches for pair in (pairs[:1] if self.several else pairs)]
        size = 1 if self.several or not batches else len(batches[0])
        return sampling_batches(self.dataset, layouts, size, self.num_workers, self.log)

    def _restore_inputs(self, layouts: list[int]) -> None:
        for layout, batch in zip(layouts, sampling_batches(self.dataset, layouts, 1), strict=True):
            self._save_inputs([layout], batch)

    def _make(self, pairs: list[tuple[int, int]], batch: dict[str, Any], on_step: Callable[[Moment], Any]) -> None:
        self._save_inputs([layout for layout, _ in (pairs[:1] if self.several else pairs)], batch)
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
            folder, name = self.sample_folders[index], self.dataset.names[layout]
            self.made.note(folder, name, fingerprint(picture))
            self.writer.save(picture, self.results.picture(folder, name))

    def _save_inputs(self, layouts: list[int], batch: dict[str, Any]) -> None:
        for row, layout in enumerate(layouts):
            name = self.dataset.names[layout]
            sample = {key: batch[key][row] for key in ("label", "instance", "image") if key in batch}
            if entry_of(sample) != self.entries[layout]:
                raise DataError(f"the files of the layout {name} were changed while this run read them; start it again")
            for folder, pixels in input_pictures(sample):
                self.writer.save(pixels, self.results.picture(folder, name))

    # -- after --------------------------------------------------------------------------------------------------------

    def _note_time(self, count: int, seconds: float) -> None:
        """Into the log and sampling.json: how long this run's images took, reading and saving included, and their
        hashes. On rank 0."""
        self.log(f"{count} images in {seconds:.1f} s, {seconds / count:.3g} s each")
        before = self.record["run"].get("made", {"images": 0, "seconds": 0.0})
        seconds = round(before["seconds"] + seconds, 3)
        self.record["run"]["made"] = {"images": before["images"] + count, "seconds": seconds, "ranks": self.world.size}
        for name, samples in read_made(self.results.path).items():
            self.record["pictures"][name]["samples"] |= samples
        store.write_json(self.results.record_path, self.record)
        self.results.remove_made()

    def _finish(self) -> None:
        """Notes that all is there, and draws the overview. On rank 0."""
        if self.record["run"].pop("overwriting", False):
            store.write_json(self.results.record_path, self.record)
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
            names.append(printable(name))
        legend = [(self.dataset.spec.class_names[i], self.dataset.spec.palette[i]) for i in sorted(present)]
        s = self.sampling
        steps = self.pipeline.diffusion(s.timestep_respacing, s.num_steps).num_timesteps
        title = f"{s.sampler}, {steps} steps, {s.guidance + ', ' if s.guidance != 'cfg' else ''}s = {s.s:g}"
        page = contact_sheet(rows, column_titles=columns, row_titles=names, title=title, legend=legend[:24])
        path = os.path.join(self.results.path, "overview.png")
        try:
            save_png(page, path)
        except OSError as error:
            raise store.CheckpointError(
                f"cannot write {path}: {error}; all pictures are there, the same command draws the overview"
            ) from error

    def _open(self, folder: str, name: str) -> Image.Image:
        with Image.open(self.results.picture(folder, name)) as picture:
            picture.load()
            return picture
