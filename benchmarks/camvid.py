"""Scores the CamVid run of scripts/camvid.sh and compares settings, one row each with its cost.

    python benchmarks/camvid.py --out OUTPUT/camvid-cpu --ema 0.995 --steps 3600 --precision bf16 --ranks 2

Reads the checkpoints and samples in OUT, makes the samples of the comparison in OUT/compared (what is there is not made
again), and writes OUT/figures.json, the tables OUT/figures.md and the plot OUT/quality.png. FID and LPIPS are scored
where their networks' weights can be had. mIoU, pixel accuracy, feature distance and feature diversity are by the
network of benchmarks/segmenter.py, trained on the same photographs: they compare rows of one table, nothing else.
Detail is the samples' finest contrast over the photographs'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts" / "data"))

from preparation import link_or_copy  # noqa: E402

UNLABELLED = 11


@dataclass(frozen=True)
class Row:
    """One setting: what the table says of it, the checkpoint below OUT, and the flags that differ."""

    group: str
    name: str
    checkpoint: str
    s: float = 1.5
    sampler: str = "dpmsolver++"
    steps: int = 20
    subset: bool = False
    options: tuple[tuple[str, str], ...] = ()  # further flags of image_sample.py, and their values
    guide: str = ""  # a checkpoint below OUT that guides

    @property
    def folder(self) -> str:
        """A name that tells the settings."""
        checkpoint, guide = (path.removesuffix(".pt").replace("/", "_") for path in (self.checkpoint, self.guide))
        more = "".join(f"_{name}{value}" for name, value in (*self.options, *([("by_", guide)] if guide else [])))
        return f"{checkpoint}_s{self.s:g}_{self.sampler}_{self.steps}{more}" + ("_subset" if self.subset else "")


def compared(ema: str, steps: int) -> list[Row]:
    """The rows of the comparison."""
    best = f"finetune/ema_{ema}_best.pt"
    trained, quarter = f"train/ema_{ema}_{steps:06d}.pt", f"ema_{ema}_{steps // 4:06d}.pt"
    last = f"{steps // 6:06d}"  # of fine-tuning, as scripts/camvid.sh runs it
    rows = [Row("guidance scale", f"s = {s:g}", best, s=s) for s in (1.0, 1.5, 2.0, 3.0)]
    rows += [Row("fine-tuning with label drop", f"without, s = {s:g}", trained, s=s) for s in (1.0, 1.5)]
    rows += [Row("fine-tuning with label drop", "with, s = 1.5", best)]
    rows += [Row("weights", "raw", "finetune/model.pt"), Row("weights", f"EMA {ema}", f"finetune/ema_{ema}_{last}.pt")]
    weighting = f"loss weighting, after {steps // 4} steps"
    rows += [
        Row(weighting, kind, f"{run}/{quarter}", s=1.0) for kind, run in (("none", "train"), ("min-SNR", "min_snr"))
    ]
    solvers = [("dpmsolver++", 10), ("dpmsolver++", 20), ("dpmsolver++", 50), ("ddim", 50), ("ddpm", 1000)]
    rows += [
        Row("solver and steps", f"{sampler}, {count}", best, sampler=sampler, steps=count, subset=True)
        for sampler, count in solvers
    ]
    return rows


def run(command: list, **options) -> subprocess.CompletedProcess:
    """A script of this repository, from its root."""
    command = [str(part) for part in command]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True, **options)


def sample(row: Row, args: argparse.Namespace) -> Path:
    """Samples the validation layouts with a row's settings; returns the results folder."""
    results = args.out / "compared" / row.folder
    data = args.out / ("subset" if row.subset else "data")  # 1000 steps of all layouts would take long
    launcher = ["mpiexec", "-n", args.ranks] if args.ranks > 1 else []
    command = [*launcher, sys.executable, "image_sample.py", "--model_path", args.out / row.checkpoint]
    command += ["--data_dir", data, "--results_path", results, "--batch_size", args.batch_size]
    command += ["--precision", args.precision, "--s", row.s, "--sampler", row.sampler, "--num_steps", row.steps]
    command += [part for name, value in row.options for part in (f"--{name}", value)]
    command += ["--guide_path", args.out / row.guide] if row.guide else []
    run(command)
    return results


def segmentation_score(results: Path, samples: str, segmenter: Path, unlabelled: int = UNLABELLED) -> dict[str, float]:
    """evaluations/miou.py: mean IoU and pixel accuracy, percent, of a sub-folder of images against `labels/`.

    :param unlabelled: the last class, which is not scored.
    """
    report = results / f"miou_{samples}.json"
    run(
        [sys.executable, "evaluations/miou.py", results, "--samples", samples, "--segmenter", segmenter,
         "--num_classes", unlabelled + 1, "--ignore_ids", unlabelled, "--json", report],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    scores = json.loads(report.read_text())
    return {"miou": scores["score"], "pixel_accuracy": scores["pixel_accuracy"]}


def feature_score(results: Path, segmenter: Path) -> dict[str, float]:
    """benchmarks/segmenter.py score."""
    report = results / "features.json"
    command = [sys.executable, "benchmarks/segmenter.py", "score", results, "--segmenter", segmenter]
    run([*command, "--json", report], stdout=subprocess.DEVNULL)
    scores = json.loads(report.read_text())
    return {key: value for key, value in scores.items() if key.startswith(("feature_", "detail"))}


def published_score(command: list, report: Path) -> float | None:
    """A score that needs downloaded weights; None, and the reason on the screen, where there are none."""
    done = subprocess.run(
        [sys.executable, *map(str, command), "--json", str(report)], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    if done.returncode:
        _, _, reason = done.stderr.strip().rpartition("error: ")
        print(f"{command[0]} is left out: {reason}")
        return None
    return json.loads(report.read_text())["score"]


def main_scores(args: argparse.Namespace) -> dict[str, dict]:
    """The fine-tuned network at the default settings, on both splits, beside real photographs."""
    scores = {}
    for split in ("val", "test"):
        results = args.out / "results" / split
        inception = ["evaluations/test_with_FID.py", results / "images", results / "samples"]
        scores[split] = {
            "layouts": len(list((results / "samples").glob("*.png"))),
            **segmentation_score(results, "samples", args.segmenter),
            **feature_score(results, args.segmenter),
            "fid": published_score(inception, results / "fid.json"),
            "photographs": segmentation_score(results, "images", args.segmenter),
        }
    several = args.out / "results" / "several"
    alexnet = ["evaluations/lpips.py", several]
    scores["several"] = {
        **feature_score(several, args.segmenter),
        "lpips": published_score(alexnet, several / "lpips.json"),
        "feature_diversity_of_other_scenes": between_scenes(args),
    }
    # the distance between two sets of real photographs of other streets: what a small distance is
    both = args.out / "compared" / "val_and_test"
    for name, split in (("images", "val"), ("samples", "test")):
        (both / name).mkdir(parents=True, exist_ok=True)
        for file in (args.out / "results" / split / "images").glob("*.png"):
            link_or_copy(file, both / name / file.name)
    scores["photographs_val_and_test"] = feature_score(both, args.segmenter)
    return scores


def between_scenes(args: argparse.Namespace) -> float:
    """Feature diversity of ten samples of ten different layouts: the upper end of the scale."""
    folder = args.out / "compared" / "other_scenes"
    files = sorted((args.out / "results" / "val" / "samples").glob("*.png"))
    for shift in range(10):
        (folder / f"samples_{shift:02d}").mkdir(parents=True, exist_ok=True)
        for index, file in enumerate(files):
            link_or_copy(files[(index + 10 * shift) % len(files)], folder / f"samples_{shift:02d}" / file.name)
    (folder / "images").mkdir(exist_ok=True)
    for file in (args.out / "results" / "val" / "images").glob("*.png"):
        link_or_copy(file, folder / "images" / file.name)
    return feature_score(folder, args.segmenter)["feature_diversity"]


def row_scores(results: Path, args: argparse.Namespace) -> dict[str, float]:
    """The figures of a row's samples."""
    return {**segmentation_score(results, "samples", args.segmenter), **feature_score(results, args.segmenter)}


def row_settings(row: Row) -> dict:
    """What the record of a row says of it."""
    return {"group": row.group, "name": row.name, "s": row.s, "sampler": row.sampler, "steps": row.steps}


def compare(
    rows: list[Row],
    args: argparse.Namespace,
    score: Callable[[Path, argparse.Namespace], dict] = row_scores,
    settings: Callable[[Row], dict] = row_settings,
) -> list[dict]:
    """A record per row: its settings, scores and seconds per image."""
    records, known = [], {}
    for row in rows:
        if row.folder not in known:
            results = sample(row, args)
            made = json.loads((results / "sampling.json").read_text())["run"]["made"]
            known[row.folder] = {
                **score(results, args),
                "seconds_per_image": made["seconds"] / made["images"],
                "layouts": len(list((results / "samples").glob("*.png"))),
            }
        records.append({**settings(row), **known[row.folder]})
        print(json.dumps(records[-1]), flush=True)
    return records


def tables(figures: dict) -> str:
    """The figures as Markdown."""
    scores = figures["scores"]
    lines = ["| | layouts | mIoU | pixel accuracy | feature distance | detail | FID |", "|---|---|---|---|---|---|---|"]
    for split in ("val", "test"):
        row = scores[split]
        fid = "weights not at hand" if row["fid"] is None else f"{row['fid']:.1f}"
        lines.append(
            f"| samples, {split} | {row['layouts']} | {row['miou']:.1f} | {row['pixel_accuracy']:.1f} | "
            f"{row['feature_distance']:.3f} | {row['detail']:.2f} | {fid} |"
        )
        real = row["photographs"]
        distance = f"{scores['photographs_val_and_test']['feature_distance']:.3f} (val against test)"
        lines.append(
            f"| photographs, {split} | {row['layouts']} | {real['miou']:.1f} | {real['pixel_accuracy']:.1f} | "
            f"{distance if split == 'val' else ''} | 1 | |"
        )
    several = scores["several"]
    lpips = "weights not at hand" if several["lpips"] is None else f"{several['lpips']:.3f}"
    lines += [
        "",
        f"Diversity of ten samples per layout: {several['feature_diversity']:.4f}, of ten samples of other layouts "
        f"{several['feature_diversity_of_other_scenes']:.4f} (features of the segmentation network). LPIPS: {lpips}.",
    ]
    default = next(r for r in figures["rows"] if r["name"] == "s = 1.5")["seconds_per_image"]
    lines += ["", "| | | mIoU | pixel accuracy | feature distance | detail | time per image |"]
    lines += ["|---|---|---|---|---|---|---|"]
    before = ""
    for row in figures["rows"]:
        time = f"{row['seconds_per_image'] / default:.2f}"
        time += f" ({row['seconds_per_image']:.3f} s)" if figures["device"] != "cpu" else ""
        lines.append(
            f"| {row['group'] if row['group'] != before else ''} | {row['name']} | {row['miou']:.1f} | "
            f"{row['pixel_accuracy']:.1f} | {row['feature_distance']:.3f} | {row['detail']:.2f} | {time} |"
        )
        before = row["group"]
    return "\n".join(lines) + "\n"


def plot(figures: dict, path: Path) -> None:
    """Quality against time per image, of solvers and steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in figures["rows"] if row["group"] == "solver and steps"]
    seconds = figures["device"] != "cpu"
    unit = 1 if seconds else min(row["seconds_per_image"] for row in rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, key, label in (
        (axes[0], "pixel_accuracy", "pixel accuracy, % (higher is better)"),
        (axes[1], "feature_distance", "feature distance (lower is better)"),
    ):
        for sampler, style, side in (("dpmsolver++", "o-", 8), ("ddim", "s", -20), ("ddpm", "D", 8)):
            points = [(row["seconds_per_image"] / unit, row[key]) for row in rows if row["sampler"] == sampler]
            axis.plot(*zip(*points, strict=True), style, label=sampler, alpha=0.85)
            for point, steps in zip(points, (r["steps"] for r in rows if r["sampler"] == sampler), strict=True):
                axis.annotate(str(steps), point, (side, 3), textcoords="offset points")
        axis.set_xscale("log")
        axis.margins(0.25, 0.3)
        if key == "feature_distance":
            axis.set_ylim(bottom=0)
        else:  # so that differences of a few tenths look as small as they are
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, (low + high) / 2 - 3), max(high, (low + high) / 2 + 3))
        axis.set_xlabel("seconds per image" if seconds else "time per image, shortest = 1")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, title="sampler, and its steps")
    figure.suptitle(f"Solvers and steps on CamVid, {rows[0]['layouts']} layouts, s = 1.5")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "OUTPUT" / "camvid-cpu", help="what scripts/camvid.sh wrote")
    parser.add_argument("--ema", required=True, help="the EMA rate that was trained with")
    parser.add_argument("--steps", type=int, required=True, help="the training steps")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.segmenter = args.out / "segmenter.pt"
    config = json.loads((args.out / "finetune" / "config.json").read_text())
    figures = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "model": config["model"],
        "diffusion": config["diffusion"],
        "steps": args.steps,
        "seed": config["training"]["seed"],
        "scores": main_scores(args),
        "rows": compare(compared(args.ema, args.steps), args),
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.out / "figures.md").write_text(tables(figures))
    plot(figures, args.out / "quality.png")
    print(tables(figures))
    print(f"figures: {args.out / 'figures.json'}, {args.out / 'figures.md'}\nplot: {args.out / 'quality.png'}")


if __name__ == "__main__":
    main()
