"""Makes Cityscapes' labelIds and instanceIds from the polygons, where they are missing.

    pip install cityscapesscripts
    python scripts/data/prepare_cityscapes.py --data_dir ./data/cityscapes

The published gtFine archive holds these maps already; archives of polygons alone, and coarse annotations, do not all.
What is there is left as it is, so running it again goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from guided_diffusion.hosts.parallel import map_in_processes
from guided_diffusion.runs.pictures import save_png

POLYGONS = "_polygons.json"
MAPS = ("labelIds", "instanceIds")


def make_maps(polygons: Path) -> int:
    """Draws the missing maps of one scene; how many there were."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    scene = Annotation()
    scene.fromJsonFile(str(polygons))
    missing = missing_maps(polygons)
    for kind, target in missing.items():
        if kind == "labelIds":
            ids = np.asarray(createLabelImage(scene, "ids")).astype(np.uint8)
        else:
            ids = np.asarray(createInstanceImage(scene, "ids")).astype(np.uint16)
        save_png(ids, target)
    return len(missing)


def missing_maps(polygons: Path) -> dict[str, Path]:
    """Kind -> path of the maps that a scene lacks."""
    stem = polygons.name.removesuffix(POLYGONS)
    maps = {kind: polygons.with_name(f"{stem}_{kind}.png") for kind in MAPS}
    return {kind: path for kind, path in maps.items() if not path.exists()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, type=Path, help="the folder that holds gtFine")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    scenes = sorted(options.data_dir.glob(f"gtFine/*/*/*{POLYGONS}"))
    if not scenes:
        print(f"error: no *{POLYGONS} in {options.data_dir}/gtFine/<split>/<city>", file=sys.stderr)
        return 1
    incomplete = [scene for scene in scenes if missing_maps(scene)]
    if incomplete:
        try:
            import cityscapesscripts  # noqa: F401
        except ImportError:
            print(
                f"error: {len(incomplete)} scenes lack maps; to draw them: pip install cityscapesscripts",
                file=sys.stderr,
            )
            return 1
    made = sum(map_in_processes(make_maps, incomplete, "drawing polygons", options.workers))
    print(f"{len(scenes)} scenes: {made} maps drawn, {2 * len(scenes) - made} were there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
