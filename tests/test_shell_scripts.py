"""The shell scripts: what they start, and what they refuse before they have started or written anything."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("benchmarks/*.sh")))
# Every variable that a script takes from the environment. A number has here the least that means something.
NUMBERS = {"RANKS": 1, "TRAIN_STEPS": 0, "FINETUNE_STEPS": 0, "NUM_SAMPLES": 1, "SEED": 0, "STEPS": 4}
TEXTS = {
    "CAMVID", "DATA", "EXTRA", "OUT", "OUTPUT", "PARTS", "PRECISION", "PREDICT", "PYTHON", "QUICKSTART", "RESULTS",
    "SIZE", "VENV", "PYTHONPATH", "OMP_NUM_THREADS",  # the last two belong to others: OpenMP takes lists, too
}  # fmt: skip
BENCHMARK_NUMBERS = ("RANKS", "TRAIN_STEPS", "FINETUNE_STEPS", "NUM_SAMPLES")
NUMBERS_OF = {f"scripts/{name}.sh": BENCHMARK_NUMBERS for name in ("ade20k", "cityscapes", "celeba", "coco")}
NUMBERS_OF |= {"scripts/quickstart.sh": ("RANKS", "STEPS"), "scripts/camvid.sh": ("RANKS", "STEPS", "SEED")}
NUMBERS_OF |= {"benchmarks/gpu.sh": ("RANKS", "STEPS", "SEED")}


def shell(script: str, *arguments: str, commands: Path, root: Path = ROOT, **environment: str | None):
    """A script with programs that only note their arguments; returns its end and the noted commands.

    :param environment: variables to set; None takes one out.
    """
    commands.mkdir(parents=True)
    notes = commands / "notes"
    for name in ("mpiexec", "python", "python3", "nvidia-smi"):
        (commands / name).write_text(f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\" '--end--' >> '{notes}'\n")
        (commands / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "VENV": "none", "RANKS": "2", **environment}
    done = subprocess.run(
        ["bash", str(root / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
        env={name: value for name, value in variables.items() if value is not None},
    )
    noted = notes.read_text().split("--end--\n")[:-1] if notes.exists() else []
    return done, [command.splitlines() for command in noted]


def flag(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the shell scripts where a test can see whether anything was written."""
    root = tmp_path_factory.mktemp("checkout")
    for path in SCRIPTS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    (root / "setup.py").write_text("")
    return root


def refused(checkout: Path, tmp_path: Path, script: str, *arguments: str, **environment: str | None) -> str:
    """What a script says that ends at once: with status 2, one line, no program started, no file written."""
    before = sorted(checkout.rglob("*"))
    given = {"VENV": None, "RANKS": None, "CAMVID": str(checkout), **environment}
    done, commands = shell(script, *arguments, commands=tmp_path / "bin", root=checkout, **given)
    assert done.returncode == 2 and not done.stdout, (done.stdout, done.stderr)
    assert not commands and sorted(checkout.rglob("*")) == before
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_every_variable_of_the_environment_is_known_here():
    own = r"\$\{([A-Z][A-Z0-9_]+)(?::?[-+?])"  # ${NAME:-default} and its like: taken from outside
    found = {name for path in SCRIPTS for name in re.findall(own, (ROOT / path).read_text(encoding="utf-8"))}
    assert found - {"BASH_SOURCE"} <= NUMBERS.keys() | TEXTS
    for script in SCRIPTS:
        if script.name in ("common.sh", "run_benchmark.sh"):
            continue  # parts of the others
        text, names = (ROOT / script).read_text(encoding="utf-8"), NUMBERS_OF.get(str(script), ())
        text += (ROOT / "scripts/run_benchmark.sh").read_text(encoding="utf-8") if "/run_benchmark.sh" in text else ""
        assert set(re.findall(r"check_number ([A-Z_]+)", text)) == set(names), script
        assert {name for name in re.findall(own, text) if name in NUMBERS} <= set(names), script


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "1e3", "08", "2 3", "9" * 30, "a[$(touch written)]"])
@pytest.mark.parametrize("script", NUMBERS_OF)
def test_what_is_no_number_is_refused(checkout, tmp_path, script, value):
    for name in NUMBERS_OF[script]:
        said = refused(checkout, tmp_path / name, script, **{name: value})
        assert said.startswith(f"error: {name} is {value or 'empty'}; give a ") and f"leave {name} unset" in said


@pytest.mark.parametrize("script", NUMBERS_OF)
def test_numbers_that_are_too_small_are_refused(checkout, tmp_path, script):
    for name in NUMBERS_OF[script]:
        if NUMBERS[name]:  # 0 of the others is checked by what runs with it, below
            said = refused(checkout, tmp_path / name, script, **{name: str(NUMBERS[name] - 1)})
            assert said.startswith(f"error: {name} is {NUMBERS[name] - 1}; give a ")


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("scripts/quickstart.sh", {"STEPS": "3"}, "STEPS is 3; give a whole number, 4 or more (its 4th part"),
        ("scripts/quickstart.sh", {"PREDICT": "x"}, "PREDICT is x; choose v, xstart or eps"),
        # a quarter of the steps is compared at the end: a save must fall on it
        ("scripts/camvid.sh", {"STEPS": "1000"}, "STEPS is 1000; give a multiple of 24, 24 or more (its 4th, 6th"),
        ("scripts/camvid.sh", {"STEPS": "0"}, "STEPS is 0; give a multiple of 24"),
        ("scripts/camvid.sh", {"SEED": "one"}, "SEED is one; give a whole number, 0 or more"),
        ("scripts/camvid.sh", {"PREDICT": "x"}, "PREDICT is x; choose v, xstart or eps"),
        ("scripts/camvid.sh", {"SIZE": "big"}, "SIZE is big; choose cpu or gpu"),
        ("scripts/camvid.sh", {"RANKS": "9"}, "RANKS is 9; the 8 images of a step leave some without work"),
        ("scripts/camvid.sh", {"CAMVID": ""}, "CAMVID is empty, no folder; name that of CamVid"),
        ("scripts/camvid.sh", {"CAMVID": None}, "CAMVID is empty, no folder; name that of CamVid"),
        ("scripts/camvid.sh", {"CAMVID": "not/there"}, "CAMVID is not/there, no folder"),
        ("benchmarks/gpu.sh", {"CAMVID": ""}, "CAMVID is empty, no folder; name that of CamVid, or leave CAMVID unset"),
        ("benchmarks/gpu.sh", {"STEPS": "100"}, "STEPS is 100; give a multiple of 24"),
        ("benchmarks/gpu.sh", {"PARTS": "tests other"}, "PARTS has other; choose from tests sampling"),
    ],
)
def test_settings_that_mean_nothing_are_refused(checkout, tmp_path, script, environment, message):
    assert refused(checkout, tmp_path, script, **environment).startswith(f"error: {message}")


def test_the_gpus_parts_go_on_without_camvid(checkout, tmp_path):
    done, commands = shell(
        "benchmarks/gpu.sh", str(tmp_path / "out"), commands=tmp_path / "bin", root=checkout, CAMVID=None
    )
    assert done.returncode == 0, done.stderr
    assert [command[0] for command in commands] == ["nvidia-smi", *["python"] * 4]


def test_the_quickstarts_folder_may_have_a_space(tmp_path):
    out = tmp_path / "a folder"
    done, commands = shell("scripts/quickstart.sh", commands=tmp_path / "bin", STEPS="4", QUICKSTART=str(out))
    assert done.returncode == 0, done.stderr
    launched = [command for command in commands if command[0] == "mpiexec"]
    assert [flag(command, "data_dir") for command in launched] == [f"{out}/data"] * 3
    assert [flag(command, "max_steps") for command in launched[:2]] == ["4", "1"]
    assert flag(launched[2], "results_path") == f"{out}/results"
    assert not [word for command in launched for word in command if word.startswith(("a ", "folder"))]


@pytest.mark.parametrize(("predict", "words"), [("v", "predict_v True"), ("xstart", "predict_xstart True")])
def test_the_quickstart_predicts_what_it_is_told(tmp_path, predict, words):
    done, commands = shell(
        "scripts/quickstart.sh", commands=tmp_path / "bin", PREDICT=predict, QUICKSTART=str(tmp_path / "out")
    )
    launched = [" ".join(command) for command in commands if command[0] == "mpiexec"]
    assert done.returncode == 0 and len(launched) == 3 and all(f"--{words}" in command for command in launched)
    assert not any(f"--predict_{'xstart' if predict == 'v' else 'v'} True" in command for command in launched)


@pytest.mark.parametrize("script", ["ade20k", "cityscapes", "celeba", "coco"])
def test_the_folders_of_a_benchmark_may_have_a_space(tmp_path, script):
    folders = dict(DATA="my data", OUTPUT="my output", RESULTS="my results")
    done, commands = shell(
        f"scripts/{script}.sh",
        "all",
        commands=tmp_path / "bin",
        TRAIN_STEPS="2",
        FINETUNE_STEPS="1",
        EXTRA="--seed 5",
        **folders,
    )
    assert done.returncode == 0, done.stderr
    train, finetune, sample, evaluate = commands
    for command in (train, finetune, sample):
        assert flag(command, "data_dir") == "my data" and flag(command, "seed") == "5"
        assert flag(command, "dataset_mode") == script and flag(command, "use_scale_shift_norm") == "True"
    assert flag(train, "max_steps") == "2" and flag(finetune, "max_steps") == "1"
    assert flag(train, "logdir") == "my output" and flag(finetune, "resume_checkpoint") == "my output/model.pt"
    assert flag(sample, "results_path") == "my results"
    assert evaluate[2:4] == ["my results/images", "my results/samples"]


def test_a_benchmark_may_train_without_end_but_not_all_stages_in_a_row(tmp_path):
    done, commands = shell("scripts/ade20k.sh", "train", commands=tmp_path / "bin", TRAIN_STEPS="0")
    assert done.returncode == 0 and flag(commands[0], "max_steps") == "0" and commands[0][1:3] == ["-n", "2"]
    done, commands = shell("scripts/ade20k.sh", "all", commands=tmp_path / "again", TRAIN_STEPS="0")
    assert done.returncode == 2 and not commands and "set TRAIN_STEPS and FINETUNE_STEPS" in done.stderr
