"""Draws results.png from what scripts/quickstart.sh wrote: layouts, painted scenes and samples, one below the other.

python assets/make_results.py --quickstart OUTPUT/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.dataset_specs import get_spec
from guided_diffusion.pictures import colorize, contact_sheet, save_png

COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("OUTPUT/quickstart"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.png"))
    arguments = parser.parse_args()
    results = arguments.quickstart / "results"
    names = sorted(path.name for path in (results / "samples").glob("*.png"))[:COLUMNS]
    if not names:
        parser.exit(1, f"error: {results} holds no samples; run bash scripts/quickstart.sh first\n")
    palette = get_spec("custom", arguments.quickstart / "data").palette
    rows = [
        [colorize(np.asarray(Image.open(results / "labels" / name)), palette) for name in names],
        *([Image.open(results / folder / name) for name in names] for folder in ("images", "samples")),
    ]
    titles = ["layout", "painted scene, never trained on", "the network's sample of the layout above"]
    save_png(contact_sheet(rows, row_titles=titles, cell_height=144), arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
