"""What is a network of other photographs and other classes worth? --transfer_from, measured on CamVid.

    CAMVID=path/to/CamVid; python benchmarks/transfer.py --camvid $CAMVID --out OUTPUT/transfer

A network of scripts/camvid.sh's size (CPU) is trained on CamVid's daylight sequences. It is then adapted to the dusk
sequence, of which 24 photographs are labelled, with five merged and renumbered classes: from its weights with the right
class map, with none, and with a shuffled one, and from new weights; in colour, and in grey. Two seeds each. Nothing
reads the test split. What is there is not made again: a run that was stopped goes on.

Writes OUT/figures.json, OUT/figures.md, the plot OUT/loss.png and the pictures OUT/samples.png. The loss is that of the
validation, on 32 photographs that come half a minute after those of the training. mIoU and feature
distance are by a network of benchmarks/segmenter.py for the new classes, which never sees the photographs of the
validation: they compare rows of one table, nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from camvid import ROOT, feature_score, run, segmentation_score
from PIL import Image
from preparation import link_or_copy
from prepare_camvid import CLASSES, pictures

from guided_diffusion.data.pictures import colorize, contact_sheet, save_png
from guided_diffusion.data.specs import get_spec

SIZE = 48
# new class -> the classes of CamVid that are merged into it; the order is another one, too
MERGED = {
    "surface": ["road", "pavement"],
    "traveller": ["car", "pedestrian", "bicyclist"],
    "greenery": ["tree"],
    "construction": ["building", "pole", "sign", "fence"],
    "above": ["sky"],
}
UNLABELLED = len(MERGED)
DUSK = "0001TP"
TRAINED, HELD_OUT = slice(0, 24), slice(-32, None)  # of the dusk sequence's 62 training photographs, in their order
STEPS, EVERY, LOOKED_AT = 600, 50, (50, 100, 300, 600)
BEGUN, OFTEN = 100, 5  # the first steps from the right class map are measured this often
SEEDS = (0, 1)
NETWORK = (
    "--num_channels 32 --channel_mult 1,2,3,4 --num_res_blocks 1 --attention_resolutions 12,6 --num_head_channels 32"
)
EMA = "0.98"  # a memory of 50 steps, so that an average after 50 is one


@dataclass(frozen=True)
class Start:
    """What an adaptation begins from: weights or none, and the class map beside them."""

    name: str
    weights: bool = True
    class_map: str = ""
    steps: int = STEPS


STARTS = [
    Start("new weights", weights=False),
    Start("right class map", class_map="right.json"),
    Start("no class map", steps=STEPS // 2),
    Start("shuffled class map", class_map="shuffled.json", steps=STEPS // 2),
]


def scenes(camvid: Path, split: str) -> list[tuple[Path, Path]]:
    """(photograph, label map) of a split, in the order of their names."""
    photographs, maps = pictures(camvid / split / "images"), pictures(camvid / split / "labels")
    return [(photographs[name], maps[name]) for name in sorted(photographs)]


def write_data(folder: Path, splits: dict[str, list[tuple[Path, Path]]], description: dict) -> None:
    """A data set of links, for dataset_mode custom."""
    for split, pairs in splits.items():
        for kind, files in zip(("images", "labels"), zip(*pairs, strict=True), strict=True):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            for file in files:
                if not (folder / split / kind / file.name).exists():
                    link_or_copy(file, folder / split / kind / file.name)
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def prepare(args: argparse.Namespace) -> None:
    """The daylight data with CamVid's classes, the dusk data with the merged ones, and the class maps."""
    train, val = scenes(args.camvid, "train"), scenes(args.camvid, "val")
    dusk = [pair for pair in train if pair[0].name.startswith(DUSK)]
    day = [pair for pair in train if pair not in dusk]
    names = [name for name, _ in CLASSES]
    own = {"classes": names, "crop": "keep_aspect", "instances": False}
    remap = {str(names.index(old)): new for new, olds in enumerate(MERGED.values()) for old in olds}
    merged = {**own, "classes": list(MERGED), "remap": remap, "ignore_id": names.index("unlabelled")}
    write_data(args.out / "day", {"train": day, "val": val}, own)
    held_out = dusk[HELD_OUT]
    for name, extra in (("colour", {}), ("grey", {"grey": True})):
        write_data(args.out / name, {"train": dusk[TRAINED], "val": held_out}, merged | extra)
        scored = [pair for pair in train if pair not in held_out]
        write_data(args.out / f"{name}_scored", {"train": scored, "val": held_out}, merged | extra)
    shuffled = dict(zip(MERGED, [*list(MERGED.values())[1:], next(iter(MERGED.values()))], strict=True))
    for name, class_map in (("right", MERGED), ("shuffled", shuffled)):
        (args.out / f"{name}.json").write_text(json.dumps(class_map, indent=1) + "\n")


def segmenter(args: argparse.Namespace, data: str) -> Path:
    """The network that scores the samples of a data set, trained where it is missing."""
    path = args.out / f"segmenter_{data}.pt"
    if not path.exists():
        command = [sys.executable, "benchmarks/segmenter.py", "train", "--data_dir", args.out / f"{data}_scored"]
        run([*command, "--image_size", SIZE, "--out", path])
    return path


def train(
    args: argparse.Namespace, data: str, logdir: Path, steps: int, *flags: object, batch: int, every: int
) -> None:
    """Trains, or goes on; returns when the run has all its steps."""
    ranks = ["mpiexec", "-n", args.ranks] if args.ranks > 1 else []
    fixed = f"--dataset_mode custom --no_instance True --class_cond True --image_size {SIZE} {NETWORK} "
    fixed += "--resblock_updown True --use_scale_shift_norm True --predict_v True --learn_sigma False "
    fixed += "--precision bf16 --loss_weighting none --scale_jitter 0.2 --warmup_steps 100 --lr 5e-4 --log_interval 25"
    command = [*ranks, sys.executable, "image_train.py", *fixed.split(), "--data_dir", args.out / data]
    command += ["--logdir", logdir, "--max_steps", steps, "--batch_size", batch // args.ranks, *flags]
    run([*command, "--save_interval", every, "--val_images", 32, "--num_workers", 1])


def pretrained(args: argparse.Namespace) -> Path:
    """The network of the daylight sequences."""
    train(args, "day", args.out / "pretrained", args.steps, "--ema_rate", "0.995", batch=8, every=args.steps // 8)
    return args.out / "pretrained" / f"ema_0.995_{args.steps:06d}.pt"


def adapt(args: argparse.Namespace, data: str, start: Start, seed: int) -> Path:
    """One adaptation; returns its log directory."""
    logdir = args.out / "adapted" / f"{data}_{start.name.replace(' ', '_')}_seed{seed}"
    flags = ["--transfer_from", pretrained(args)] if start.weights else []
    flags += ["--class_map", args.out / start.class_map] if start.class_map else []
    flags = ["--seed", seed, "--ema_rate", EMA, *flags]
    train(args, data, logdir, start.steps, *flags, batch=args.batch_size, every=EVERY)
    if start.class_map == "right.json":  # the same steps again: how many are needed shows in between
        begun = args.out / "begun" / logdir.name
        train(args, data, begun, BEGUN, *flags, batch=args.batch_size, every=OFTEN)
        clear(begun)
    clear(logdir, LOOKED_AT)
    return logdir


def clear(logdir: Path, looked_at: tuple[int, ...] = ()) -> None:
    """Removes the weights of a run but for its last set, with which it is finished, and the averages of some steps."""
    last = f"{max(losses(logdir)):06d}"
    averages = {f"ema_{EMA}_{step:06d}.pt" for step in looked_at}
    for file in logdir.glob("*[0-9][0-9][0-9][0-9][0-9][0-9].pt"):
        if not file.stem.endswith(last) and file.name not in averages:
            file.unlink()


def losses(logdir: Path) -> dict[int, float]:
    """Validation loss by step."""
    manifests = [json.loads(file.read_text()) for file in sorted(logdir.glob("checkpoint*.json"))]
    return {manifest["step"]: manifest["validation_loss"][EMA] for manifest in manifests}


def scores(args: argparse.Namespace, data: str, logdir: Path, step: int) -> dict[str, float]:
    """mIoU and feature distance of one sample of each validation layout, without guidance: one pass a step."""
    results = logdir / f"samples_{step:06d}"
    report = results / "scores.json"
    if not report.exists():
        command = [
            sys.executable,
            "image_sample.py",
            "--model_path",
            logdir / f"ema_{EMA}_{step:06d}.pt",
            "--split",
            "val",
        ]
        command += ["--data_dir", args.out / data, "--results_path", results, "--batch_size", 16, "--precision", "bf16"]
        run([*command, "--s", 1, "--sampler", "dpmsolver++", "--num_steps", 20])
        network = segmenter(args, data)
        found = segmentation_score(results, "samples", network, UNLABELLED) | feature_score(results, network)
        report.write_text(json.dumps(found) + "\n")
    return json.loads(report.read_text())


def record(args: argparse.Namespace, data: str, start: Start, seed: int) -> dict:
    """What one adaptation gave. Checkpoints that nothing needs any more are removed."""
    logdir = adapt(args, data, start, seed)
    begun = losses(args.out / "begun" / logdir.name)
    by_step = dict(sorted((begun | losses(logdir)).items()))
    found = {step: scores(args, data, logdir, step) for step in LOOKED_AT if step <= start.steps}
    row = {"data": data, "start": start.name, "seed": seed, "loss": by_step, "scores": found}
    print(json.dumps(row), flush=True)
    return row


def steps_to(row: dict, loss: float) -> int | None:
    """The first measured step with at most this loss."""
    return next((int(step) for step, value in row["loss"].items() if value <= loss), None)


def of(rows: list[dict], data: str, start: str, seed: int) -> dict | None:
    return next((r for r in rows if (r["data"], r["start"], r["seed"]) == (data, start, seed)), None)


def table(rows: list[dict], photographs: dict[str, dict]) -> str:
    """The figures as Markdown: loss, mIoU and feature distance at the steps that are looked at, both seeds."""
    titles = [f"{step} steps" for step in LOOKED_AT]
    lines = [f"| data | start | seed | {' | '.join(titles)} | steps to the loss of new weights at {STEPS} |"]
    lines += ["|---" * (len(titles) + 4) + "|"]
    for row in rows:
        cells = []
        for step in LOOKED_AT:
            score = row["scores"].get(step)
            cell = score and f"{row['loss'][step]:.4f}, {score['miou']:.1f}, {score['feature_distance']:.2f}"
            cells.append(cell or "")
        new = of(rows, row["data"], STARTS[0].name, row["seed"])
        reached = steps_to(row, new["loss"][STEPS]) if new else None
        shown = "not reached" if reached is None else f"{'at most ' * (reached == min(row['loss']))}{reached}"
        lines.append(f"| {row['data']} | {row['start']} | {row['seed']} | {' | '.join(cells)} | {shown} |")
    lines += ["", "Cells: validation loss, mIoU (%), feature distance."]
    for data, score in photographs.items():
        lines.append(f"Photographs, {data}: mIoU {score['miou']:.1f}.")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Validation loss against steps, one line an adaptation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 3.8), layout="constrained", squeeze=False)
    for axis, data in zip(axes[0], kinds, strict=True):
        for number, start in enumerate(STARTS):
            for seed, style in zip(SEEDS, ("-", "--"), strict=True):
                if row := of(rows, data, start.name, seed):
                    label = start.name if seed == SEEDS[0] else None
                    axis.plot(list(row["loss"]), list(row["loss"].values()), style, color=f"C{number}", label=label)
        axis.set(title=f"24 dusk photographs, {data}", xlabel="training steps", ylabel="validation loss", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw(args: argparse.Namespace, rows: list[dict], step: int = 100, columns: int = 8) -> None:
    """Samples after `step` steps from new weights and from the pretrained network, both seeds, and the photographs."""
    names = [photograph.stem for photograph, _ in scenes(args.camvid, "train") if photograph.name.startswith(DUSK)]
    names = names[HELD_OUT][:: len(names[HELD_OUT]) // columns][:columns]
    colours = get_spec("custom", args.out / "colour").palette
    page, titles = [], []
    for row in rows:
        if row["data"] != "colour" or row["start"] not in (STARTS[0].name, STARTS[1].name):
            continue
        results = args.out / "adapted" / f"colour_{row['start'].replace(' ', '_')}_seed{row['seed']}"
        results /= f"samples_{step:06d}"
        if not page:
            labels = [np.asarray(Image.open(results / "labels" / f"{name}.png")) for name in names]
            page = [[colorize(label, colours) for label in labels]]
            page += [[Image.open(results / "images" / f"{name}.png") for name in names]]
            titles = ["layout", "photograph"]
        page.append([Image.open(results / "samples" / f"{name}.png") for name in names])
        titles.append(f"{row['start']}, seed {row['seed']}")
    title = f"24 labelled photographs at dusk, after {step} training steps"
    save_png(contact_sheet(page, row_titles=titles, title=title, cell_height=96), args.out / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--camvid", type=Path, required=True, help="the folder of CamVid, as prepare_camvid.py takes it"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "OUTPUT" / "transfer")
    parser.add_argument("--steps", type=int, default=2000, help="of the training on daylight")
    parser.add_argument("--batch_size", type=int, default=4, help="of the adaptations; that on daylight has 8")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, choices=SEEDS, help="those to train now")
    parser.add_argument("--only_pretrain", action="store_true", help="end after the training on daylight")
    args = parser.parse_args()
    args.camvid, args.out = args.camvid.resolve(), args.out.resolve()
    prepare(args)
    model = pretrained(args)
    if args.only_pretrain:
        return
    order = [("colour", STARTS[:2]), ("colour", STARTS[2:]), ("grey", STARTS[:2])]
    rows = [record(args, data, start, seed) for data, starts in order for seed in args.seeds for start in starts]
    if set(args.seeds) != set(SEEDS):
        return
    rows.sort(key=lambda row: (row["data"], [start.name for start in STARTS].index(row["start"]), row["seed"]))
    photographs = {}
    for data in ("colour", "grey"):
        results = args.out / "adapted" / f"{data}_new_weights_seed0" / f"samples_{STEPS:06d}"
        photographs[data] = segmentation_score(results, "images", segmenter(args, data), UNLABELLED)
    figures = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "pretrained": {"steps": args.steps, "loss": json.loads((model.parent / "best.json").read_text())},
        "batch_size": args.batch_size,
        "photographs": photographs,
        "rows": rows,
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.out / "figures.md").write_text(table(rows, photographs))
    plot(rows, args.out / "loss.png")
    draw(args, rows)
    print(table(rows, photographs))
    print(f"figures: {args.out / 'figures.json'}\npictures: {args.out / 'loss.png'}, {args.out / 'samples.png'}")


if __name__ == "__main__":
    main()
