"""The data sets: samples of photograph, label map and instance map as small integers, in an order that nothing
disturbs.

Everything random about a sample (which item, crop, flip) follows from the seed and the sample's global position,
never from the state of a worker: one rank with batch 4 sees what two ranks with batch 2 see, and resuming needs the
position alone.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .data.listing import Item, expected_layout, list_items, list_label_items, read_cache_settings
from .data.notes import Notes, tell_new
from .data.sample_order import Positions
from .data.segments import read_segments
from .data.specs import DataError, DatasetSpec, MissingSplitError, get_spec
from .data.transforms import (
    Geometry,
    check_sizes,
    read_image,
    read_instances,
    read_label,
    sampling_geometry,
    training_geometry,
)

__all__ = [
    "DataError",
    "LayoutDataset",
    "MissingSplitError",
    "TrainingBatches",
    "balance_weights",
    "open_dataset",
    "sampling_batches",
    "training_batches",
]

SAMPLING_RECORD = "sampling.json"  # in a results folder: what its images were made with


class LayoutDataset(Dataset):
    """Samples of one split; `open_dataset` makes one.

    `dataset[i]` or `dataset[i, position]` is a dict of `image` uint8 [3, H, W] (where there are photographs), `label`
    uint8 [1, H, W] (int16 beyond 256 classes), `instance` int32 [1, H, W] (where `has_instances`), `name` and, where
    files are read otherwise than they are stored, `notes`. In training the crop and flip follow from the seed and the
    position (i where none is given). Raises DataError for a file that does not fit.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        image_size: int,
        *,
        training: bool,
        random_crop: bool = True,
        random_flip: bool = True,
        scale_jitter: float = 0.0,
        seed: int = 0,
        skip_bad: bool = False,
        use_instances: bool = True,
    ):
        self.spec, self.items, self.image_size, self.training = spec, list(items), image_size, training
        self.random_crop, self.random_flip, self.scale_jitter = random_crop, random_flip, scale_jitter
        self.seed, self.skip_bad = seed, skip_bad
        self.names = [item.name for item in self.items]
        self.num_classes = spec.num_classes
        self.has_images = self.items[0].image is not None
        self.has_instances = use_instances and (spec.instances == "labels" or self.items[0].instance is not None)
        self.notes = Notes()  # those of the samples that batches were made of
        self.shape = self._first_shape()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, position = key if isinstance(key, tuple) else (key, key)
        item, spec, notes = self.items[index], self.spec, Notes()
        label, table = read_label(item.label, spec, notes)
        image = None if item.image is None else read_image(item.image, spec, notes)
        size = label.size if image is None else image.size
        if image is not None:
            check_sizes(spec, item.image, size, item.label, label.size, spec.label_scale)
        geometry = self.geometry(size, position)
        sample = {"name": item.name}
        if image is not None:
            sample["image"] = torch.from_numpy(geometry.apply_to_image(image).transpose(2, 0, 1).copy())
        ids = table[geometry.apply_to_map(label)][None]  # [1, H, W], the network's ids
        sample["label"] = torch.from_numpy(ids.astype(np.uint8 if spec.num_classes <= 256 else np.int16))
        if self.has_instances:
            sample["instance"] = torch.from_numpy(ids)
            if item.instance is not None:
                instances = read_instances(item.instance, notes, spec.max_pixels)
                check_sizes(spec, item.label, label.size, item.instance, instances.size)
                sample["instance"] = torch.from_numpy(geometry.apply_to_map(instances)[None])
        if notes:
            sample["notes"] = notes
        shape = tuple(sample["label"].shape[1:])
        if shape != self.shape:
            raise DataError(
                f"{item.image or item.label} becomes {shape[1]} x {shape[0]} where {self.names[0]} becomes"
                f" {self.shape[1]} x {self.shape[0]}: with the aspect kept, all pictures need one aspect; crop them,"
                " or use the square crop"
            )
        return sample

    def geometry(self, size: tuple[int, int], position: int) -> Geometry:
        """The transform of a photograph of `size` (width, height) at a global position."""
        if not self.training:
            return sampling_geometry(size, self.image_size, self.spec.crop)
        return training_geometry(
            size,
            self.image_size,
            self.spec.crop,
            np.random.default_rng([self.seed, position]),
            random_crop=self.random_crop,
            random_flip=self.random_flip,
            scale_jitter=self.scale_jitter,
        )

    def _first_shape(self) -> tuple[int, int]:
        """(H, W) of every sample; with the aspect kept, that of the first readable item."""
        if self.spec.crop != "keep_aspect":
            return self.image_size, self.image_size
        failure = None
        for item in self.items:
            try:
                size = (
                    read_image(item.image, self.spec).size if item.image else read_label(item.label, self.spec)[0].size
                )
                return sampling_geometry(size, self.image_size, self.spec.crop).size[::-1]
            except DataError as error:
                failure = failure or error
                if not self.skip_bad:
                    break
        raise failure


def open_dataset(
    *,
    data_dir: str | os.PathLike | None,
    dataset_mode: str,
    split: str,
    image_size: int,
    num_classes: int | None = None,
    use_instances: bool = True,
    random_crop: bool = True,
    random_flip: bool = True,
    scale_jitter: float = 0.0,
    seed: int = 0,
    labels_dir: str | os.PathLike | None = None,
    skip_bad: bool = False,
    training: bool | None = None,
    dataset_json: dict | None = None,
    instances: str = "",
) -> LayoutDataset:
    """A split of a data set in one of the modes of `data.specs.DATASET_MODES`.

    split: "train" has the training transform (joint random crop, or the central crop where `random_crop` is off;
    flip; a further enlargement of up to 1 + `scale_jitter`), "val" and "test" the whole picture resized. labels_dir:
    take label maps alone from that folder (with `data_dir` for its `dataset.json` only), with the sampling transform;
    the `labels` of a results folder hold the network's ids already. dataset_json: see `get_spec`.
    use_instances: read instance maps where the mode has them; instances: "from_labels" puts the label maps in their
    place. skip_bad: training batches pass over unreadable items.
    Raises MissingSplitError for a folder that is not there and DataError for anything else that is wrong with the
    data.
    """
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; it must be at least 1")
    if scale_jitter < 0:
        raise DataError(f"scale_jitter is {scale_jitter}; 0 switches it off, 0.5 enlarges by up to 1.5")
    spec = get_spec(dataset_mode, data_dir, num_classes, dataset_json)
    if instances == "from_labels":
        spec = replace(spec, instances="labels")
    if spec.segments_files:
        read_segments(spec.segments_files)  # now, and once for all workers
    if labels_dir is not None:
        if holds_network_ids(labels_dir):
            spec = replace(spec, remap={}, keeps_other_ids=True, label_colors=None, segments_files=())
        elif dataset_mode != "custom":
            spec = replace(spec, palette_layouts=True)
        items = list_label_items(spec, labels_dir, use_instances)
    elif data_dir is None or not os.fspath(data_dir):
        raise MissingSplitError(f"no data folder given; use --data_dir ({expected_layout(spec)})")
    else:
        items = list_items(spec, data_dir, split, use_instances)
        cache = read_cache_settings(data_dir)
        if cache is not None:
            _check_cache(data_dir, cache, dataset_mode, image_size, scale_jitter)
            spec = replace(spec, label_scale=True)  # photographs are shrunk further than their label maps
    return LayoutDataset(
        spec,
        items,
        image_size,
        training=(split == "train" if training is None else training) and labels_dir is None,
        random_crop=random_crop,
        random_flip=random_flip,
        scale_jitter=scale_jitter,
        seed=seed,
        skip_bad=skip_bad,
        use_instances=use_instances,
    )


def holds_network_ids(labels_dir: str | os.PathLike) -> bool:
    """Whether a sampling run wrote these label maps: then their ids are the network's, not those of a data set."""
    folder, name = os.path.split(os.path.abspath(labels_dir))
    return name == "labels" and os.path.exists(os.path.join(folder, SAMPLING_RECORD))


def _check_cache(data_dir, cache: dict, dataset_mode: str, image_size: int, scale_jitter: float) -> None:
    """A cache serves the image size it was made for, and no more jitter than it was made for."""
    asked = f"dataset_mode {dataset_mode}, image_size {image_size}, scale_jitter {scale_jitter}"
    if (
        cache["dataset_mode"] != dataset_mode
        or cache["image_size"] != image_size
        or (scale_jitter > cache["scale_jitter"])
    ):
        made = ", ".join(f"{key} {cache[key]}" for key in ("dataset_mode", "image_size", "scale_jitter"))
        raise DataError(f"the cache {data_dir} was made for {made}, not for {asked}; make another or use the original")


class _Loadable(Dataset):
    """What workers fetch: samples, or the message of a DataError, so that it reaches the user without a worker's
    traceback.

    With `skip_bad`, a bad item is replaced by the next good one of the list, and travels along in `bad`.
    """

    def __init__(self, dataset: LayoutDataset, skip_bad: bool):
        self.dataset, self.skip_bad = dataset, skip_bad

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, position = key
        bad = {}
        for step in range(len(self.dataset)):
            place = (index + step) % len(self.dataset)
            try:
                return {**self.dataset[place, position], "position": position, "bad": bad}
            except DataError as error:
                if not self.skip_bad:
                    return {"error": str(error)}
                bad[self.dataset.names[place]] = str(error)
        return {"error": f"none of the {len(self.dataset)} items can be used; the first: {next(iter(bad.values()))}"}


def _collate(samples: list[dict]) -> dict:
    errors = [sample["error"] for sample in samples if "error" in sample]
    if errors:
        return {"error": errors[0]}
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("image", "label", "instance") if key in samples[0]}
    batch["name"] = [s["name"] for s in samples]
    batch["position"] = torch.tensor([s["position"] for s in samples], dtype=torch.int64)
    batch["bad"] = {name: message for s in samples for name, message in s["bad"].items()}
    batch["notes"] = Notes()
    for sample in samples:
        batch["notes"].merge(sample.get("notes", {}))
    return batch


def _start_worker(_: int) -> None:
    """A worker computes on one thread and leaves signals to the main process, which ends it.

    A SIGTERM to the whole process group must not kill the workers while the main process still saves its state, but
    one from the main process must (it may be the only way in which a failed run ends). The sender tells them apart,
    where the system says who it is.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # SLURM and Open MPI send it to the whole process group too
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not a handler inherited from the main process
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_asks, daemon=True).start()


def _end_when_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _loader(
    dataset: LayoutDataset, batches: Iterable, num_workers: int, pin_memory: bool, skip_bad: bool
) -> DataLoader:
    if hasattr(os, "sched_getaffinity"):  # a launcher may have bound the rank to one core
        num_workers = min(num_workers, len(os.sched_getaffinity(0)))
    return DataLoader(
        _Loadable(dataset, skip_bad),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the loader seeds its workers; without this it would draw from the global state
    )


class TrainingBatches:
    """Endless iterator of a rank's training batches; `close` (or leaving a `with`) ends the workers.

    `skipped` maps the names of the bad items passed over so far by this rank to what was wrong with them.
    """

    def __init__(self, loader: DataLoader, notes: Notes, log: Callable[[str], None] | None = None):
        self.skipped: dict[str, str] = {}
        self._batches, self._notes, self._log = iter(loader), notes, log

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> dict:
        """`image` uint8 [N, 3, H, W], `label` and, if there is one, `instance` [N, 1, H, W], `position` int64 [N]."""
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        if "error" in batch:
            self.close()
            raise DataError(batch["error"])
        self.skipped.update(batch.pop("bad"))
        tell_new(self._notes, batch.pop("notes"), self._log)
        del batch["name"]
        return batch

    def close(self) -> None:
        self._batches = None  # the loader's iterator ends its workers when it is no longer held

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def training_batches(
    dataset: LayoutDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int = 2,
    pin_memory: bool = False,
    class_balance: bool | np.ndarray = False,
    log: Callable[[str], None] | None = None,
) -> TrainingBatches:
    """Endless training batches of one rank.

    Slot j of this rank's k-th batch is global position `start + (k * world_size + rank) * batch_size + j`. Position p
    belongs to epoch p // len(dataset) and is an item of that epoch's permutation. To resume, give as `start` the
    positions already seen by all ranks together. class_balance: True draws images with rare classes more often
    (`balance_weights`, which reads all label maps first); an array gives each item's weight, float [len(dataset)].
    log: is told once of each kind of file that is read otherwise than it is stored.
    """
    if batch_size < 1 or not 0 <= rank < world_size or start < 0:
        raise DataError(f"batch_size {batch_size}, rank {rank} of {world_size}, start {start}: out of range")
    weights = None
    if isinstance(class_balance, np.ndarray):
        weights = class_balance
    elif class_balance:
        weights = balance_weights(dataset, num_workers=num_workers)
    positions = Positions(len(dataset), dataset.seed, batch_size, rank, world_size, start, weights)
    return TrainingBatches(_loader(dataset, positions, num_workers, pin_memory, dataset.skip_bad), dataset.notes, log)


def sampling_batches(
    dataset: LayoutDataset,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    log: Callable[[str], None] | None = None,
) -> Iterator[dict]:
    """The items `indices`, once each, in that order: `name` (list), `label`, and `image`, `instance` where present;
    `log` as in `training_batches`."""
    batches = [
        [(int(i), int(i)) for i in indices[first : first + batch_size]] for first in range(0, len(indices), batch_size)
    ]
    for batch in _loader(dataset, batches, num_workers, False, False):
        if "error" in batch:
            raise DataError(batch["error"])
        tell_new(dataset.notes, batch.pop("notes"), log)
        del batch["bad"], batch["position"]
        yield batch


class _Presence(Dataset):
    """Which classes an item's label map holds, bool [num_classes]; none for a bad map where bad items are skipped."""

    def __init__(self, dataset: LayoutDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray | str:
        present = np.zeros(self.dataset.num_classes, dtype=bool)
        try:
            image, table = read_label(self.dataset.items[index].label, self.dataset.spec)
        except DataError as error:
            return present if self.dataset.skip_bad else str(error)
        ids = np.flatnonzero(image.histogram()) if image.mode == "L" else np.unique(np.asarray(image))
        present[table[ids]] = True
        return present


def balance_weights(dataset: LayoutDataset, num_workers: int = 0, threshold: float = 0.5) -> np.ndarray:
    """How often each item should be drawn, relative to the others, float64 [len(dataset)].

    Repeat factors after LVIS (Gupta et al., 2019): an item counts max over its classes of sqrt(threshold / share of
    images with the class), at least 1. Reads every label map once.
    """
    loader = DataLoader(
        _Presence(dataset),
        batch_size=16,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    rows = [row for batch in loader for row in batch]
    errors = [row for row in rows if isinstance(row, str)]
    if errors:
        raise DataError(errors[0])
    present = np.stack(rows)  # [items, classes]
    share = present.mean(axis=0)
    factor = np.sqrt(threshold / np.maximum(share, 1 / len(dataset)))
    return np.maximum(1.0, np.where(present, factor, 0.0).max(axis=1))
