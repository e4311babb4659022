"""Prepares CelebAMask-HQ: merges the masks of the parts into one label map per face and splits the faces.

    python scripts/data/prepare_celebamask.py --source CelebAMask-HQ --out data/celeba

reads `CelebA-HQ-img/N.jpg` and `CelebAMask-HQ-mask-anno/<folder>/<5-digit N>_<part>.png` and writes
`<split>/images/N.jpg` (hard links where the file system has them, else copies) and `<split>/labels/N.png` (ids 0..18).

Split: the last 2,000 faces are the test split, the other 28,000 the training split. With `--partition
list_eval_partition.txt` (of CelebA) it is CelebA's own: 24,183 train, 2,993 val, 2,824 test; a face is then never in
another split than the CelebA photograph that it was made from.

Running the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image
from preparation import (
    PreparationError,
    available_cpus,
    check_link,
    clear_errors,
    files_by_stem,
    link_or_copy,
    open_output,
    run_parallel,
    write_png,
)

# In the order of painting: a later part covers an earlier one. The id of a part is its position; 0 is background.
PARTS = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
    *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
FACES = 30_000
TEST_FACES = 2_000
PARTITION_SPLITS = {"0": "train", "1": "val", "2": "test"}
PARTITION_FACES = {"train": 24_183, "val": 2_993, "test": 2_824}
MAPPING_NAME = "CelebA-HQ-to-CelebA-mapping.txt"


def find_masks(folder: Path) -> dict[int, dict[str, Path]]:
    """Face -> part -> mask file. Raises PreparationError for a missing folder, a mask of no known part, one that
    is there twice, or a broken link."""
    if not folder.is_dir():
        raise PreparationError(f"{folder} is not a folder: --source is the unpacked folder CelebAMask-HQ")
    masks: dict[int, dict[str, Path]] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(".png") or name.startswith("."):
                continue
            match = re.fullmatch(r"(\d{5})_(\w+)\.png", name)
            if not match or match[2] not in PARTS[1:]:
                raise PreparationError(f"{parent}/{name} names no known part; the parts are {', '.join(PARTS[1:])}")
            mask, of_face = Path(parent, name), masks.setdefault(int(match[1]), {})
            check_link(mask)
            if match[2] in of_face:
                raise PreparationError(f"{of_face[match[2]]} and {mask} are both that mask: remove one of them")
            of_face[match[2]] = mask
    return masks


def merge_masks(masks: dict[str, Path]) -> np.ndarray:
    """One face's masks -> label map [H, W] uint8. Raises PreparationError for unreadable masks or different sizes."""
    labels = None
    for class_id, part in enumerate(PARTS):
        if part not in masks:
            continue
        try:
            with Image.open(masks[part]) as image:
                mask = np.asarray(image.convert("L")) != 0
        except OSError as error:
            raise PreparationError(f"{masks[part]} cannot be read ({error}): unpack the archive again") from None
        if labels is None:
            labels = np.zeros(mask.shape, np.uint8)
        if mask.shape != labels.shape:
            raise PreparationError(f"{masks[part]} is {mask.shape}, the face's other masks are {labels.shape}")
        labels[mask] = class_id
    assert labels is not None  # plan() lets no face without masks through
    return labels


def default_split(faces: int, test_faces: int) -> dict[str, list[int]]:
    """The last `test_faces` faces by number are for testing."""
    if not 0 < test_faces < faces:
        raise PreparationError(f"--test_faces {test_faces}: must leave faces to train on, and there are {faces}")
    return {"train": list(range(faces - test_faces)), "test": list(range(faces - test_faces, faces))}


def partition_split(faces: int, mapping: Path, partition: Path) -> dict[str, list[int]]:
    """CelebA's own split, from the two files' columns (face, CelebA number, CelebA file) and (CelebA file, 0|1|2)."""
    part_of = dict(_columns(partition, 2))
    split: dict[str, list[int]] = {name: [] for name in PARTITION_SPLITS.values()}
    rows = [row for row in _columns(mapping, 3) if row[0].isdigit()]  # the first line names the columns
    for face, _, celeba_file in rows:
        code = part_of.get(celeba_file)
        if code not in PARTITION_SPLITS:
            raise PreparationError(
                f"{partition} says {code} for {celeba_file} (face {face} of {mapping}), not 0, 1 or 2"
            )
        if int(face) < faces:
            split[PARTITION_SPLITS[code]].append(int(face))
    listed = sorted(face for members in split.values() for face in members)
    if listed != list(range(faces)):
        raise PreparationError(
            f"{mapping} does not list each of the faces 0..{faces - 1} once: take the archive's file"
        )
    counts = {name: len(members) for name, members in split.items()}
    if faces == FACES and counts != PARTITION_FACES:
        raise PreparationError(f"{partition} splits the faces into {counts}, CelebA's own into {PARTITION_FACES}")
    return split


def _columns(file: Path, count: int) -> list[list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PreparationError(f"{file} cannot be read: {error.strerror}") from None
    rows = [line.split() for line in lines if line.strip()]
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != count]
    if wrong or not rows:
        raise PreparationError(f"{file}: line {(wrong or [1])[0]} has not {count} columns: is it another file?")
    return rows


def check_faces(faces: int, images: dict[str, Path], masks: dict[int, dict[str, Path]], source: Path) -> None:
    """Raises PreparationError where a face lacks its photograph or all its masks."""
    without = [n for n in range(faces) if str(n) not in images or n not in masks]
    if without:
        lacking = "photograph" if str(without[0]) not in images else "masks"
        raise PreparationError(
            f"{source}: face {without[0]} has no {lacking}, {len(without)} of {faces} faces are incomplete: unpack the"
            " archive again, or, if it is meant to be a part of it, give the number of its faces with --faces"
        )


def _prepare_face(job: tuple[Path, dict[str, Path], Path, Path]) -> None:
    image, masks, image_out, labels_out = job
    write_png(Image.fromarray(merge_masks(masks)), labels_out)
    link_or_copy(image, image_out)


def prepare(
    source: Path, out: Path, faces: int, test_faces: int, mapping: Path | None, partition: Path | None, workers: int
) -> None:
    """Writes the data set; see the module's docstring. Raises PreparationError on unusable input."""
    if mapping and not partition:
        raise PreparationError(
            "--mapping is for CelebA's own split, which needs --partition list_eval_partition.txt too"
        )
    images = files_by_stem(source / "CelebA-HQ-img", ".jpg")
    masks = find_masks(source / "CelebAMask-HQ-mask-anno")
    check_faces(faces, images, masks, source)
    if partition is None:
        split, rule = default_split(faces, test_faces), f"the last {test_faces:,} faces for testing"
    else:
        split, rule = partition_split(faces, mapping or source / MAPPING_NAME, partition), f"CelebA's own, {partition}"
    print(f"split: {rule}: " + ", ".join(f"{len(members):,} {name}" for name, members in split.items()))
    expected = {f"{name}/images": {f"{n}.jpg" for n in members} for name, members in split.items()}
    expected |= {f"{name}/labels": {f"{n}.png" for n in members} for name, members in split.items()}
    finished = open_output(out, "prepare_celebamask.py", expected, sources=[source])
    jobs = [
        (images[str(n)], masks[n], out / name / "images" / f"{n}.jpg", out / name / "labels" / f"{n}.png")
        for name, members in split.items()
        for n in members
        if f"{n}.jpg" not in finished[f"{name}/images"] or f"{n}.png" not in finished[f"{name}/labels"]
    ]
    run_parallel(_prepare_face, jobs, workers, f"merging masks into {out}")
    print(f"{len(jobs):,} faces prepared, {faces - len(jobs):,} were there already: {out}")
    print(f"train with: --data_dir {out} --dataset_mode celeba --num_classes {len(PARTS)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the unpacked folder CelebAMask-HQ")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made when missing")
    parser.add_argument("--partition", type=Path, help="CelebA's list_eval_partition.txt, for CelebA's own split")
    parser.add_argument("--mapping", type=Path, help=f"for --partition; default: {MAPPING_NAME} in --source")
    parser.add_argument("--test_faces", type=int, default=TEST_FACES, help="without --partition: faces for testing")
    parser.add_argument("--faces", type=int, default=FACES, help="faces in --source, where it is a part of the archive")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes")
    args = parser.parse_args()
    with clear_errors("prepare_celebamask"):
        prepare(**vars(args))


if __name__ == "__main__":
    main()
