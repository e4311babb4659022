"""Trains 60 steps on the embedded scenes, and writes the losses to tests/golden/loss_curve.json.

    python tests/remake_loss_curve.py

`test_loss_curve.py` trains the same way, on one and on two ranks, and compares. Remake the curve only after a change
that is meant to change what a training computes: the scenes, how initial weights, crops, timesteps or noise are drawn,
the loss, the optimizer, the network, or the settings below. Say in the commit which of them, and why. A curve that
moved without such a change has found a mistake, and a faster way to compute the same does not move it by 1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "scenes")]

import torch  # noqa: E402
from make_scenes import make_scenes  # noqa: E402
from scene_painting import CLASSES  # noqa: E402

CURVE = ROOT / "tests" / "golden" / "loss_curve.json"
STEPS, GLOBAL_BATCH = 60, 8
SCENES = dict(size=20, counts={"train": 40, "val": 8}, seed=0)  # larger than the network's 16 pixels: there are crops
SETTINGS = dict(
    dataset_mode="custom", num_classes=len(CLASSES), no_instance=True, image_size=16, num_channels=32,
    num_res_blocks=1, channel_mult="1,1", attention_resolutions="8", num_head_channels=32, resblock_updown=True,
    use_scale_shift_norm=True, learn_sigma=True, lr=1e-3, drop_rate=0.2, ema_rate="0.9", seed=0, precision="fp32",
    max_steps=STEPS, log_interval=1, save_interval=STEPS, val_images=8, num_workers=0,
)  # fmt: skip


def command_line(data: Path, logdir: Path, ranks: int = 1, **changed: object) -> list[str]:
    """image_train.py and its flags: the scenes under `data`, the log under `logdir`, 8 images a step over all ranks."""
    settings = {**SETTINGS, "data_dir": data, "logdir": logdir, "batch_size": GLOBAL_BATCH // ranks, **changed}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [str(ROOT / "image_train.py"), *flags]


def draw_scenes(folder: Path) -> Path:
    """Paints the scenes under `folder`, and returns it."""
    make_scenes(folder, workers=1, **SCENES)
    return folder


def read_curve(logdir: Path) -> dict[str, list[float]]:
    """The losses of every step by name (loss, mse, vb), and the validation loss after the last one."""
    rows = [json.loads(line) for line in (logdir / "progress.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1)), "a row for every step"
    curve = {name: [row[name] for row in steps] for name in ("loss", "mse", "vb")}
    return curve | {"validation": [row["val_loss_0.9"] for row in rows if "val_loss_0.9" in row]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CURVE, help="the file to write (default: %(default)s)")
    out = parser.parse_args().out
    import image_train

    with tempfile.TemporaryDirectory() as folder:
        data, logdir = draw_scenes(Path(folder) / "data"), Path(folder) / "run"
        sys.argv = command_line(data, logdir)
        if image_train.main():
            raise SystemExit("error: the training did not end")
        curve = read_curve(logdir)
    record = {"scenes": SCENES, "settings": SETTINGS, "torch": torch.__version__}
    record |= {name: [float(f"{value:.6g}") for value in values] for name, values in curve.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    out.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{out}: loss {curve['loss'][0]:.4f} at step 1, {curve['loss'][-1]:.4f} at step {STEPS}")


if __name__ == "__main__":
    main()
