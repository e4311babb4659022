"""The package as others install it: a wheel of this checkout, alone on the path, in another folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from data_helpers import REPOSITORY

NOT_SOURCES = shutil.ignore_patterns(
    ".*", "OUTPUT", "RESULTS", "data", "build", "dist", "*.egg-info", "__pycache__", "tests", "assets"
)


def command(*words: object, cwd: Path, **environment: str) -> str:
    """What a command prints; the test fails with its whole output where it fails."""
    variables = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: pip builds in the folder itself, where an older build would leave files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")

    def ignored(path: str, names: list[str]) -> set[str]:  # the data folder at the top, not the room of that name
        return NOT_SOURCES(path, names) - ({"data"} if Path(path) != REPOSITORY else set())

    shutil.copytree(REPOSITORY, folder / "checkout", ignore=ignored)
    build = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder / "wheels")
    command(*build, cwd=folder / "checkout")
    (built,) = (folder / "wheels").glob("*.whl")
    return built


def test_what_a_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about).decode()
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "guided_diffusion").rglob("*")
        if path.suffix in (".py", ".csv") or path.name == "py.typed"
    }
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("/LICENSE") for name in names)
    assert "\nLicense: MIT\n" in metadata or "\nLicense-Expression: MIT\n" in metadata
    version = metadata.split("\nVersion: ")[1].splitlines()[0]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (REPOSITORY / "CHANGELOG.md").read_text()


PROGRAM = """
import importlib, json, pkgutil, torch
import guided_diffusion
modules = [module.name for module in pkgutil.walk_packages(guided_diffusion.__path__, "guided_diffusion.")]
for name in modules:
    importlib.import_module(name)
from guided_diffusion.data.specs import DATASET_MODES, get_spec
from guided_diffusion.script_util import create_model_and_diffusion
palettes = {mode: get_spec(mode).palette.shape for mode in DATASET_MODES if mode != "custom"}
model, diffusion = create_model_and_diffusion(
    image_size=16, num_classes=4, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8",
    no_instance=True,
)
output = model(torch.zeros(1, 3, 16, 16), torch.tensor([3]), y=torch.zeros(1, 4, 16, 16))
found = dict(file=guided_diffusion.__file__, modules=modules, palettes=palettes, output=output.shape)
print(json.dumps(found))
"""


def test_it_works_from_another_folder(wheel, tmp_path):
    """All modules, all class lists and a small network, with the installed folder on the path and not the checkout."""
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command("-m", "pip", "install", "--no-deps", "--target", installed, wheel, cwd=elsewhere)
    found = json.loads(command("-c", PROGRAM, cwd=elsewhere, PYTHONPATH=str(installed)))
    assert Path(found["file"]).is_relative_to(installed)
    package = REPOSITORY / "guided_diffusion"
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in modules} - {"guided_diffusion"}
    assert set(found["modules"]) == modules and "guided_diffusion.data.specs" in modules
    assert found["palettes"] == {"ade20k": [151, 3], "cityscapes": [35, 3], "celeba": [19, 3], "coco": [183, 3]}
    assert found["output"] == [1, 3, 16, 16]
