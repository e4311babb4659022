"""Preview pages: what the averaged weights draw from a few layouts, seen while the training goes on.

They draw their noise from seeds of their own, and do not touch the training.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import torch

from ..data.pictures import colorize, contact_sheet, save_png
from ..dist_util import World
from ..image_datasets import LayoutDataset, sampling_batches
from ..layouts.encode import to_network, to_uint8
from ..logger import Logger
from ..sampling.loop import sample_loop
from ..script_util import create_gaussian_diffusion
from ..seeding import normals, stable_seed
from ..settings import DiffusionConfig
from .state import TrainingState
from .validation import Weights, evaluating, spread

PREVIEW_LAYOUTS = 4
PREVIEW_SCALE = 1.5
PREVIEW_STEPS = 20


class Previews:
    """Draws a page of a few layouts of `dataset` into the log directory.

    :param guided: the network has seen null layouts in training; else its answer to one means nothing.
    """

    def __init__(
        self,
        diffusion: DiffusionConfig,
        dataset: LayoutDataset,
        folder: str,
        *,
        guided: bool,
        world: World,
        logger: Logger,
    ):
        self.diffusion = create_gaussian_diffusion(
            dataclasses.replace(diffusion, timestep_respacing=""), min(PREVIEW_STEPS, diffusion.diffusion_steps)
        )
        self.dataset, self.folder, self.world, self.logger = dataset, folder, world, logger
        self.s = PREVIEW_SCALE if guided else 1.0

    def draw(self, state: TrainingState) -> None:
        """The page of this step, by rank 0; one that fails is told of and passed over. A collective."""
        self.world.on_main(lambda: self._try_to_draw(state))

    def _try_to_draw(self, state: TrainingState) -> None:
        try:
            self._draw(state)
        except (RuntimeError, OSError, ValueError) as error:  # a page is not worth a run
            self.logger.log(f"warning: no preview of step {state.step}: {error}")

    def _draw(self, state: TrainingState) -> None:
        rate = next(iter(state.emas))
        title = f"step {state.step}, EMA {rate}, s = {self.s:g}"
        page = self.page(state.model, state.ema(rate), title)
        save_png(page, os.path.join(self.folder, f"preview_{state.step:06d}.png"))
        self.logger.image("preview", page, state.step)

    def page(self, model: torch.nn.Module, weights: Weights, title: str) -> np.ndarray:
        """A page of layout, photograph and sample for a few layouts, uint8 [H, W, 3]."""
        dataset, indices = self.dataset, spread(PREVIEW_LAYOUTS, len(self.dataset))
        batch = next(iter(sampling_batches(dataset, indices, len(indices))))
        _, y = to_network(batch, self.world.device, dataset.num_classes, model.dtype)
        noise = normals([stable_seed("preview", i) for i in indices], (3, *y.shape[2:])).to(self.world.device)
        with evaluating(model, weights) as network:
            sample = self._sample(network, y, noise)
        rows = []
        for i, picture in enumerate(to_uint8(sample, dataset.spec.grey)):
            photograph = batch["image"][i].permute(1, 2, 0).numpy() if "image" in batch else None
            rows.append([colorize(batch["label"][i, 0].numpy(), dataset.spec.palette), photograph, picture])
        titles = ["layout", "photograph", "sample"]
        return np.asarray(contact_sheet(rows, column_titles=titles, row_titles=batch["name"], title=title))

    def _sample(self, network: Any, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise [N, 3, H, W] and layouts [N, L, H, W] -> images [N, 3, H, W], by the loop that samples."""
        kwargs = {"y": y, "s": self.s}
        *_, moment = sample_loop(self.diffusion, network, noise, sampler="dpmsolver++", model_kwargs=kwargs)
        return moment.x
