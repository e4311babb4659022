"""Classes that resizing loses, against the loader's own resizing and a plain flood fill."""

import numpy as np
import pytest
from data_helpers import run_script, save, write_custom
from PIL import Image

from guided_diffusion.data.listing import Item
from guided_diffusion.data.specs import get_spec
from guided_diffusion.data.thin_classes import lost_components, nearest_pixels, thin_classes
from guided_diffusion.data.transforms import sampling_geometry

SPEC = get_spec("custom", num_classes=4)


@pytest.mark.parametrize(("small", "large"), [(8, 30), (16, 16), (7, 100), (128, 1023), (64, 65), (1, 9)])
def test_the_pixels_that_the_loader_takes(small, large):
    row = Image.fromarray(np.arange(large, dtype=np.int32)[None])
    assert np.array_equal(np.asarray(row.resize((small, 1), Image.Resampling.NEAREST))[0], nearest_pixels(small, large))


def components(ids: np.ndarray) -> dict[int, list[set]]:
    """By class the sets of pixels that hang together, by flood fill."""
    left, found = {tuple(p) for p in np.argwhere(ids >= 0)}, {}
    while left:
        start = left.pop()
        part, edge = {start}, [start]
        while edge:
            y, x = edge.pop()
            around = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            near = {p for p in around if ids[p] == ids[start]}
            left -= near
            part |= near
            edge += near
        found.setdefault(int(ids[start]), []).append(part)
    return found


def test_components_that_vanish_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 2, (5, 6)), np.ones((8, 8), int)).astype(np.uint8)
    ids[rng.random(ids.shape) < 0.02] = 2
    ids[3, 5:30] = 3
    path = save(tmp_path / "a.png", ids)
    found = lost_components(SPEC, 12, Item("a", None, str(path), None))
    marks = np.arange(ids.size, dtype=np.int32).reshape(ids.shape)  # each pixel its number, resized by the loader
    kept = set(sampling_geometry((48, 40), 12, "square").apply_to_map(Image.fromarray(marks)).ravel().tolist())
    for class_id, parts in components(ids).items():
        lost = sum(not {y * 48 + x for y, x in part} & kept for part in parts)
        assert (found.all[class_id], found.lost[class_id]) == (len(parts), lost)
    assert 2 in [c for c, _, _ in thin_classes(found)] and 0 not in [c for c, _, _ in thin_classes(found)]
    assert not lost_components(SPEC, 48, Item("a", None, str(path), None)).all  # nothing shrinks


def test_verify_data_names_them(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 1, "val": 1}, (64, 64), settings={"classes": ["sky", "wire"]})
    for path in root.rglob("labels/*.png"):
        ids = np.zeros((64, 64), np.uint8)
        ids[1::8] = 1  # the pixels that remain are 4, 12, ...
        save(path, ids)
    flags = ["--data_dir", root, "--dataset_mode", "custom", "--workers", 1, "--report_dir", tmp_path / "report"]
    result = run_script("scripts/data/verify_data.py", *flags, "--image_size", 8)
    assert result.returncode == 0, result.stderr
    note = "more than half of the areas of these classes vanish (in 1 label maps): wire (8 of 8); train larger"
    assert result.stdout.count(note) == 2
    assert "vanish" not in run_script("scripts/data/verify_data.py", *flags, "--image_size", 64).stdout
