"""A small segmentation network for scoring samples where pretrained networks cannot be had.

    python benchmarks/segmenter.py train --data_dir data/camvid --image_size 48 --out OUTPUT/camvid-cpu/segmenter.pt
    python benchmarks/segmenter.py score RESULTS --segmenter OUTPUT/camvid-cpu/segmenter.pt

`train` fits a U-Net to real photographs of a data set in dataset_mode custom and writes it as TorchScript, which
evaluations/miou.py takes as its --segmenter. `score` uses its features: `feature distance` is the Frechet distance
between photographs and samples (what FID measures on Inception's features: not comparable with any FID), and `feature
diversity` the mean distance between samples of one layout in `samples_00/`, `samples_01/` ... (LPIPS's formula without
its learned weights: not comparable with any LPIPS). `detail` needs no network: the contrast of the finest detail in the
samples over that in the photographs, below 1 where samples are blurred.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "evaluations"))  # last: its lpips.py must not hide the package

from command_line import EvaluationError, inference  # noqa: E402
from frechet import FeatureStatistics, frechet_distance  # noqa: E402
from result_folders import by_name, list_images, load_rgb, sample_folders  # noqa: E402
from segmenters import IMAGENET_DEVIATION, IMAGENET_MEAN  # noqa: E402

from guided_diffusion.image_datasets import open_dataset, sampling_batches, training_batches  # noqa: E402
from guided_diffusion.logger import progress_bar  # noqa: E402

WIDTHS = (32, 64, 128, 256)


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class SegmentationUNet(nn.Module):
    """Class scores [N, classes, H, W] of normalised images [N, 3, H, W]; sides are multiples of 16."""

    def __init__(self, num_classes: int):
        super().__init__()
        pairs = list(itertools.pairwise(WIDTHS))
        self.stem = Block(3, WIDTHS[0], stride=2)
        self.down = nn.ModuleList(Block(fine, coarse, stride=2) for fine, coarse in pairs)
        self.context = nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 1)  # of the whole picture: a sky is above a street
        self.up = nn.ModuleList(Block(coarse + fine, fine) for fine, coarse in reversed(pairs))
        self.head = nn.Conv2d(WIDTHS[0], num_classes, 1)

    @torch.jit.export
    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The encoder's activations, finest first, [N, C, H / 2^(i+1), W / 2^(i+1)]."""
        x = self.stem(x)
        found = [x]
        for stage in self.down:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.features(x)
        x = found[-1]
        x = x + self.context(x.mean(dim=[2, 3], keepdim=True))
        level = len(found) - 2
        for stage in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = stage(torch.cat([x, found[level]], dim=1))
            level -= 1
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] as the network takes them: what evaluations/segmenters.py does for TorchScript files."""
    mean, deviation = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (images.float() / 255 - mean) / deviation


def augment(images: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and a colour cast of normalised images, at random: photographs differ in light."""
    batch = images.shape[0]
    contrast = 1 + 0.25 * (2 * torch.rand(batch, 1, 1, 1, device=images.device) - 1)
    shift = 0.3 * torch.randn(batch, 1, 1, 1, device=images.device)
    cast = 0.08 * torch.randn(batch, 3, 1, 1, device=images.device)
    return images * contrast + shift + cast


def train(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    shared = dict(data_dir=args.data_dir, dataset_mode="custom", image_size=args.image_size)
    data = open_dataset(**shared, split="train", scale_jitter=0.5, seed=args.seed)
    classes = data.spec.num_classes
    ignored = data.spec.class_names.index(args.ignore) if args.ignore in data.spec.class_names else -100
    network = SegmentationUNet(classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    progress = progress_bar(iterable=range(args.steps), desc=f"segmenter, on {device}", unit="step")
    with training_batches(data, batch_size=args.batch_size, num_workers=args.num_workers) as batches:
        for _ in progress:
            batch = next(batches)
            images, labels = augment(normalise(batch["image"].to(device))), batch["label"][:, 0].long().to(device)
            loss = F.cross_entropy(network(images), labels, ignore_index=ignored, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    network.cpu().eval()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}.part")
    with warnings.catch_warnings():  # deprecated, but the one format of a network that needs no code to load
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(str(temporary))
    temporary.replace(args.out)
    validation = open_dataset(**shared, split="val")
    right = total = 0
    with torch.inference_mode():
        for batch in sampling_batches(validation, range(len(validation)), 16):
            labels = batch["label"][:, 0].long()
            scored = labels != ignored
            right += (network(normalise(batch["image"])).argmax(1) == labels)[scored].sum().item()
            total += scored.sum().item()
    print(f"{args.out}: {right / total:.1%} of the pixels of {len(validation)} validation photographs")


def load_images(paths: list[Path]) -> torch.Tensor:
    """uint8 [N, 3, H, W] of pictures of one size."""
    return torch.stack([load_rgb(path) for path in paths]).permute(0, 3, 1, 2)


def pooled(network: torch.jit.ScriptModule, paths: list[Path], device: torch.device) -> FeatureStatistics:
    """Statistics of the coarsest features, averaged over each picture."""
    statistics = FeatureStatistics(WIDTHS[-1])
    for first in range(0, len(paths), 32):
        images = normalise(load_images(paths[first : first + 32]).to(device))
        statistics.update(network.features(images)[-1].mean(dim=(2, 3)).double().cpu().numpy())
    return statistics


def finest_contrast(paths: list[Path]) -> float:
    """Root mean square, over all pictures, of a pixel's difference from the mean of the 3x3 pixels around it."""
    squares = []
    for path in paths:
        image = load_images([path]).float()
        squares.append(float((image[:, :, 1:-1, 1:-1] - F.avg_pool2d(image, 3, stride=1)).square().mean()))
    return float(np.sqrt(np.mean(squares)))


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features [N, C, H, W] with unit length along the channels (arXiv 1801.03924, equation 1)."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)


def diversity(network: torch.jit.ScriptModule, folders: list[Path], device: torch.device) -> float:
    """Mean over layouts and pairs of their samples of the squared distance of unit features, averaged over stages."""
    by_folder = [by_name(list_images(folder)) for folder in folders]
    names = sorted(set.intersection(*(set(found) for found in by_folder)))
    totals = []
    for name in progress_bar(iterable=names, desc="feature diversity", unit="layout", leave=False):
        images = normalise(load_images([found[name] for found in by_folder]).to(device))
        stages = [unit(features) for features in network.features(images)]
        pairs = list(itertools.combinations(range(len(folders)), 2))
        first, second = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
        distance = sum((s[first] - s[second]).square().sum(1).mean(dim=(1, 2)) for s in stages)
        totals.append(float(distance.mean()) / len(stages))
    return float(np.mean(totals))


@inference()
def score(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = torch.jit.load(str(args.segmenter), map_location=device).eval()
    started = time.perf_counter()
    there = args.results.is_dir() and (args.results / "images").is_dir()
    try:
        folders = sample_folders(args.results, print) if there else []
    except EvaluationError as error:
        raise SystemExit(f"error: {error}") from error
    if not folders:
        raise SystemExit(
            f"error: {args.results} needs images/ and samples/ (or samples_00/ ...): name a results folder"
        )
    photographs, samples = list_images(args.results / "images"), list_images(folders[0])
    real, fake = pooled(network, photographs, device), pooled(network, samples, device)
    figures = {
        "note": "features of a segmentation network trained here: no FID, no LPIPS, comparable within one table only",
        "photographs": real.count,
        "samples": fake.count,
        "feature_distance": frechet_distance(*real.result(), *fake.result()),
        "detail": finest_contrast(samples) / max(finest_contrast(photographs), 1e-10),
    }
    if len(folders) > 1:
        figures |= {"samples_per_layout": len(folders), "feature_diversity": diversity(network, folders, device)}
    figures["seconds"] = round(time.perf_counter() - started, 2)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    for key, value in figures.items():
        print(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="train the network on real photographs")
    training.add_argument("--data_dir", required=True)
    training.add_argument("--image_size", type=int, required=True, help="as the samples have it")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--batch_size", type=int, default=16)
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--ignore", default="unlabelled", help="the class that is not learned")
    training.add_argument("--num_workers", type=int, default=1)
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=train)
    scoring = commands.add_parser("score", help="feature distance, diversity and detail of a results folder")
    scoring.add_argument("results", type=Path)
    scoring.add_argument("--segmenter", type=Path, required=True)
    scoring.add_argument("--json", type=Path)
    scoring.set_defaults(run=score)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
