"""Paints the embedded data set: small procedural landscapes with their label maps, in the `custom` layout.

    python scripts/scenes/make_scenes.py --out data/scenes --size 32 --train 400 --val 64 --seed 0

writes `<split>/images/NAME.png` (RGB), `<split>/labels/NAME.png` (class ids, 8 bit) for the splits train and val, and
`dataset.json` with the class names and colours. A scene depends on the seed, the split and its index only: the same at
any number of processes, and the same composition at any size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from preparation import PreparationError, available_cpus, clear_errors, open_output, run_parallel, write_json, write_png
from scene_painting import CLASSES, TIMES, paint_scene

SPLITS = {"train": 0, "val": 1}


DEFAULT_TIMES = ("day",)


def draw(
    seed: int, split: str, index: int, size: int, times: Sequence[str] = DEFAULT_TIMES
) -> tuple[np.ndarray, np.ndarray]:
    """One scene of the data set: image [size, size, 3] uint8 and label map [size, size] uint8."""
    return paint_scene(np.random.default_rng([seed, SPLITS[split], index]), size, times)


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _write_scene(job: tuple[Path, int, str, int, int, Sequence[str]]) -> None:
    out, seed, split, index, size, times = job
    image, labels = draw(seed, split, index, size, times)
    write_png(Image.fromarray(image), out / split / "images" / _file_name(index))
    write_png(Image.fromarray(labels), out / split / "labels" / _file_name(index))


def make_scenes(
    out: Path, size: int, counts: dict[str, int], seed: int, workers: int, times: Sequence[str] = DEFAULT_TIMES
) -> None:
    """Writes the data set under `out`.

    Raises PreparationError for counts or sizes that make no data set, and when `out` holds files that this script did
    not write.
    """
    if size < 8:
        raise PreparationError(f"--size {size}: a scene needs at least 8 pixels a side")
    if min(counts.values()) < 1:
        raise PreparationError(f"every split needs at least one scene, got {counts}")
    if seed < 0:
        raise PreparationError(f"--seed {seed}: it must be 0 or more")
    unknown = [time for time in times if time not in TIMES]
    if unknown or not times:
        raise PreparationError(f"--times {','.join(times)}: choose from {', '.join(TIMES)}")
    names = {split: {_file_name(index) for index in range(count)} for split, count in counts.items()}
    expected = {f"{split}/{kind}": names[split] for split in SPLITS for kind in ("images", "labels")}
    description = {"classes": [{"name": name, "color": list(color)} for name, color in CLASSES]}
    open_output(out, "make_scenes.py", expected, description=description)
    jobs = [(out, seed, split, index, size, times) for split, count in counts.items() for index in range(count)]
    run_parallel(_write_scene, jobs, workers, f"painting scenes into {out}")
    write_json(description, out / "dataset.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made when missing")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--train", type=int, default=400, help="scenes to train on")
    parser.add_argument("--val", type=int, default=64, help="scenes to sample")
    parser.add_argument("--seed", type=int, default=0, help="another seed paints other scenes")
    parser.add_argument(
        "--times",
        default=",".join(DEFAULT_TIMES),
        help=f"one or more of {','.join(TIMES)}; a day alone is learnt in minutes, all of them take longer",
    )
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes")
    args = parser.parse_args()
    with clear_errors("make_scenes"):
        make_scenes(
            args.out, args.size, {"train": args.train, "val": args.val}, args.seed, args.workers, args.times.split(",")
        )
    print(
        f"{args.train} train and {args.val} val scenes of {args.size}x{args.size}, {len(CLASSES)} classes: {args.out}"
    )


if __name__ == "__main__":
    main()
