r"""Draws pages of samples from a results folder: one sample of several layouts, or several samples of few layouts.

    python assets/make_samples.py --run OUTPUT/quickstart --results results --out assets/quickstart.png
    python assets/make_samples.py --run OUTPUT/camvid-cpu --results results/test --out assets/results.png
    python assets/make_samples.py --run OUTPUT/camvid-cpu --results results/several --out assets/diversity.png
    python assets/make_samples.py --run OUTPUT/quickstart --results results --out assets/prediction.png \
        --title "velocity predicted" --also "noise predicted" OUTPUT/quickstart-eps/results \
        --also "image predicted" OUTPUT/quickstart-xstart/results

Layouts are taken at equal distances in the order of their names. RUN holds the data set, in dataset_mode
custom, and the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.data.pictures import colorize, contact_sheet, save_png
from guided_diffusion.data.specs import get_spec

SAMPLES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="what quickstart.sh or camvid.sh wrote")
    parser.add_argument("--results", required=True, help="folder below it with images/, labels/ and samples/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", type=int, help="how many (default: 8, or 3 with several samples each)")
    parser.add_argument(
        "--title", default="a sample of the layout above", help="of the samples, where there is one each"
    )
    parser.add_argument(
        "--also",
        nargs=2,
        action="append",
        default=[],
        metavar=("TITLE", "RESULTS"),
        help="samples of another run below",
    )
    parser.add_argument("--cell_height", type=int, default=144, help="of a picture on the page, in pixels")
    arguments = parser.parse_args()
    results = arguments.run / arguments.results
    folders = sorted(folder.name for folder in results.glob("samples*") if folder.is_dir())[:SAMPLES]
    names = sorted(path.name for path in (results / folders[0]).glob("*.png")) if folders else []
    if not names:
        parser.exit(1, f"error: {results} holds no samples; run the script that makes them first\n")
    if len(folders) > 1 and arguments.also:
        parser.exit(1, f"error: {results} holds several samples of a layout; --also goes with one of each\n")
    count = min(arguments.layouts or (8 if len(folders) == 1 else 3), len(names))
    names = [names[i * len(names) // count] for i in range(count)]
    spec = get_spec("custom", arguments.run / "data")
    labels = [np.asarray(Image.open(results / "labels" / name)) for name in names]
    layouts = [colorize(label, spec.palette) for label in labels]
    present = sorted(set(np.concatenate([np.unique(label) for label in labels]).tolist()))
    legend = [(spec.class_names[i], spec.palette[i]) for i in present]
    photographs = [Image.open(results / "images" / name) for name in names]
    samples = [[Image.open(results / folder / name) for name in names] for folder in folders]
    shared = dict(legend=legend, cell_height=arguments.cell_height)
    if len(folders) == 1:
        rows = {"layout, not trained on": layouts, "the real image of it": photographs, arguments.title: samples[0]}
        rows |= {
            title: [Image.open(Path(other) / folders[0] / name) for name in names] for title, other in arguments.also
        }
        page = contact_sheet(list(rows.values()), row_titles=list(rows), **shared)
    else:
        rows = [list(row) for row in zip(layouts, photographs, *samples, strict=True)]
        titles = ["layout", "real image", *(f"sample {i + 1}" for i in range(len(folders)))]
        page = contact_sheet(rows, column_titles=titles, **shared)
    save_png(page, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
