"""Every command that a page, a script or its header names: the file is there, starts, and knows the flags."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("assets", "benchmarks", "docs", "evaluations", "guided_diffusion", "scripts", "tests")
PAGES = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "evaluations", "benchmarks") for path in ROOT.glob(f"{folder}/*.md")),
]
PYTHON = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))]
SHELL = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.sh")]
PARTS = ("guided_diffusion/", "tests/failing_rank.py")  # run by others, with arguments of their own
PROGRAMS = sorted(
    name
    for path in PYTHON
    if not (name := path.relative_to(ROOT).as_posix()).startswith(PARTS)
    and "\nif __name__ ==" in path.read_text(encoding="utf-8")
)

# All libraries are imported once; each program then runs as a fork of this one, in a fresh main module, all at a time.
HELP = """
import importlib, json, os, runpy, sys, tempfile

for name in ("torch", "torchvision", "scipy.spatial", "matplotlib.figure", "guided_diffusion.train_util"):
    try:
        importlib.import_module(name)
    except ImportError:  # the program that needs it will say so
        pass
started = {}
for program in sys.argv[1:]:
    output = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv, sys.path[0] = [program, "--help"], os.path.dirname(os.path.abspath(program))
            runpy.run_path(program, run_name="__main__")
            status = 3  # it should have ended after its usage
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    started[program] = child, output
ends = {}
for program, (child, output) in started.items():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output.seek(0)
    ends[program] = status, output.read().decode()
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str]]:
    """Exit status and output of every program with --help."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", HELP, *PROGRAMS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_programs_are_those_of_the_repository():
    assert {"image_train.py", "image_sample.py", "scripts/data/verify_data.py", "evaluations/miou.py"} <= set(PROGRAMS)
    assert not {"scripts/data/preparation.py", "benchmarks/plain_training.py"} & set(PROGRAMS)  # imported by others


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(helps, program):
    status, output = helps[program]
    assert status == 0, output
    assert output.startswith(f"usage: {Path(program).name} ")


def text_of(path: Path) -> str:
    """What a reader takes commands from: a page, a shell script, the docstring of a Python file."""
    text = path.read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "" if path.suffix == ".py" else text).replace("\\\n", " ")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [*PAGES, *PYTHON, *SHELL], ids=relative)
def test_what_is_named_exists(helps, page):
    text = text_of(page)
    named = set(re.findall(r"\b(?:python3?|bash|source) ((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b", text))
    if page.name != "CHANGELOG.md":  # which names old places too
        named |= set(re.findall(rf"(?<![\w./])((?:{'|'.join(FOLDERS)})/[\w/-]+\.(?:py|sh|md))\b", text))
    assert not {name for name in named if not (ROOT / name).is_file()}
    for program, line in re.findall(r"\bpython3? ((?:[\w-]+/)*[\w-]+\.py)\b([^\n|;&`]*)", text):
        known = helps[program][1] + (ROOT / program).read_text(encoding="utf-8")  # a sub-command's flags: the source
        flags = set(re.findall(r"(?<![\w-])--(\w+)", line))
        assert flags <= set(re.findall(r"--(\w+)", known)), (program, line)


def test_the_pages_name_commands():
    """The patterns above do find the commands: these stand on the pages for sure."""
    text = "\n".join(text_of(path) for path in PAGES)
    assert {"image_train.py", "image_sample.py"} <= set(re.findall(r"python (\S+\.py)", text))
    assert "bash scripts/quickstart.sh" in text and "python scripts/data/verify_data.py" in text


def test_the_changelog_tells_where_things_went():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w./]+)` \| `([\w./]+)`", text, re.M)
    for before, now in rows:
        paths = (before, now) if "/" in now else (f"guided_diffusion/{p.replace('.', '/')}.py" for p in (before, now))
        before, now = paths
        assert not (ROOT / before).exists() and (ROOT / now).is_file(), (before, now)
    assert len(rows) == 12 + 19  # scripts, modules
