"""Compares guidance methods on the CamVid run of scripts/camvid.sh: obedience against looks, a curve for each method.

    python benchmarks/guidance.py --out OUTPUT/camvid-cpu --ema 0.995 --steps 3600 --precision bf16 --ranks 2

Samples the validation layouts with equal seeds, a row for each setting (`compared`) and for each further one, as
--row "apg s=3 apg_radius=5 guidance_interval=0.1,0.8": a method, and settings of image_sample.py. Scores as
benchmarks/camvid.py does, and two figures of colour: `saturation`, the mean of HSV's over all pixels, and `contrast`,
the standard deviation of a picture's brightness (0 to 255), in the mean over pictures; both also over those of the
photographs. Writes OUT/guidance.json, the table OUT/guidance.md and the plot OUT/guidance.png. Started again, it makes
and scores only what is missing: rows may be added one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from camvid import ROOT, Row, compare, row_scores
from PIL import Image

SCALES = (1.5, 2.0, 3.0, 4.0)
INTERVAL = "0.1,0.8"
# What is looked for, pictures that obey and look like photographs: mIoU at least, feature distance at most.
WANTED = (55.0, 5.0)


def compared(ema: str, steps: int) -> list[Row]:
    """The rows of the comparison; those of one group are a curve over the guidance scale."""
    best, trained = f"finetune/ema_{ema}_best.pt", f"train/ema_{ema}_{steps:06d}.pt"
    early = f"train/ema_{ema}_{steps // 4:06d}.pt"
    rows = [Row("none", "s = 1", best, s=1.0)]
    for method in ("cfg", "rescale", "apg"):
        rows += [Row(method, f"s = {s:g}", best, s=s, options=method_flags(method)) for s in SCALES]
    auto = method_flags("autoguidance")
    for group, checkpoint in (("autoguidance", best), ("autoguidance, not fine-tuned", trained)):
        rows += [Row(group, f"s = {s:g}", checkpoint, s=s, options=auto, guide=early) for s in SCALES[:3]]
    for method in ("cfg", "apg"):
        options = (*method_flags(method), ("guidance_interval", INTERVAL))
        rows += [Row(f"{method}, {INTERVAL}", f"s = {s:g}", best, s=s, options=options) for s in SCALES[1:]]
    return rows


def method_flags(method: str) -> tuple[tuple[str, str], ...]:
    """Of cfg none, so that the samples of benchmarks/camvid.py are found."""
    return () if method == "cfg" else (("guidance", method),)


def further_row(text: str, ema: str, steps: int) -> Row:
    """The row that a `--row` describes: "METHOD s=S NAME=VALUE ...". :raises ValueError: no such form."""
    method, *parts = text.split() or [""]
    if not method or "=" in method or not all("=" in part for part in parts):
        raise ValueError(f"--row {text!r} must be METHOD s=S NAME=VALUE ..., as 'apg s=3 apg_radius=5'")
    values = dict(part.split("=", 1) for part in parts)
    s = float(values.pop("s", "1.5"))
    guide = values.pop("guide", f"train/ema_{ema}_{steps // 4:06d}.pt") if method == "autoguidance" else ""
    group = ", ".join([method, *(f"{name} {value}" for name, value in values.items())])
    sampler, count = values.pop("sampler", Row.sampler), int(values.pop("num_steps", Row.steps))
    options = (*method_flags(method), *values.items())
    return Row(group, f"s = {s:g}", f"finetune/ema_{ema}_best.pt", s, sampler, count, options=options, guide=guide)


def colours(folder: Path) -> dict[str, float]:
    """Mean saturation (0 to 1) and contrast (0 to 255) of the pictures in a folder."""
    saturations, contrasts = [], []
    for path in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)
        most = pixels.max(axis=2)
        saturations.append(((most - pixels.min(axis=2)) / np.maximum(most, 1)).mean())
        contrasts.append((pixels @ [0.299, 0.587, 0.114]).std())  # brightness as BT.601 weighs it
    return {"saturation": float(np.mean(saturations)), "contrast": float(np.mean(contrasts))}


def scores(results: Path, args: argparse.Namespace) -> dict[str, float]:
    """All figures of a results folder; read from it where it was scored before, with this network."""
    report = results / "guidance_scores.json"
    digest = hashlib.sha256(args.segmenter.read_bytes())
    for path in sorted((results / "samples").glob("*.png")):
        digest.update(path.name.encode() + path.read_bytes())
    key = digest.hexdigest()
    if report.is_file() and (known := json.loads(report.read_text()))["of"] == key:
        return known["scores"]
    samples, photographs = colours(results / "samples"), colours(results / "images")
    found = {**row_scores(results, args), **samples}
    found |= {f"{name}_of_photographs": value for name, value in photographs.items()}
    found |= {f"{name}_ratio": samples[name] / max(value, 1e-9) for name, value in photographs.items()}
    report.write_text(json.dumps({"of": key, "scores": found}, indent=1) + "\n")
    return found


def settings(row: Row) -> dict:
    """What the record of a row says of it."""
    record = {"group": row.group, "name": row.name, "s": row.s, "checkpoint": row.checkpoint, "guide": row.guide}
    return {**record, "options": dict(row.options)}


def wanted(record: dict) -> bool:
    """Whether a row has what is looked for: it obeys, and looks like photographs in distance and detail."""
    return record["miou"] >= WANTED[0] and record["feature_distance"] <= WANTED[1] and 0.9 <= record["detail"] <= 1.1


def table(figures: dict) -> str:
    """The figures as Markdown; rows that have what is looked for are marked."""
    rows = figures["rows"]
    unit = next((row["seconds_per_image"] for row in rows if (row["group"], row["s"]) == ("cfg", 1.5)), None)
    unit = unit or rows[0]["seconds_per_image"]
    lines = ["| | | mIoU | pixel accuracy | feature distance | detail | saturation | contrast | time per image |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    before = ""
    for row in rows:
        mark = " *" if wanted(row) else ""
        lines.append(
            f"| {row['group'] if row['group'] != before else ''} | {row['name']}{mark} | {row['miou']:.1f} | "
            f"{row['pixel_accuracy']:.1f} | {row['feature_distance']:.3f} | {row['detail']:.2f} | "
            f"{row['saturation_ratio']:.2f} | {row['contrast_ratio']:.2f} | {row['seconds_per_image'] / unit:.2f} |"
        )
        before = row["group"]
    first = rows[0]
    lines += [
        "",
        f"{first['layouts']} layouts, {figures['steps']} training steps, seed {figures['seed']}. Detail, saturation "
        f"and contrast are over the photographs' ({first['saturation_of_photographs']:.3f} and "
        f"{first['contrast_of_photographs']:.1f}). A star: mIoU of at least {WANTED[0]:g}, a distance of at most "
        f"{WANTED[1]:g}, detail of 0.9 to 1.1.",
    ]
    return "\n".join(lines) + "\n"


def plot(figures: dict, path: Path) -> None:
    """mIoU against feature distance, a curve a method; the corner that is looked for is shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list[dict]] = {}
    for row in figures["rows"]:
        groups.setdefault(row["group"], []).append(row)
    figure, axis = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    for number, (group, rows) in enumerate(groups.items()):
        rows = sorted(rows, key=lambda row: row["s"])
        points = [(row["feature_distance"], row["miou"]) for row in rows]
        style = "--" if "," in group else "-"
        axis.plot(*zip(*points, strict=True), f"o{style}", label=group, color=f"C{number % 10}", alpha=0.85, ms=4)
        for point, row in zip(points, rows, strict=True):
            axis.annotate(f"{row['s']:g}", point, (4, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.08)
    low, high = axis.get_xlim()[0], axis.get_ylim()[1]
    axis.fill_between([low, WANTED[1]], WANTED[0], max(high, WANTED[0] + 1), color="0.9", zorder=0)
    axis.set_xlim(left=low)
    axis.set_xlabel("feature distance (lower looks more like photographs)")
    axis.set_ylabel("mIoU, % (higher obeys the layout better)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(f"Guidance on CamVid, {figures['rows'][0]['layouts']} layouts, seed {figures['seed']}; numbers: s")
    figure.savefig(path, dpi=110)


def commit() -> str:
    """The commit of this checkout, empty where that cannot be told."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "OUTPUT" / "camvid-cpu", help="what scripts/camvid.sh wrote")
    parser.add_argument("--ema", required=True, help="the EMA rate that was trained with")
    parser.add_argument("--steps", type=int, required=True, help="the training steps")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--row", action="append", default=[], help="a further row: METHOD s=S NAME=VALUE ...")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.segmenter = args.out / "segmenter.pt"
    try:
        rows = compared(args.ema, args.steps) + [further_row(text, args.ema, args.steps) for text in args.row]
    except ValueError as error:
        parser.error(str(error))
    needed = {args.out / path for row in rows for path in (row.checkpoint, row.guide) if path}
    if missing := sorted(str(path) for path in {*needed, args.segmenter} if not path.is_file()):
        parser.error(f"{missing[0]} is not there: run scripts/camvid.sh first, or name its --out, --ema and --steps")
    config = json.loads((args.out / "finetune" / "config.json").read_text())
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/guidance.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "model": config["model"],
        "diffusion": config["diffusion"],
        "steps": args.steps,
        "seed": config["training"]["seed"],
        "rows": compare(rows, args, scores, settings),
    }
    (args.out / "guidance.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.out / "guidance.md").write_text(table(figures))
    plot(figures, args.out / "guidance.png")
    print(table(figures))
    print(f"figures: {args.out / 'guidance.json'}, {args.out / 'guidance.md'}\nplot: {args.out / 'guidance.png'}")


if __name__ == "__main__":
    main()
