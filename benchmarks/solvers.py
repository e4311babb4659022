"""Solvers and steps on the quickstart's network: do few steps obey the layout, and what do they look like?

    python benchmarks/solvers.py --quickstart OUTPUT/quickstart

Samples the same layouts with the same seeds by each solver, scores how well they follow their layouts (score_scenes.py)
and draws one page: rows are solver and steps, columns layouts. Started again, it makes only what is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.data.pictures import colorize, contact_sheet, save_png
from guided_diffusion.data.specs import get_spec

ROOT = Path(__file__).resolve().parents[1]
RUNS = [
    ("ddpm", 1000),
    ("ddpm", 50),
    ("ddim", 50),
    ("ddim", 20),
    ("dpmsolver++", 50),
    ("dpmsolver++", 20),
    ("dpmsolver++", 10),
]
COLUMNS = 8


def sample(model: Path, results: Path, sampler: str, steps: int, layouts: int) -> float:
    """Runs image_sample.py; returns the seconds it took."""
    command = [sys.executable, str(ROOT / "image_sample.py"), "--model_path", str(model), "--s", "1.5"]
    command += ["--results_path", str(results), "--sampler", sampler, "--num_steps", str(steps)]
    command += ["--num_samples", str(layouts), "--batch_size", "16"]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    return time.perf_counter() - start


def adherence(results: Path, data: Path) -> dict:
    """The figures of score_scenes.py."""
    path = results / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / "scenes" / "score_scenes.py"), str(results), "--data", str(data)]
    subprocess.run([*command, "--json", str(path)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("OUTPUT/quickstart"), help="what quickstart.sh wrote")
    parser.add_argument("--layouts", type=int, default=64)
    parser.add_argument("--picture", type=Path, default=ROOT / "assets" / "solvers.png")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "solvers.json")
    arguments = parser.parse_args()
    folder, data = arguments.quickstart.resolve() / "solvers", arguments.quickstart.resolve() / "data"
    model = arguments.quickstart.resolve() / "finetune" / "ema_0.98_best.pt"
    rows, pictures, titles = [], [], []
    for sampler, steps in RUNS:
        results = folder / f"{sampler}_{steps}"
        seconds = sample(model, results, sampler, steps, arguments.layouts)
        figures = adherence(results, data)
        kept = {name: figures[name] for name in ("adherence", "real", "shuffled")}
        rows.append({"sampler": sampler, "steps": steps, **kept, "seconds_of_this_run": seconds})
        names = sorted(path.name for path in (results / "samples").glob("*.png"))[:COLUMNS]
        pictures.append([Image.open(results / "samples" / name) for name in names])
        titles.append(f"{sampler}, {steps} steps: {kept['adherence']:.1%} of pixels in their class's colours")
        print(titles[-1], flush=True)
    palette = get_spec("custom", data).palette
    labels = [colorize(np.asarray(Image.open(results / "labels" / name)), palette) for name in names]
    page = contact_sheet(
        [labels, *pictures],
        row_titles=["layout", *titles],
        title="Solvers and steps, the same seeds, s = 1.5",
        cell_height=128,
    )
    save_png(page, arguments.picture)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"layouts": arguments.layouts, "rows": rows}, indent=1) + "\n")
    print(f"picture: {arguments.picture}\nfigures: {arguments.json}")


if __name__ == "__main__":
    main()
