"""Who may import whom inside guided_diffusion: rooms are layers, and the maths knows no MPI, logging, files or PIL."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "guided_diffusion"

# Room or module at the door -> what it may import of ours. A room's own modules may import each other. Listed from the
# ground up: an entry names only entries above it, which the first test checks, so that there is no circle.
ALLOWED = {
    "nn": set(),
    "losses": set(),
    "seeding": set(),
    "resample": set(),
    "fp16_util": set(),
    "hosts": set(),
    "logger": {"hosts"},
    "data": {"hosts"},
    "image_datasets": {"data"},
    "layouts": {"nn"},
    "sampling": {"nn", "layouts"},
    "setting_values": set(),
    "settings": {"resample", "sampling", "setting_values"},
    "unet": {"nn", "layouts"},
    "gaussian_diffusion": {"nn", "losses", "sampling"},
    "respace": {"gaussian_diffusion"},
    "script_util": {"gaussian_diffusion", "hosts", "respace", "settings", "unet"},
    "objectives": {"nn", "layouts", "losses", "gaussian_diffusion"},
    "weights": {"data", "hosts", "settings"},
    "dist_util": {"hosts"},
    "pipeline": {
        "data", "fp16_util", "hosts", "layouts", "respace", "sampling", "script_util", "seeding", "settings", "unet",
        "weights",
    },
    "runs": {
        "data", "dist_util", "fp16_util", "hosts", "image_datasets", "layouts", "logger", "objectives", "pipeline",
        "resample", "sampling", "script_util", "seeding", "settings", "unet", "weights",
    },
    "train_util": {
        "data", "dist_util", "fp16_util", "hosts", "image_datasets", "layouts", "logger", "nn", "objectives",
        "resample", "runs", "script_util", "seeding", "settings", "unet", "weights",
    },
}  # fmt: skip
DOOR = {
    "unet", "nn", "gaussian_diffusion", "respace", "resample", "losses", "fp16_util", "image_datasets", "dist_util",
    "logger", "train_util", "script_util", "setting_values", "settings", "pipeline", "seeding",
}  # fmt: skip
PURE = {
    "nn", "losses", "layouts", "sampling", "unet", "gaussian_diffusion", "respace", "resample", "setting_values",
    "settings", "objectives",
}  # fmt: skip
IMPURE = {"mpi4py", "PIL", "blobfile", "logging", "torch.distributed", "guided_diffusion.logger"}


def modules() -> dict[str, pathlib.Path]:
    """Every module below the package, by its dotted name within it."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def place(module: str) -> str:
    """The entry of the table that a module belongs to: its room, or the module itself at the door."""
    return module.split(".")[0]


def imports(module: str) -> tuple[set[str], set[str]]:
    """(modules of ours, other modules) that `module` imports anywhere in its text."""
    ours, others = set(), set()
    here = module.split(".")
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level] + (node.module.split(".") if node.module else [])
            candidates = {".".join([*base, alias.name]) for alias in node.names}
            ours |= {name for name in candidates if name in modules()} or {".".join(base)}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return ours, others


def test_the_table_is_a_stack_of_layers():
    below = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= below, f"{name} may import {sorted(allowed - below)}, which stand above it"
        below.add(name)


def test_every_module_has_a_place():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert {place(module) for module in modules()} | rooms == set(ALLOWED)
    assert {module for module in modules() if "." not in module} == DOOR
    for room in rooms:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert text and "May import" in text and "alled by" in text, f"{room}/__init__.py says what lives there"


@pytest.mark.parametrize("module", modules())
def test_imports_go_downwards(module):
    ours, others = imports(module)
    assert {place(name) for name in ours} - {place(module)} <= ALLOWED[place(module)]
    assert not {name for name in others if name.split(".")[0] == "guided_diffusion"}, "imports within are relative"


def test_no_two_modules_import_each_other():
    edges = {module: imports(module)[0] for module in modules()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in edges.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("module", [module for module in modules() if place(module) in PURE])
def test_the_maths_is_pure(module):
    _, others = imports(module)
    assert not {name for name in others if any(name == bad or name.startswith(bad + ".") for bad in IMPURE)}


def test_mpi_is_known_to_one_module():
    users = {module for module in modules() if any(o.startswith("mpi4py") for o in imports(module)[1])}
    assert users == {"dist_util"}


@pytest.mark.parametrize("script", ["image_train.py", "image_sample.py"])
def test_entry_points_stay_thin(script):
    assert len((PACKAGE.parent / script).read_text(encoding="utf-8").splitlines()) <= 100


def test_evaluators_do_not_need_the_package():
    for path in (PACKAGE.parent / "evaluations").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        names = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}
        assert not {name for name in names if name.startswith("guided_diffusion")}
