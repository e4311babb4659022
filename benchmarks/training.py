"""How fast training is, in how much memory, against the plain way (plain_training.py), improvement by improvement.

    python benchmarks/training.py                        64 px, 64 channels, 151 classes: minutes on two CPU cores
    python benchmarks/training.py --device cuda          the published ADE20K network: 256 px, 256 channels
    python benchmarks/training.py --device cuda --size cpu   the small one, to try it

Every variant has a process of its own, as a user's run has. On a CPU they take a few steps in turn, round after round,
so that a busy machine slows all of them alike. A GPU does not hold them all: there one runs after the other, and the
plain way once more at the end; a variant that fails, as for want of memory, is told and left out. Ratios compare
medians. Ends with 1 against 2 ranks at an equal global batch, through image_train.py, where there are 2 GPUs. Writes a
table, JSON and a plot.

The layouts are drawn: 20 regions at 64 pixels, 48 at 256. How many of their neighbourhoods are distinct, on which the
engine's speed depends, is printed beside the table (`--labels DIR` prints it of a folder of label maps, and ends).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plain_training import IMPROVEMENTS, PlainTraining
from tqdm import tqdm

from guided_diffusion.hosts.numerics import set_numerics

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 151
SIZES = {
    # the published proportions, at a quarter of the width and the side
    "cpu": dict(
        image_size=64, num_channels=64, num_res_blocks=1, channel_mult="1,1,2,2",
        attention_resolutions="32,16,8", num_head_channels=64, resblock_updown=True,
    ),
    "published": dict(
        image_size=256, num_channels=256, num_res_blocks=2, channel_mult="1,1,2,2,4,4",
        attention_resolutions="32,16,8", num_head_channels=64, resblock_updown=True,
    ),
}  # fmt: skip
SETTINGS = dict(num_classes=CLASSES, learn_sigma=True, diffusion_steps=1000, noise_schedule="linear")
PRECISIONS = ("fp32", "bf16", "fp16")
LAYOUT_LOOKUP = {"": "auto", "convolved": "false", "looked_up": "true"}  # by what follows the precision in a key
REGIONS = {64: 20, 256: 48}  # by image size; see `distinct_shares`


def draw_data(folder: Path, side: int, count: int = 32) -> None:
    """Photographs of noise; labels of 151 classes and instances: regions around random points."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:side, :side][..., None]
    for split, number in (("train", count), ("val", 1)):
        for kind in ("images", "labels", "instances"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            photograph = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            y, x = side * rng.random((2, REGIONS[side]))
            region = ((row - y) ** 2 + (column - x) ** 2).argmin(axis=2).astype(np.uint8)
            labels = rng.integers(0, CLASSES, REGIONS[side], dtype=np.uint8)[region]
            for kind, pixels in (("images", photograph), ("labels", labels), ("instances", region)):
                Image.fromarray(pixels).save(folder / split / kind / f"{i:03d}.png")


def variants(device: torch.device, precisions: list[str]) -> dict[str, str]:
    """Key -> description. "plain", then with improvements added one after the other, then the engine itself, as it
    chooses for the device, and with the layout looked up instead of convolved or the other way round."""
    names = {"plain": "plain guided-diffusion way"}
    names |= {improvement: "+ " + text for improvement, text in IMPROVEMENTS.items()}
    otherwise = "convolved" if device.type == "cpu" else "looked_up"
    for precision in precisions:
        names[precision] = f"the engine, {precision}"
        names[f"{precision}_{otherwise}"] = f"the engine, {precision}, layout_lookup {LAYOUT_LOOKUP[otherwise]}"
    return names


def make_variant(key: str, data: Path, size: str, batch_size: int, device: torch.device, scratch: Path):
    """An object with `step()` and, after a step, `bytes_sent`."""
    from guided_diffusion.image_datasets import open_dataset
    from guided_diffusion.script_util import build_config
    from guided_diffusion.settings import DiffusionConfig, ModelConfig

    model = build_config(ModelConfig, SIZES[size] | SETTINGS)
    diffusion = build_config(DiffusionConfig, SETTINGS)
    dataset = open_dataset(
        data_dir=data, dataset_mode="custom", split="train", image_size=model.image_size, num_classes=CLASSES
    )
    precision, _, way = key.partition("_")
    if precision in PRECISIONS:
        return Engine(model, diffusion, dataset, batch_size, precision, LAYOUT_LOOKUP[way], scratch)
    order = ["plain", *IMPROVEMENTS]
    improved = set(order[1 : order.index(key) + 1])
    return PlainTraining(model, diffusion, dataset, batch_size, device, improved)


class Engine:
    """The training loop itself, step by step."""

    def __init__(self, model, diffusion, dataset, batch_size: int, precision: str, layout_lookup: str, scratch: Path):
        from guided_diffusion.dist_util import World
        from guided_diffusion.image_datasets import training_batches
        from guided_diffusion.logger import Logger
        from guided_diffusion.objectives.denoising import Denoising
        from guided_diffusion.script_util import create_gaussian_diffusion, create_model
        from guided_diffusion.settings import TrainConfig
        from guided_diffusion.train_util import prepare_training

        torch.manual_seed(0)
        world = World()
        self.loop = prepare_training(
            model=create_model(model, diffusion.learn_sigma),
            objective=Denoising(create_gaussian_diffusion(diffusion)),
            diffusion_config=diffusion,
            dataset=dataset,
            validation=None,
            config=TrainConfig(batch_size=batch_size, precision=precision, layout_lookup=layout_lookup),
            num_workers=2,
            world=world,
            logger=Logger(str(scratch / precision), active=False),
            logdir=str(scratch / precision),
            record={"model": dataclasses.asdict(model)},
        )
        self.loop.trainer.log_loss_scale = min(self.loop.trainer.log_loss_scale, 10.0)  # as after the first steps
        self.batches = training_batches(
            dataset, batch_size=batch_size, num_workers=2, pin_memory=world.device.type == "cuda"
        )

    def step(self) -> None:
        batch = next(self.batches)
        self.bytes_sent = sum(batch[name].nbytes for name in ("image", "label", "instance"))
        self.loop.train_step(batch)


def timed_step(variant, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    since = time.perf_counter()
    variant.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - since


class Variant:
    """A variant in a process of its own; it is built, has taken its first steps, and waits.

    `record` has `peak_gib`, of the GPU or of the process above its start, and `bytes_sent` per step.
    """

    def __init__(self, key: str, args: argparse.Namespace, data: Path):
        command = [sys.executable, __file__, "--alone", key, "--data", str(data), "--device", args.device]
        command += ["--size", args.size, "--batch_size", str(args.batch_size), "--threads", str(args.threads)]
        self.errors = data.parent / f"{key}.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                env=_environment(args.device, args.threads),
            )  # fmt: skip
        self.record = self._answer()

    def seconds(self) -> float:
        """Of one step; on a CPU after one that is not timed: a process that has waited begins with cold caches.

        :raises RuntimeError: the process has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # it has ended; the answer tells why
            self.process.stdin.write("step\n")
        return self._answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"{self.errors.stem} ended with status {status}: {self.errors.read_text()[-2000:]}")
        return json.loads(line)


def serve(key: str, args: argparse.Namespace) -> None:
    """What `Variant` starts and asks: prints its record, then the seconds of a step for every line it reads."""
    device = torch.device(args.device)
    before = _peak_resident()
    with tempfile.TemporaryDirectory() as scratch:
        variant = make_variant(key, Path(args.data), args.size, args.batch_size, device, Path(scratch))
        for _ in range(2):  # the second has the optimizer's averages from the start
            variant.step()
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else _peak_resident() - before
        print(json.dumps({"peak_gib": peak, "bytes_sent": variant.bytes_sent}), flush=True)
        for _ in sys.stdin:
            if device.type == "cpu":
                variant.step()
            print(timed_step(variant, device), flush=True)


def measure(keys: list[str], args: argparse.Namespace, data: Path) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Seconds of every timed step, and the record, of each variant; on a GPU of those that do not fail."""
    seconds: dict[str, list[float]] = {key: [] for key in keys}
    records = {}
    if args.device == "cpu":
        made = {key: Variant(key, args, data) for key in tqdm(keys, desc="starting")}
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for key, variant in made.items():
                seconds[key].append(variant.seconds())
        for key, variant in made.items():
            records[key] = variant.record
            variant.end()
    else:
        for key in tqdm([*keys, "plain"], desc="variants"):
            try:
                variant = Variant(key, args, data)
                seconds[key] += [variant.seconds() for _ in range(args.rounds)]
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            records[key] = variant.record
            variant.end()
    return {key: values for key, values in seconds.items() if values}, records


def distinct_shares(folder: Path, side: int, images: int = 16, batch_size: int = 4) -> list[float]:
    """Of the 5x5 neighbourhoods in batches of a folder's label maps, how many are distinct: at `side` pixels, and at a
    half, a quarter and an eighth of that. Edges are those between classes."""
    from guided_diffusion.layouts.encode import instance_edges

    files = sorted(folder.rglob("*.png"))
    if not files:
        raise SystemExit(f"error: no label maps (PNG) in {folder}")
    files = files[:: max(1, len(files) // images)][:images]
    maps = [np.asarray(Image.open(path).resize((side, side), Image.Resampling.NEAREST)) for path in files]
    if any(ids.ndim != 2 for ids in maps):
        raise SystemExit(f"error: label maps hold one id per pixel; those in {folder} have colours")
    labels = torch.from_numpy(np.stack(maps).astype(np.int64))[:, None]
    kinds = 2 * labels + instance_edges(labels)
    shares = []
    for step in (1, 2, 4, 8):
        batches = torch.nn.functional.pad(kinds[..., ::step, ::step], (2, 2, 2, 2), value=-1).split(batch_size)
        cut = [batch.unfold(2, 5, 1).unfold(3, 5, 1).reshape(-1, 25) for batch in batches]
        shares.append(statistics.mean(len(torch.unique(pixels, dim=0)) / len(pixels) for pixels in cut))
    return shares


def share_text(shares: list[float], side: int) -> str:
    parts = [f"{share:.0%} at {side // 2**level} px" for level, share in enumerate(shares)]
    return "distinct 5x5 neighbourhoods of the layouts: " + ", ".join(parts)


def _peak_resident() -> float:
    """GiB. Not getrusage's figure, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def measure_ranks(args: argparse.Namespace, data: Path, folder: Path) -> dict[str, float]:
    """Images per second of 1 and 2 ranks at an equal global batch, on a GPU each or on equally many cores in all."""
    rates: dict[str, list[float]] = {"1": [], "2": []}
    for repeat in range(2):
        for ranks in (1, 2):
            logdir = folder / f"ranks{ranks}-{repeat}"
            settings = SIZES[args.size] | SETTINGS | dict(
                data_dir=data, dataset_mode="custom", logdir=logdir, batch_size=args.batch_size // ranks,
                max_steps=20, log_interval=10, num_workers=1, val_images=0,
            )  # fmt: skip
            arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [*launcher, str(ROOT / "image_train.py"), *arguments]
            threads = max(1, args.threads // ranks) if args.device == "cpu" else args.threads
            subprocess.run(command, check=True, capture_output=True, env=_environment(args.device, threads))
            rows = [json.loads(line) for line in (logdir / "progress.jsonl").read_text().splitlines()]
            rates[str(ranks)].append(rows[-1]["images_per_second"])  # steps 11 to 20: after the warm-up
    return {ranks: max(values) for ranks, values in rates.items()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def _environment(device: str, threads: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}  # the engine takes a GPU where there is one
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **hidden}


def reference(measured: dict) -> str:
    """The variant in whose units the others are told: the plain way; the first where that one failed."""
    return "plain" if "plain" in measured else next(iter(measured))


def table(results: dict[str, dict[str, float]], names: dict[str, str]) -> str:
    lines = ["| variant | images/s | times plain | peak GiB | share of plain | bytes/image | share |", "|---" * 7 + "|"]
    plain = results[reference(results)]
    for key, row in results.items():
        lines.append(
            f"| {names[key]} | {row['images_per_second']:.2f} | {row['speedup']:.2f} | {row['peak_gib']:.2f} | "
            f"{row['peak_gib'] / plain['peak_gib']:.2f} | {row['bytes_per_image']:,.0f} | "
            f"1/{plain['bytes_per_image'] / row['bytes_per_image']:.0f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, float]], names: dict[str, str], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(results)
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.42 * len(keys) + 1.4), sharey=True, layout="constrained")
    colours = ["#b8b8b8" if key == "plain" else "#1f6f8b" if key in PRECISIONS else "#8fc1d4" for key in keys]
    memory = {key: row["peak_gib"] / results[reference(results)]["peak_gib"] for key, row in results.items()}
    for axis, values, label in (
        (axes[0], [results[key]["speedup"] for key in keys], "speed, times the plain way (higher is better)"),
        (axes[1], [memory[key] for key in keys], "peak memory, share of the plain way's (lower is better)"),
    ):
        bars = axis.barh(range(len(keys)), values, color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=4)
        axis.axvline(1.0, color="#606060", linewidth=0.8, linestyle="--")
        axis.set_xlim(0, 1.15 * max(values))
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(keys)), [names[key] for key in keys])
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=tuple(SIZES), help="default: cpu on a CPU, published on a GPU")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores of each process")
    parser.add_argument(
        "--precisions", default="", help="default: fp32,bf16 on a CPU, where fp16 is slow; all on a GPU"
    )
    parser.add_argument("--only", default="", help="these variants, for example plain,fp32,bf16")
    parser.add_argument(
        "--ranks", type=int, default=1, help="0: leave out 1 against 2 ranks, for which a machine has too few GPUs"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training_DEVICE.json, .png beside it")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="print how alike the label maps of DIR are, and end")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    parser.add_argument("--data", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or ("cpu" if args.device == "cpu" else "published")
    args.precisions = args.precisions or ("fp32,bf16" if args.device == "cpu" else "fp32,bf16,fp16")
    args.out = args.out or ROOT / "benchmarks" / "results" / f"training_{args.device}.json"
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    set_numerics()
    if args.alone:
        return serve(args.alone, args)
    side = SIZES[args.size]["image_size"]
    if args.labels:
        return print(share_text(distinct_shares(args.labels, side), side))
    device = torch.device(args.device)
    names = variants(device, args.precisions.split(","))
    keys = args.only.split(",") if args.only else list(names)
    if unknown := sorted(set(keys) - set(names)):
        raise SystemExit(f"error: no variant {', '.join(unknown)}; choose from {', '.join(names)}")
    keys = ["plain", *(key for key in keys if key != "plain")]  # what the others are compared with
    with tempfile.TemporaryDirectory() as temporary:
        data, scratch = Path(temporary) / "data", Path(temporary)
        draw_data(data, side)
        seconds, alone = measure(keys, args, data)
        if not seconds:
            raise SystemExit("error: every variant failed, for the reasons above")
        if "plain" not in seconds:
            print(f"the plain way failed: ratios are to {names[reference(seconds)]}")
        fastest = min(seconds[reference(seconds)])
        results = {}
        for key in seconds:
            median = statistics.median(seconds[key])
            results[key] = dict(
                seconds_per_step=median,
                fastest=min(seconds[key]),
                images_per_second=args.batch_size / median,
                speedup=statistics.median(seconds[reference(seconds)]) / median,
                speedup_of_fastest=fastest / min(seconds[key]),
                peak_gib=alone[key]["peak_gib"],
                bytes_per_image=alone[key]["bytes_sent"] / args.batch_size,
            )
        machine = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()
        title = f"Training at {side} px, {CLASSES} classes, batch {args.batch_size}, on " + (
            machine if device.type == "cuda" else f"{args.threads} CPU core{'s' * (args.threads > 1)}"
        )
        shares = distinct_shares(data / "train" / "labels", side)
        print(title, table(results, names), share_text(shares, side), sep="\n")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(
            command=" ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
            machine=machine, torch=torch.__version__, network=SIZES[args.size] | SETTINGS, batch_size=args.batch_size,
            distinct_shares=shares, results=results, seconds=seconds,
        )  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        plot(results, names, title, args.out.with_suffix(".png"))
        print(f"{args.out}, {args.out.with_suffix('.png')}")
        if args.ranks and (device.type == "cpu" or torch.cuda.device_count() > 1):
            ranks = measure_ranks(args, data, scratch)
            print(
                f"1 rank: {ranks['1']:.2f} images/s; 2 ranks, equal global batch and cores: {ranks['2']:.2f} images/s"
            )
            args.out.write_text(json.dumps(record | {"images_per_second_of_ranks": ranks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
