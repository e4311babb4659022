"""What the tests of the scorers share: loading and running the scripts, small folders of images, seeded weights."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = ROOT / "evaluations"
CAMVID = ROOT.parent / "shared" / "data" / "camvid"
needs_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="the CamVid photographs are not beside the repository")


def load_script(name: str) -> ModuleType:
    """evaluations/NAME.py as a module that hides no package.

    The folder goes to the end of the search path: at its beginning the script lpips.py would hide the package lpips.
    """
    if str(EVALUATIONS) not in sys.path:
        sys.path.append(str(EVALUATIONS))
    if name not in ("lpips", "miou", "test_with_FID"):
        return importlib.import_module(name)
    alias = f"evaluations_{name}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, EVALUATIONS / f"{name}.py")
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return sys.modules[alias]


def call(name: str, *arguments: object) -> None:
    """Runs a scorer in this process on the CPU, reading images in it too unless the arguments say otherwise."""
    flags = ["--device", "cpu", "--num_workers", "0"]
    argv, sys.argv = sys.argv, [f"{name}.py", *flags, *map(str, arguments)]
    try:
        load_script(name).main()
    finally:
        sys.argv = argv


def run_script(name: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a scorer as people do, in a process of its own."""
    command = [sys.executable, str(EVALUATIONS / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def fails(match: str):
    """Expects the error that a scorer shows its user."""
    return pytest.raises(load_script("command_line").EvaluationError, match=match)


def last_number(output: str) -> float:
    """The score in the last line of a scorer's output, such as `FID: 12.3456 (remark)`."""
    return float(output.strip().splitlines()[-1].split()[1])


def picture(generator: np.random.Generator, width: int = 96, height: int = 64) -> Image.Image:
    """A smooth random picture with some grain, so that blur, noise and resizing all change it."""
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + generator.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, seed: int = 0, **size: int) -> Path:
    """A folder of random pictures 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        picture(generator, **size).save(folder / f"{index:03d}.png")
    return folder


def write_photographs(folder: Path, split: str, count: int, change=lambda image: image) -> Path:
    """CamVid photographs, spread over a split, at 192x144 after `change`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted((CAMVID / split / "images").glob("*.jpg"))
    for path in paths[:: len(paths) // count][:count]:
        with Image.open(path) as image:
            change(image).resize((192, 144), Image.Resampling.BICUBIC).save(folder / f"{path.stem}.png")
    return folder


def blurred(radius: float):
    """A change that blurs an image."""
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def truncate(path: Path, keep: float) -> None:
    """Cuts a file off, as an interrupted copy does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def seeded_state(network: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state for the network with He-scaled weights and batch norms that are far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in network.state_dict().items():
        if value.ndim >= 2:
            state[key] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            state[key] = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.is_floating_point():
            state[key] = 0.2 * torch.randn(value.shape, generator=generator)
        else:
            state[key] = value
    return state
