"""How fast the loader is: decode and resize cost, samples per second against plain Pillow code, and what a cache saves.

    python benchmarks/loader.py --results_path OUTPUT/benchmarks/loader.json

Draws scenes at the sizes of CamVid, COCO-Stuff, CelebAMask-HQ and Cityscapes (or takes real ones with --data_dir),
then measures CPU time in rounds that alternate between the variants, so that a busy machine disturbs ratios little.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "data"))
from cache_dataset import build_cache

from guided_diffusion.data.transforms import read_image, read_instances, read_label
from guided_diffusion.hosts.parallel import available_cores
from guided_diffusion.image_datasets import LayoutDataset, open_dataset, training_batches

# name: (mode, width, height, image size of the training run, photographs' format)
SIZES = {
    "camvid": ("custom", 480, 360, 128, "jpg"),
    "coco": ("coco", 640, 480, 256, "jpg"),
    "celeba": ("celeba", 1024, 1024, 256, "jpg"),
    "cityscapes": ("cityscapes", 2048, 1024, 256, "png"),
}


def draw_scenes(root: Path, name: str, count: int) -> None:
    """`count` scenes of smooth colour with grain, and label and instance maps of blobs, in the mode's layout."""
    mode, width, height, _, extension = SIZES[name]
    rng = np.random.default_rng(0)
    for i in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
        grain = rng.normal(0, 4, (height, width, 3))
        pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)) + grain
        blobs = Image.fromarray(rng.normal(size=(height // 48, width // 48)).astype(np.float32))
        field = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC))
        ids = np.digitize(field, np.linspace(-1.5, 1.5, 11)).astype(np.uint8)  # 12 classes
        if mode == "cityscapes":
            city = ("leftImg8bit/train/town", "gtFine/train/town", "gtFine/train/town")
            stems = tuple(f"town_{i:06d}_{end}" for end in ("leftImg8bit", "gtFine_labelIds", "gtFine_instanceIds"))
        else:
            city = (
                ("train_img", "train_label", "train_inst") if mode == "coco" else ("train/images", "train/labels", None)
            )
            stems = (f"{i:06d}",) * 3
        photograph = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        write(photograph, root / city[0] / f"{stems[0]}.{extension}", quality=92)
        half = (width // 2, height // 2)
        labels = (
            Image.fromarray(ids).resize(half, Image.Resampling.NEAREST) if mode == "celeba" else Image.fromarray(ids)
        )
        write(labels, root / city[1] / f"{stems[1]}.png")
        if city[2]:
            instances = ids if mode == "coco" else ids.astype(np.uint16) * 1000
            write(Image.fromarray(instances), root / city[2] / f"{stems[2]}.png")


def write(picture: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


class PlainPillow(Dataset):
    """The same work as one writes it without thinking of speed: no check of ids, float tensors, global random state."""

    def __init__(self, dataset: LayoutDataset):
        self.items, self.size, self.crop = dataset.items, dataset.image_size, dataset.spec.crop

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        item = self.items[index]
        image = Image.open(item.image).convert("RGB")
        maps = [Image.open(path) for path in (item.label, item.instance) if path]
        side = self.size if self.crop == "keep_aspect" else random.randint(self.size, round(self.size / 0.8))
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        maps = [np.array(m.resize(image.size, Image.Resampling.NEAREST)) for m in maps]
        pixels = np.array(image)
        if self.crop != "keep_aspect":
            y, x = random.randint(0, pixels.shape[0] - self.size), random.randint(0, pixels.shape[1] - self.size)
            window = np.s_[y : y + self.size, x : x + self.size]
            pixels, maps = pixels[window], [m[window] for m in maps]
        if random.random() < 0.5:
            pixels, maps = pixels[:, ::-1], [m[:, ::-1] for m in maps]
        image_tensor = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        return image_tensor, *(torch.from_numpy(m.astype(np.int64)) for m in maps)


def stage_costs(dataset: LayoutDataset) -> dict[str, float]:
    """Milliseconds of CPU time of each stage for one sample, medians over the items and some repeats."""
    spec, seconds = dataset.spec, {"decode photograph": [], "decode maps": [], "resize, crop, flip": []}
    for position in range(min(24, 3 * len(dataset))):
        item = dataset.items[position % len(dataset)]
        start = time.process_time()
        image = read_image(item.image, spec)
        seconds["decode photograph"].append(time.process_time() - start)
        start = time.process_time()
        maps = [read_label(item.label, spec)[0]]
        if item.instance:
            maps.append(read_instances(item.instance))
        seconds["decode maps"].append(time.process_time() - start)
        start = time.process_time()
        geometry = dataset.geometry(image.size, position)
        geometry.apply_to_image(image)
        for ids in maps:
            geometry.apply_to_map(ids)
        seconds["resize, crop, flip"].append(time.process_time() - start)
    return {stage: 1e3 * float(np.median(values)) for stage, values in seconds.items()}


def rates(variants: dict[str, Callable[[], object]], samples: int, options: argparse.Namespace) -> dict[str, float]:
    """Samples per second of CPU time of each variant: medians over rounds in which they take turns."""
    seconds = {name: [] for name in variants}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker; idle threads that wait for work would count as CPU time
    for take in variants.values():
        take()  # files come into the page cache
    for _ in range(options.rounds):
        for name, take in variants.items():
            start = time.process_time()
            for _ in range(options.batches):
                take()
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {name: samples * options.batches / float(np.median(values)) for name, values in seconds.items()}


def measure(name: str, data_dir: Path, folder: Path, options: argparse.Namespace) -> dict:
    mode, width, height, image_size, extension = SIZES[name]
    cache = folder / "cache"
    settings = {"dataset_mode": mode, "split": "train", "image_size": image_size}
    if mode == "custom":
        settings["num_classes"] = 12
    dataset = open_dataset(data_dir=data_dir, **settings)
    build_cache(
        SimpleNamespace(
            data_dir=str(data_dir),
            cache_dir=str(cache),
            dataset_mode=mode,
            image_size=image_size,
            num_classes=settings.get("num_classes"),
            scale_jitter=0.0,
            workers=None,
        )
    )
    cached = open_dataset(data_dir=cache, **settings)
    result = {
        "photographs": f"{width} x {height} {extension}",
        "image_size": image_size,
        "stages_ms": stage_costs(dataset),
        "cached_stages_ms": stage_costs(cached),
    }
    endless = RandomSampler(dataset, replacement=True, num_samples=10**9)
    plain = iter(DataLoader(PlainPillow(dataset), 4, sampler=endless))
    with (
        training_batches(dataset, batch_size=4, num_workers=0) as loader,
        training_batches(cached, batch_size=4, num_workers=0) as from_cache,
    ):
        variants = {"loader": loader, "plain": plain, "cached": from_cache}
        takes = {name: partial(next, batches) for name, batches in variants.items()}
        result["samples_per_second"] = rates(takes, 4, options)
    return result


def table(results: dict[str, dict]) -> str:
    lines = ["| data | photographs | size | decode | maps | resize | samples/s | against plain | with cache |"]
    lines.append("|---" * 9 + "|")
    for name, result in results.items():
        stages, rate = result["stages_ms"].values(), result["samples_per_second"]
        cells = [name, result["photographs"], str(result["image_size"]), *(f"{ms:.1f} ms" for ms in stages)]
        cells += [
            f"{rate['loader']:.0f}",
            f"{rate['loader'] / rate['plain']:.2f} x",
            f"{rate['cached'] / rate['loader']:.2f} x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="which of them, separated by commas")
    parser.add_argument("--data_dir", type=Path, help="real data for the one size named in --sizes")
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--batches", type=int, default=6, help="batches of 4 in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results_path", default=os.path.join("OUTPUT", "benchmarks", "loader.json"))
    options = parser.parse_args(arguments)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes.split(","):
            root = options.data_dir or Path(folder) / name / "data"
            if options.data_dir is None:
                draw_scenes(root, name, options.scenes)
            results[name] = measure(name, root, Path(folder) / name, options)
    print(table(results))
    os.makedirs(os.path.dirname(os.path.abspath(options.results_path)), exist_ok=True)
    with open(options.results_path, "w") as file:
        json.dump({"cores": available_cores(), "pillow": Image.__version__, "results": results}, file, indent=1)
    print(f"written to {options.results_path}")


if __name__ == "__main__":
    main()
