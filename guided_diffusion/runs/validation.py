"""What is looked at during training: the validation loss that decides the best EMA, and preview pages.

Neither touches the training: both draw their noise from seeds of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from ..data.specs import DataError
from ..dist_util import World
from ..image_datasets import LayoutDataset, sampling_batches
from ..layouts.encode import to_network, to_uint8
from ..sampling.loop import sample_loop
from ..seeding import normals, stable_seed
from .pictures import colorize, contact_sheet

Weights = dict[str, torch.Tensor]
PREVIEW_LAYOUTS = 4
PREVIEW_SCALE = 1.5


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced (all, where there are fewer)."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


class ValidationFailed(RuntimeError):
    """The validation loss could not be measured; the message says why."""


class Validation:
    """The denoising loss on a fixed set: the same images, timesteps and noise every time.

    Image i of n has timestep (i + 1/2) / n of the trajectory, so that all noise levels count. Ranks share the work.
    """

    def __init__(self, dataset: LayoutDataset, diffusion: Any, world: World, *, images: int, batch_size: int):
        self.dataset, self.diffusion, self.world = dataset, diffusion, world
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
        loss = ", variational bound" if self.diffusion.use_kl else ""
        return f"{len(self.indices)} images of {height}x{width}, names {names[:12]}{loss}"

    def loss(self, model: torch.nn.Module, weights: Weights) -> float:
        """The mean squared error of `model` with `weights` (the whole loss where it has no such part). A collective.

        :raises ValidationFailed: on every rank, where one could not read or compute its part.
        """
        total, problem = torch.zeros(1, dtype=torch.float64), None
        try:
            total += self._sum(model, weights)
        except (RuntimeError, OSError, ValueError) as error:  # no memory left, say: the other ranks must hear of it
            problem = f"{type(error).__name__}: {error}"
        problems = [text for text in self.world.gather(problem) if text is not None]
        if problems:
            raise ValidationFailed(problems[0])
        return float(self.world.sum_(total)) / len(self.indices)

    def _sum(self, model: torch.nn.Module, weights: Weights) -> float:
        """The sum over this rank's images."""
        mine = list(range(len(self.indices)))[self.world.rank :: self.world.size]
        total = 0.0
        for slots, batch in self._batches(mine):
            x_start, y = to_network(batch, self.world.device, self.dataset.num_classes, model.dtype)
            t = [(2 * slot + 1) * self.diffusion.num_timesteps // (2 * len(self.indices)) for slot in slots]
            # drawn on the CPU: a run that moves to another kind of device compares its losses
            noise = normals([stable_seed("validation", slot) for slot in slots], x_start.shape[1:]).to(x_start.device)
            with evaluating(model, weights) as network:
                terms = self.diffusion.training_losses(
                    network, x_start, torch.tensor(t, device=x_start.device), {"y": y}, noise
                )
            total += float(terms.get("mse", terms["loss"]).double().sum())
        return total

    def _batches(self, slots: list[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        batches = sampling_batches(self.dataset, [self.indices[slot] for slot in slots], self.batch_size)
        for first, batch in enumerate(batches):
            yield slots[first * self.batch_size : (first + 1) * self.batch_size], batch


class evaluating:
    """Within it, a function that runs `model` with other weights, in evaluation mode, without gradients."""

    def __init__(self, model: torch.nn.Module, weights: Weights):
        self.model, self.weights = model, weights

    def __enter__(self) -> Callable[..., torch.Tensor]:
        self.no_grad = torch.no_grad()
        self.no_grad.__enter__()
        self.model.eval()
        return lambda x, t, **kwargs: functional_call(self.model, self.weights, (x, t), kwargs)

    def __exit__(self, *error: Any) -> None:
        self.model.train()
        self.no_grad.__exit__(*error)


def preview_page(
    model: torch.nn.Module,
    weights: Weights,
    diffusion: Any,
    dataset: LayoutDataset,
    device: torch.device,
    *,
    s: float,
    title: str,
) -> np.ndarray:
    """A page of layout, photograph and sample for a few layouts, uint8 [H, W, 3].

    :param diffusion: over the few steps that a preview takes.
    :param s: the guidance scale; 1 for a network that has not seen null layouts, whose answer to one means nothing.
    """
    indices = spread(PREVIEW_LAYOUTS, len(dataset))
    batch = next(iter(sampling_batches(dataset, indices, len(indices))))
    _, y = to_network(batch, device, dataset.num_classes, model.dtype)
    noise = normals([stable_seed("preview", i) for i in indices], (3, *y.shape[2:])).to(device)
    with evaluating(model, weights) as network:
        for moment in sample_loop(diffusion, network, noise, sampler="dpmsolver++", model_kwargs={"y": y, "s": s}):
            sample = moment.x
    rows = []
    for i, picture in enumerate(to_uint8(sample, dataset.spec.grey)):
        photograph = batch["image"][i].permute(1, 2, 0).numpy() if "image" in batch else None
        rows.append([colorize(batch["label"][i, 0].numpy(), dataset.spec.palette), photograph, picture])
    page = contact_sheet(rows, column_titles=["layout", "photograph", "sample"], row_titles=batch["name"], title=title)
    return np.asarray(page)
