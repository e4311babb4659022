"""Who may import whom inside guided_diffusion: the model and its maths know nothing of MPI, logging, files or PIL."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "guided_diffusion"

ALLOWED = {
    "nn": set(),
    "losses": set(),
    "conditioning": set(),
    "seeding": set(),
    "resample": set(),
    "samplers": set(),
    "fp16_util": set(),
    "logger": set(),
    "dataset_specs": set(),
    "pictures": set(),
    "parallel": set(),
    "image_listing": {"dataset_specs"},
    "image_transforms": {"dataset_specs", "image_listing"},
    "image_datasets": {"dataset_specs", "image_listing", "image_transforms"},
    "spade": {"nn"},
    "label_layout": {"nn", "spade"},
    "unet": {"nn", "spade"},
    "gaussian_diffusion": {"nn", "losses", "samplers"},
    "respace": {"gaussian_diffusion"},
    "settings": {"resample"},
    "script_util": {"gaussian_diffusion", "respace", "settings", "unet"},
}
PURE = {
    "nn", "losses", "conditioning", "samplers", "spade", "label_layout", "unet", "gaussian_diffusion", "respace",
    "resample", "settings",
}  # fmt: skip
IMPURE = {"mpi4py", "PIL", "blobfile", "logging", "torch.distributed", "guided_diffusion.logger"}


def imports(module: str) -> tuple[set[str], set[str]]:
    """(modules of ours, other modules) that `module` imports anywhere in its text."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            ours |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return ours, others


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_stay_within_the_map(module):
    ours, _ = imports(module)
    assert ours <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_maths_is_pure(module):
    _, others = imports(module)
    assert not {name for name in others if any(name == bad or name.startswith(bad + ".") for bad in IMPURE)}


def test_mpi_is_known_to_one_module():
    users = {path.stem for path in PACKAGE.glob("*.py") if any(o.startswith("mpi4py") for o in imports(path.stem)[1])}
    assert users == {"dist_util"}


@pytest.mark.parametrize("script", ["image_train.py", "image_sample.py"])
def test_entry_points_stay_thin(script):
    assert len((PACKAGE.parent / script).read_text(encoding="utf-8").splitlines()) <= 100


def test_evaluators_do_not_need_the_package():
    for path in (PACKAGE.parent / "evaluations").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        names = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}
        assert not {name for name in names if name.startswith("guided_diffusion")}
