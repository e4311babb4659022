"""The validation loss, which decides the best EMA. It draws its noise from seeds of its own: training is untouched."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..data.specs import DataError
from ..dist_util import World, in_words
from ..image_datasets import LayoutDataset, sampling_batches
from ..layouts.encode import to_network
from ..objectives.objective import Batch, Draws, Objective
from ..seeding import normals, stable_seed

Weights = dict[str, torch.Tensor]


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced (all, where there are fewer)."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


class ValidationFailed(RuntimeError):
    """The validation loss could not be measured; the message says why."""


class Validation:
    """What `objective` measures on a fixed set: the same images, timesteps and noise every time.

    Image i of n has timestep (i + 1/2) / n of the trajectory, so that all noise levels count. Ranks share the work.
    """

    def __init__(self, dataset: LayoutDataset, objective: Objective, world: World, *, images: int, batch_size: int):
        self.dataset, self.objective, self.world = dataset, objective, world
        self.indices = spread(images, len(dataset))
        self.batch_size = batch_size

    def check(self) -> list[str]:
        """Reads every image once. Returns what was left out, where the data set passes over bad files. A collective.

        :raises DataError: a bad file; or no image is left.
        """
        bad = {}
        for slot in list(range(len(self.indices)))[self.world.rank :: self.world.size]:
            try:
                next(sampling_batches(self.dataset, [self.indices[slot]], 1))
            except DataError as error:
                if not self.dataset.skip_bad:
                    raise
                bad[slot] = str(error)
        for others in self.world.gather(bad):
            bad |= others
        self.indices = [index for slot, index in enumerate(self.indices) if slot not in bad]
        if not self.indices:
            raise DataError(f"no validation image can be read: {next(iter(bad.values()))}; or --val_images 0")
        return [bad[slot] for slot in sorted(bad)]

    @property
    def measure(self) -> str:
        """What the losses are measured on, in words: those with another measure do not compare."""
        names = "\n".join(self.dataset.names[i] for i in self.indices)
        names = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()  # a name may hold bytes of no text
        height, width = self.dataset.shape
        text = f"{len(self.indices)} images of {height}x{width}, names {names[:12]}"
        return ", ".join(part for part in (text, self.objective.measured_in_words) if part)

    def loss(self, model: torch.nn.Module, weights: Weights) -> float:
        """The mean of the objective's measured term over all images, of `model` with `weights`. A collective.

        :raises ValidationFailed: on every rank, where one could not read or compute its part.
        """
        part, problem = self.world.together(lambda: self._try_to_sum(model, weights))
        problems = [text for text in self.world.gather(problem) if text is not None]
        if problems:
            raise ValidationFailed(problems[0])
        return float(self.world.sum_(torch.tensor([part], dtype=torch.float64))) / len(self.indices)

    def _try_to_sum(self, model: torch.nn.Module, weights: Weights) -> tuple[float, str | None]:
        try:
            return self._sum(model, weights), None
        except (RuntimeError, OSError, ValueError) as error:  # no memory left, say
            return 0.0, in_words(error)

    def _sum(self, model: torch.nn.Module, weights: Weights) -> float:
        """The sum over this rank's images."""
        mine = list(range(len(self.indices)))[self.world.rank :: self.world.size]
        total = 0.0
        for slots, batch in self._batches(mine):
            image, layout = to_network(batch, self.world.device, self.dataset.num_classes, model.dtype)
            t = [(2 * slot + 1) * self.objective.num_timesteps // (2 * len(self.indices)) for slot in slots]
            # drawn on the CPU: a run that moves to another kind of device compares its losses
            noise = normals([stable_seed("validation", slot) for slot in slots], image.shape[1:]).to(image.device)
            draws = Draws(torch.tensor(t, device=image.device), noise)
            with evaluating(model, weights) as network:
                terms = self.objective.losses(network, Batch(image, layout), draws)
            total += float(terms[self.objective.measured].double().sum())
        return total

    def _batches(self, slots: list[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        batches = sampling_batches(self.dataset, [self.indices[slot] for slot in slots], self.batch_size)
        for first, batch in enumerate(batches):
            yield slots[first * self.batch_size : (first + 1) * self.batch_size], batch


def open_validation(
    split: LayoutDataset | None,
    objective: Objective,
    world: World,
    *,
    images: int,
    batch_size: int,
    log: Callable[[str], None],
) -> Validation | None:
    """The validation on `images` of a split, all of them read once; None without a split or images. A collective.

    :raises DataError: a bad file; or no image is left.
    """
    if split is None:
        log("no validation split: the latest EMA counts as the best")
    if split is None or not images:
        return None
    validation = Validation(split, objective, world, images=images, batch_size=batch_size)
    for problem in validation.check():  # now, not at the first save
        log(f"note: left out of the validation: {problem}")
    return validation


@contextlib.contextmanager
def evaluating(model: torch.nn.Module, weights: Weights) -> Iterator[torch.nn.Module]:
    """Within it, `model` has the tensors of `weights` in place of its parameters, is in evaluation mode, and makes no
    gradients.

    The modules hold other tensors for the time, and nothing is copied: the parameters, which the optimizer and
    DistributedDataParallel know, are not touched, and stand in their places again afterwards, also after an error.

    :param weights: for every parameter a tensor, in its shape and memory layout.
    :raises ValueError: other names or shapes than those of the parameters.
    """
    parameters = dict(model.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: w.shape for name, w in weights.items()}:
        raise ValueError("the weights to evaluate have other names or shapes than the network's parameters")
    training = model.training
    try:
        _put(model, weights)
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        _put(model, parameters)
        model.train(training)


def _put(model: torch.nn.Module, weights: Weights) -> None:
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = tensor  # setattr refuses a tensor that is no Parameter
