"""Makes Cityscapes' labelIds and instanceIds from the polygons, where they are missing.

    pip install cityscapesscripts
    python scripts/data/prepare_cityscapes.py --data_dir ./data/cityscapes

The published gtFine archive holds these maps already; archives of polygons alone, and coarse annotations, do not all.
What is there is left as it is, so running it again goes on where it stopped.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np

from guided_diffusion.data.json_text import parse_json
from guided_diffusion.data.pictures import save_png
from guided_diffusion.data.specs import DataError
from guided_diffusion.hosts.parallel import map_in_processes

POLYGONS = "_polygons.json"
MAPS = ("labelIds", "instanceIds")


def make_maps(polygons: Path) -> int:
    """Draws the missing maps of one scene; how many there were. Raises DataError where the polygons are damaged."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    missing, drawn = missing_maps(polygons), {}
    try:
        parse_json(polygons.read_bytes())  # the library's reader ends the program where it fails
        scene = Annotation()
        scene.fromJsonFile(str(polygons))
        for kind in missing:
            if kind == "labelIds":
                drawn[kind] = np.asarray(createLabelImage(scene, "ids")).astype(np.uint8)
            else:
                drawn[kind] = np.asarray(createInstanceImage(scene, "ids")).astype(np.uint16)
    except (Exception, SystemExit) as error:  # whatever the library makes of a file that is cut or edited
        raise DataError(
            f"{polygons} cannot be drawn ({type(error).__name__}: {error}): unpack the archive again"
        ) from error
    for kind, target in missing.items():
        save_png(drawn[kind], target)
    return len(missing)


def missing_maps(polygons: Path) -> dict[str, Path]:
    """Kind -> path of the maps that a scene lacks. Raises DataError for a broken link in their place."""
    stem = polygons.name.removesuffix(POLYGONS)
    maps = {kind: polygons.with_name(f"{stem}_{kind}.png") for kind in MAPS}
    for path in maps.values():
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to nothing; remove it or restore what it points to")
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
    try:
        made = draw_missing(scenes, options.workers)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(scenes)} scenes: {made} maps drawn, {2 * len(scenes) - made} were there")
    return 0


def draw_missing(scenes: list[Path], workers: int | None) -> int:
    """Draws the maps that these scenes lack; how many. Raises DataError where they cannot be drawn."""
    incomplete = [scene for scene in scenes if missing_maps(scene)]
    if incomplete and importlib.util.find_spec("cityscapesscripts") is None:
        raise DataError(f"{len(incomplete)} scenes lack maps; to draw them: pip install cityscapesscripts")
    return sum(map_in_processes(make_maps, incomplete, "drawing polygons", workers))


if __name__ == "__main__":
    raise SystemExit(main())
