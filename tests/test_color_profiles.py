"""Photographs with colour profiles: converted against the definition of their colours, and nothing else touched."""

import struct

import numpy as np
import pytest
from data_helpers import draw, run_script, save, write_custom
from PIL import Image, ImageCms

from guided_diffusion.data.notes import Notes
from guided_diffusion.data.specs import DataError, get_spec
from guided_diffusion.data.transforms import read_image, read_instances, read_label
from guided_diffusion.image_datasets import open_dataset

SPEC = get_spec("custom", num_classes=4)
# Primaries of Display P3 and of sRGB for the white D50 of profiles (both adapted from D65 by Bradford's method).
P3 = np.array([[0.515102, 0.291965, 0.157153], [0.241182, 0.692236, 0.066582], [-0.001050, 0.041885, 0.784378]])
SRGB = np.array([[0.436075, 0.385065, 0.143080], [0.222504, 0.716879, 0.060617], [0.013932, 0.097105, 0.714173]])
GAMMA = 2.2


def profile(matrix: np.ndarray | None) -> bytes:
    """An ICC profile of version 2 with a gamma of 2.2: of RGB with these primaries, or grey."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def point(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + number(x) + number(y) + number(z)

    text = b"a wide one\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": point(0.9642, 1.0, 0.8249),
        b"cprt": b"text\0\0\0\0none\0",
    }
    if matrix is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
            tags |= {name + b"XYZ": point(*column), name + b"TRC": curve}
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    space = b"GRAY" if matrix is None else b"RGB "
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + point(0.9642, 1.0, 0.8249)[8:] + bytes(48)
    assert len(header) == 128
    return header + table + body


def to_srgb(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """By the definitions: linear light, the other primaries, IEC 61966-2-1's curve."""
    linear = (pixels / 255.0) ** GAMMA @ (np.linalg.inv(SRGB) @ matrix).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_wide_profile_becomes_srgb(tmp_path):
    pixels = draw(0, (40, 30), 4)[0]
    for extra in ([], [np.full((30, 40, 1), 255, np.uint8)]):  # RGB, and RGBA without transparency
        path = save(tmp_path / "a.png", np.concatenate([pixels, *extra], -1), icc_profile=profile(P3))
        notes = Notes()
        read = read_image(str(path), SPEC, notes)
        assert np.abs(np.asarray(read).astype(float) - to_srgb(pixels, P3)).max() <= 1.5  # its tables and rounding
        assert np.abs(np.asarray(read).astype(int) - pixels).max() > 10
        assert list(notes) == ["photographs have the colour profile 'a wide one': converted to sRGB"]
        assert "icc_profile" not in read.info  # a file that it is saved to is not converted again


def test_a_grey_profile(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / "a.png", pixels, icc_profile=profile(None))
    expected = to_srgb(np.stack([pixels] * 3, -1), SRGB)
    read = np.asarray(read_image(str(path), SPEC)).astype(float)
    assert np.abs(read - expected).max() <= 2.5 and np.abs(read[..., 0] - pixels).max() > 2


def test_srgb_and_what_is_to_be_ignored_stay_bit_for_bit(tmp_path):
    pixels = draw(0, (40, 30), 4)[0]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for spec, embedded in (
        (SPEC, srgb),
        (SPEC, profile(P3)[:200]),
        (SPEC, profile(None)),  # for grey pictures, in one that is not
        (get_spec("ade20k"), profile(P3)),
        (get_spec("custom", None, 4, {"icc": "ignore"}), profile(P3)),
    ):
        notes = Notes()
        path = save(tmp_path / "a.png", pixels, icc_profile=embedded)
        assert np.array_equal(read_image(str(path), spec, notes), pixels)
        assert bool(notes) == (spec is SPEC and embedded != srgb)


def test_masks_are_never_converted(tmp_path):
    ids = draw(0, (40, 30), 4)[1]
    path = str(save(tmp_path / "a.png", ids, icc_profile=profile(None)))
    assert np.array_equal(read_label(path, SPEC)[0], ids) and np.array_equal(read_instances(path), ids)
    colors = np.array([[0, 0, 0], [200, 30, 40], [9, 130, 200], [210, 245, 60]], np.uint8)
    classes = [{"name": "abcd"[i], "color": color} for i, color in enumerate(colors.tolist())]
    spec = get_spec("custom", None, None, {"classes": classes, "label_encoding": "colors"})
    path = str(save(tmp_path / "b.png", colors[ids], icc_profile=profile(P3)))
    assert np.array_equal(read_label(path, spec)[0], ids)


def test_a_cache_converts_once(tmp_path):
    root = write_custom(tmp_path / "data", {"train": 1, "val": 1}, (100, 80))
    path = root / "train/images/scene0.png"
    save(path, np.asarray(Image.open(path)), icc_profile=profile(P3))
    flags = ["--data_dir", root, "--dataset_mode", "custom", "--image_size", 16, "--num_classes", 4, "--workers", 1]
    assert run_script("scripts/data/cache_dataset.py", *flags, "--cache_dir", tmp_path / "cache").returncode == 0
    options = {"dataset_mode": "custom", "split": "train", "image_size": 16, "num_classes": 4}
    first, second = (open_dataset(data_dir=folder, **options)[0] for folder in (root, tmp_path / "cache"))
    assert (first["image"] == second["image"]).all() and list(first["notes"]) and "notes" not in second


def test_an_unknown_rule(tmp_path):
    (tmp_path / "dataset.json").write_text('{"icc": "apply"}')
    with pytest.raises(DataError, match="icc is 'apply'; it must be one of convert, ignore"):
        get_spec("custom", tmp_path, 4)
