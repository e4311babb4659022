"""Small data sets drawn on the spot, in the layouts of all modes, for the tests of the data layer."""

import contextlib
import importlib.util
import io
import json
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def shared_or_skip(*parts: str) -> Path:
    """A file or folder of the shared material; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the shared material {'/'.join(parts)} is not beside the repository")
    return path


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module, so that its `main` runs in this process."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # worker processes look their functions up by name
    specification.loader.exec_module(module)
    return module


def run_script(path: str, *arguments) -> SimpleNamespace:
    """`returncode`, `stdout` and `stderr` of a script's `main`, run in this process."""
    main = load_script(path).main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main([str(argument) for argument in arguments])
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=errors.getvalue())


def draw(seed: int, size: tuple[int, int], classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photograph uint8 [H, W, 3], ids uint8 [H, W] and instances uint16 [H, W] of a scene of blocks.

    The photograph's red channel is 10 * id plus a little noise, so that a joint transform can be checked on the pixels.
    """
    width, height = size
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, classes, (4, 5))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
    ids = blocks[rows][:, columns].astype(np.uint8)
    instances = (np.arange(20).reshape(4, 5)[rows][:, columns] + 26000).astype(np.uint16)
    photograph = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    photograph[..., 0] = 10 * ids + rng.integers(0, 3, (height, width))
    return photograph, ids, instances


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_custom(
    root: Path,
    counts: dict[str, int] | None = None,
    size: tuple[int, int] = (40, 30),
    classes: int = 4,
    instances: bool = False,
    settings: dict | None = None,
) -> Path:
    """A folder in the custom layout; `settings` becomes its dataset.json."""
    for split, count in (counts or {"train": 4, "val": 2}).items():
        for i in range(count):
            photograph, ids, numbers = draw(i, size, classes)
            save(root / split / "images" / f"scene{i}.png", photograph)
            save(root / split / "labels" / f"scene{i}.png", ids)
            if instances:
                save(root / split / "instances" / f"scene{i}.png", numbers)
    if settings is not None:
        (root / "dataset.json").write_text(json.dumps(settings), encoding="utf-8")
    return root


def write_benchmark(root: Path, mode: str, size: tuple[int, int] = (64, 32)) -> Path:
    """Two training and two evaluation scenes in a benchmark's own layout, file ids and bit depths."""
    for split, i in (("train", 0), ("train", 1), ("val", 2), ("val", 3)):
        photograph, ids, numbers = draw(i, size, 5)
        if mode == "ade20k":
            folder = {"train": "training", "val": "validation"}[split]
            save(root / "images" / folder / f"ADE_{i}.jpg", photograph)
            save(root / "annotations" / folder / f"ADE_{i}.png", ids)
        elif mode == "cityscapes":
            city = root / "{}" / split / f"city{i}"
            save(Path(str(city).format("leftImg8bit")) / f"city_{i}_leftImg8bit.png", photograph)
            save(Path(str(city).format("gtFine")) / f"city_{i}_gtFine_labelIds.png", ids)
            save(Path(str(city).format("gtFine")) / f"city_{i}_gtFine_color.png", photograph)
            save(Path(str(city).format("gtFine")) / f"city_{i}_gtFine_instanceIds.png", numbers)
        elif mode == "celeba":
            folder = {"train": "train", "val": "test"}[split]
            save(root / folder / "images" / f"{i}.jpg", photograph)
            save(root / folder / "labels" / f"{i}.png", ids[::2, ::2])
        else:
            ids[ids == 4] = 255
            save(root / f"{split}_img" / f"{i:012d}.jpg", photograph)
            save(root / f"{split}_label" / f"{i:012d}.png", ids)
            save(root / f"{split}_inst" / f"{i:012d}.png", (numbers - 26000).astype(np.uint8))
    return root


def packed_png(path, ids: np.ndarray, bits: int, palette: bool = False):
    """A PNG of `bits` per pixel by the standard, with no help of Pillow's."""
    rows = (ids[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(len(ids), -1)
    rows = np.packbits(rows.astype(np.uint8), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)  # 0: no filter
    return write_png(path, ids.shape, bits, 3 if palette else 0, data, bytes(3 * 2**bits) if palette else b"")


def write_png(path, shape, bits: int, color_type: int, data: bytes, palette: bytes = b""):
    header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
            for name, content in chunks
            if content or name != b"PLTE"
        )
    )
    return path
