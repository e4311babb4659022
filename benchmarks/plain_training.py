"""Training as guided-diffusion does it, with our own network's weights, and a switch for every improvement over it.

What "plain" means here: dense one-hot maps made on the host; einsum attention that is always recomputed in the backward
pass; scale and shift of SPADE by a convolution each, from a layout resized for each; channels-first memory; float32;
gradient and weight norms per parameter, each fetched from the device; AdamW and the EMA parameter by parameter; one
loader worker.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from guided_diffusion.fp16_util import global_norm
from guided_diffusion.image_datasets import LayoutDataset, training_batches
from guided_diffusion.layouts.encode import instance_edges, to_network
from guided_diffusion.layouts.spade import Layout, SPADEGroupNorm
from guided_diffusion.nn import timestep_embedding, update_ema
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from guided_diffusion.settings import DiffusionConfig, ModelConfig
from guided_diffusion.unet import AttentionBlock, UNetModel

# In the order in which they are added; the descriptions stand in the table.
IMPROVEMENTS = {
    "attention": "fused attention, not recomputed",
    "spade": "one SPADE convolution, layout resized once",
    "channels_last": "channels-last memory",
    "integers": "integers to the device, one-hot made there",
    "optimizer": "fused AdamW, EMA in one call",
    "statistics": "norms and losses once per interval",
    "workers": "two loader workers",
}
LOG_INTERVAL = 10
EMA_RATE = 0.9999


class EinsumAttention(AttentionBlock):
    """All weights between pixels are built and kept in memory; recomputed in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._forward, x, use_reentrant=False)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x.reshape(batch, channels, -1))
        qkv = F.conv1d(tokens, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.reshape(batch * self.num_heads, -1, height * width).chunk(3, dim=1)
        scale = q.shape[1] ** -0.25
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        attended = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, channels, -1)
        attended = F.conv1d(attended, self.proj_out.weight, self.proj_out.bias)
        return x + attended.reshape(x.shape)


class SeparateSPADE(SPADEGroupNorm):
    """Two convolutions, and a resized layout, for every norm."""

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        y = layout.y[:, : self.mlp_shared[0].in_channels]  # without the zeros that a GPU's layout has in 16 bits
        hidden = self.mlp_shared(F.interpolate(y, size=x.shape[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class ChannelsFirstUNet(UNetModel):
    """The network in PyTorch's default memory layout."""

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        layout = Layout(y.contiguous())
        # .to: one float32 input would make every layer after it float32
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        h, skips = x.to(self.dtype).contiguous(), []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb, layout)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, layout)
        return self.out(h)


class DenseBatches:
    """What a plain loader hands over: float images and dense one-hot maps with the edge, float32, from one worker."""

    def __init__(self, dataset: LayoutDataset, batch_size: int, workers: int):
        self.dataset, self.num_classes = dataset, dataset.num_classes
        loader = torch.utils.data.DataLoader(
            self, batch_size=batch_size, num_workers=workers, shuffle=True, drop_last=True, persistent_workers=True
        )
        self.batches = self._endless(loader)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = self.dataset[index]
        image = sample["image"].numpy().astype(np.float32) / 127.5 - 1
        label = sample["label"].numpy()[0]
        y = np.zeros((self.num_classes + 1, *label.shape), np.float32)
        np.put_along_axis(y[:-1], label[None].astype(np.int64), 1.0, axis=0)
        y[-1] = instance_edges(sample["instance"][None])[0, 0].numpy()
        return image, y

    @staticmethod
    def _endless(loader):
        while True:
            yield from loader

    def __next__(self):
        return next(self.batches)


class PlainTraining:
    """One network and its training steps, with those of IMPROVEMENTS that are in `improved`."""

    def __init__(
        self,
        model: ModelConfig,
        diffusion: DiffusionConfig,
        dataset: LayoutDataset,
        batch_size: int,
        device: torch.device,
        improved: set[str],
    ):
        torch.manual_seed(0)
        self.device, self.improved, self.dataset, self.batch_size = device, improved, dataset, batch_size
        self.diffusion = create_gaussian_diffusion(diffusion)
        self.model = create_model(model, diffusion.learn_sigma).to(device)
        for module in self.model.modules():
            if isinstance(module, AttentionBlock) and "attention" not in improved:
                module.__class__ = EinsumAttention
            elif isinstance(module, SPADEGroupNorm) and "spade" not in improved:
                module.__class__ = SeparateSPADE
        if "channels_last" in improved:
            self.model.to(memory_format=torch.channels_last)
        else:
            self.model.__class__ = ChannelsFirstUNet
        self.parameters = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        implementation = dict(fused=True) if "optimizer" in improved else dict(foreach=False, fused=False)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, **implementation)
        workers = 2 if "workers" in improved else 1
        if "integers" in improved:
            self.batches = training_batches(
                dataset, batch_size=batch_size, num_workers=workers, pin_memory=device.type == "cuda"
            )
        else:
            self.batches = DenseBatches(dataset, batch_size, workers)
        self.steps = 0
        self.bytes_sent = 0

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self.batches)
        if "integers" in self.improved:
            self.bytes_sent = sum(batch[name].nbytes for name in ("image", "label", "instance"))
            return to_network(batch, self.device, self.dataset.num_classes, torch.float32)
        self.bytes_sent = sum(part.nbytes for part in batch)
        return batch[0].to(self.device), batch[1].to(self.device)

    def step(self) -> None:
        x_start, y = self._batch()
        t = torch.randint(0, self.diffusion.num_timesteps, (self.batch_size,), device=self.device)
        self.optimizer.zero_grad(set_to_none="optimizer" in self.improved)
        terms = self.diffusion.training_losses(self.model, x_start, t, {"y": y})
        terms["loss"].mean().backward()
        self._statistics(t, terms)
        self.optimizer.step()
        if "optimizer" in self.improved:
            update_ema(self.ema, self.parameters, EMA_RATE)
        else:
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.mul_(EMA_RATE).add_(parameter.detach(), alpha=1 - EMA_RATE)
        self.steps += 1

    def _statistics(self, t: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        if "statistics" in self.improved:
            norm = global_norm([p.grad for p in self.parameters])
            if not bool(torch.isfinite(norm)):
                raise FloatingPointError("the gradient is not finite")
            if self.steps % LOG_INTERVAL == 0:
                float(global_norm([p.detach() for p in self.parameters]))
            return
        squares = [0.0, 0.0]
        for parameter in self.parameters:
            squares[0] += torch.norm(parameter.detach()).item() ** 2
            squares[1] += torch.norm(parameter.grad).item() ** 2
        self.norms = [math.sqrt(total) for total in squares]
        self.losses = {
            name: [(int(step), value.item()) for step, value in zip(t, values, strict=True)]
            for name, values in terms.items()
        }
