"""Lays CamVid out for dataset_mode custom: links to the given files, and their classes in dataset.json.

    python scripts/data/prepare_camvid.py --source CamVid --out data/camvid

SOURCE is CamVid at 480x360 with label maps of ids 0 to 11, as SegNet's authors split it (367 training, 101 validation
and 233 test images): `train/`, `trainannot/`, `val/` and so on, or `train/images/`, `train/labels/` and so on.
Nothing is downloaded, nothing is copied where links will do. Running it again goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from preparation import PreparationError, check_link, clear_errors, link_or_copy, open_output, write_json

SPLITS = {"train": 367, "val": 101, "test": 233}
CLASSES = [
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
    ("unlabelled", (0, 0, 0)),
]
# photographs and label maps of a split, below the source: this project's layout, SegNet's
LAYOUTS = [("{}/images", "{}/labels"), ("{}", "{}annot")]


def pictures(folder: Path) -> dict[str, Path]:
    """Stem -> path of the PNG and JPEG files of a folder. Raises PreparationError for broken links and twins."""
    kinds = (".png", ".jpg", ".jpeg")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in kinds and not file.name.startswith("."):
            check_link(file)
            if file.stem in found:
                raise PreparationError(f"{found[file.stem]} and {file.name} share a stem: remove one of them")
            found[file.stem] = file
    return found


def find_split(source: Path, split: str) -> list[tuple[Path, Path]]:
    """(photograph, label map) of every scene. Raises PreparationError where a folder or a partner is missing."""
    for photographs, maps in LAYOUTS:
        images, labels = source / photographs.format(split), source / maps.format(split)
        if images.is_dir() and labels.is_dir():
            found, partners = pictures(images), pictures(labels)
            single = sorted(found.keys() ^ partners.keys())
            if single:
                raise PreparationError(f"{single[0]} is in only one of {images} and {labels}: unpack the archive again")
            if not found:
                raise PreparationError(f"{images} holds no photographs: unpack the archive again")
            return [(found[stem], partners[stem]) for stem in sorted(found)]
    expected = " or ".join(f"{source / images.format(split)} and {maps.format(split)}" for images, maps in LAYOUTS)
    raise PreparationError(f"no {split} split: expected {expected}; docs/training.md says where CamVid comes from")


def prepare(source: Path, out: Path, every: int = 1) -> dict[str, int]:
    """Links the three splits, or every n-th of their scenes, and writes dataset.json; the number of scenes by split."""
    if every < 1:
        raise PreparationError(f"--every is {every}; it must be at least 1")
    splits = {split: find_split(source, split)[::every] for split in SPLITS}
    targets: dict[str, dict[str, Path]] = {}
    for split, pairs in splits.items():
        targets[f"{split}/images"] = {photograph.name: photograph for photograph, _ in pairs}
        targets[f"{split}/labels"] = {labels.name: labels for _, labels in pairs}
    classes = [{"name": name, "color": list(color)} for name, color in CLASSES]
    # keep_aspect: a street is wider than high, and a square would squeeze it
    description = {"classes": classes, "crop": "keep_aspect", "instances": False}
    expected = {folder: set(files) for folder, files in targets.items()}
    finished = open_output(out, "prepare_camvid.py", expected, sources=[source], description=description)
    for folder, files in targets.items():
        for name in sorted(files.keys() - finished[folder]):
            link_or_copy(files[name], out / folder / name)
    write_json(description, out / "dataset.json")
    return {split: len(pairs) for split, pairs in splits.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, type=Path, help="the folder of CamVid")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th scene: a small copy")
    options = parser.parse_args(arguments)
    with clear_errors("prepare_camvid.py"):
        counts = prepare(options.source, options.out, options.every)
    shown = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{options.out}: {shown}")
    if options.every == 1 and counts != SPLITS:
        print(f"note: SegNet's split has {', '.join(f'{count} {split}' for split, count in SPLITS.items())}")


if __name__ == "__main__":
    main()
