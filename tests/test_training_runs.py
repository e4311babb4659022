"""Real runs of image_train.py: ranks, kills, signals, refusals. (`scripts/cluster/kill_test.py` kills at length.)"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_helpers import (
    ROOT,
    differing,
    environment,
    finish,
    flags,
    free_port,
    launch,
    make_loop,
    state_of,
    train,
    wait_for,
)

from guided_diffusion.dist_util import mpi_available
from guided_diffusion.image_datasets import training_batches
from guided_diffusion.runs.stop_signals import EXIT_UNFINISHED
from guided_diffusion.weights import store

MPIEXEC = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))
OTHER_ENDS = "photographs loader backward diverging"
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or not mpi_available(), reason="no mpiexec, or no MPI library for mpi4py"
)


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """Four steps of one rank with batch 4; checkpoints at steps 2 and 4."""
    logdir = tmp_path_factory.mktemp("one")
    make_loop(data, logdir, max_steps=4, save_interval=2).run()
    return logdir


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """The same of two ranks with batch 2, started by mpiexec where there is one."""
    folder = tmp_path_factory.mktemp("two")
    arguments = flags(data, folder / "run", batch_size=2, max_steps=4, save_interval=2)
    if MPIEXEC is None or not mpi_available():
        assert train(arguments, ranks=2) == [0, 0]
    else:
        mpiexec(arguments, folder / "log")
        assert "2 processes (started by mpiexec)" in (folder / "log").read_text()
    return folder / "run"


def mpiexec(arguments: list[str], log: Path) -> None:
    with open(log, "w") as output:
        command = [MPIEXEC, "-n", "2", sys.executable, *arguments]
        assert subprocess.run(command, env=environment(), stdout=output, stderr=output).returncode == 0, log.read_text()


def test_two_ranks_equal_one_to_rounding(one_rank, two_ranks):
    one, two = (
        [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
        for folder in (one_rank, two_ranks)
    )
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a.get("samples")) == (b["step"], b.get("samples"))
        assert a.keys() == b.keys()
        for name in {"loss", "mse", "vb", "grad_norm", "param_norm", "val_loss_0.9"} & a.keys():
            # Adam divides by the gradient's own size, so rounding moves single weights by a share of lr = 1e-3
            assert a[name] == pytest.approx(b[name], rel=2e-3), name
    mean, largest = weight_differences(one_rank, two_ranks, 4)
    assert mean < 1e-5 and largest < 2e-3  # 4 steps of 1e-3: other samples would differ by 1e-3 in the mean


def weight_differences(one: Path, other: Path, step: int) -> tuple[float, float]:
    a, b = (torch.load(folder / store.model_name(step), weights_only=True) for folder in (one, other))
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    return float(differences.mean()), float(differences.max())


def test_half_and_resume_equals_the_whole_for_two_ranks_and_sharding_changes_nothing(data, two_ranks, tmp_path):
    """The first half has the plain optimizer and plain processes, the second the sharded one under torchrun."""
    arguments = flags(data, tmp_path, batch_size=2, save_interval=2)
    assert train([*arguments, "--max_steps", "2"], ranks=2) == [0, 0]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *arguments, "--max_steps", "4", "--shard_optimizer", "True"]
    assert finish([subprocess.Popen([sys.executable, *command], env=environment())]) == [0]
    assert "started by torchrun" in (tmp_path / "log.txt").read_text()
    assert differing(state_of(two_ranks, 4), state_of(tmp_path, 4)) == []


def test_another_number_of_ranks_on_resume(data, one_rank, two_ranks, tmp_path):
    """One rank goes on where two stopped: as if it had been two, to rounding."""
    for path in two_ranks.glob("*000002*"):
        shutil.copy(path, tmp_path)
    shutil.copy(two_ranks / "config.json", tmp_path)
    make_loop(data, tmp_path, max_steps=4).run()
    assert "saved with 2 ranks" in (tmp_path / "log.txt").read_text()
    mean, largest = weight_differences(tmp_path, two_ranks, 4)
    assert mean < 1e-5 and largest < 2e-3


@pytest.mark.parametrize(("ranks", "kills", "ends"), [(1, 2, "kill"), (2, 2, "kill"), (2, 4, OTHER_ENDS)])
def test_kills_at_random_moments(ranks, kills, ends, tmp_path):
    """In a process of its own: it forks, which one that has computed on several threads must not."""
    script = ["scripts/cluster/kill_test.py", "--kills", str(kills), "--ranks", str(ranks), "--seed", str(ranks)]
    script += ["--ends", *ends.split()]
    result = subprocess.run(
        [sys.executable, *script, "--keep", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0 and "bit for bit" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_in_order(data, tmp_path, number):
    """SIGTERM to one of two ranks, as a job manager may do it; SIGINT to a single process that has no last step."""
    ranks, last_step, status = (2, 10**6, EXIT_UNFINISHED) if number == signal.SIGTERM else (1, 0, 0)
    arguments = flags(data, tmp_path / "run", batch_size=2, max_steps=last_step)
    processes = launch(arguments, ranks, tmp_path / "log")
    wait_for(
        lambda: (tmp_path / "run" / "progress.jsonl").exists() and (tmp_path / "run/progress.jsonl").stat().st_size
    )
    processes[-1].send_signal(number)
    assert finish(processes) == [status] * ranks
    assert f"stopped by {number.name}" in (tmp_path / "run" / "log.txt").read_text()
    manifest = store.newest_complete(str(tmp_path / "run"), print)
    assert manifest["step"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_loaders_processes_too_saves(data, tmp_path, number):
    """SLURM and Open MPI signal a rank's children as well: they must go on until the state is saved."""
    (process,) = launch(flags(data, tmp_path / "run", batch_size=2, num_workers=1), log=tmp_path / "log")
    rows = tmp_path / "run" / "progress.jsonl"
    wait_for(lambda: rows.exists() and rows.stat().st_size)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    for pid in (*map(int, children), process.pid):
        os.kill(pid, number)
    assert finish([process]) == [0], (tmp_path / "log.0").read_text()
    assert f"stopped by {number.name}" in (tmp_path / "run" / "log.txt").read_text()


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_mpiexec_passes_a_signal_on(data, tmp_path, number):
    command = [MPIEXEC, "-n", "2", sys.executable, *flags(data, tmp_path, batch_size=2)]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    wait_for(lambda: (tmp_path / "progress.jsonl").exists() and (tmp_path / "progress.jsonl").stat().st_size)
    process.send_signal(number)
    finish([process])
    assert f"stopped by {number.name}" in (tmp_path / "log.txt").read_text(), (tmp_path / "output").read_text()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_other(data, tmp_path, dead):
    processes = launch(flags(data, tmp_path / "run", batch_size=2), 2, tmp_path / "log")
    wait_for(
        lambda: (tmp_path / "run" / "progress.jsonl").exists() and (tmp_path / "run/progress.jsonl").stat().st_size
    )
    processes[dead].kill()
    statuses = finish(processes, 60)
    assert statuses[dead] == -signal.SIGKILL
    assert statuses[1 - dead] == 1  # -9 would mean: it still hung after a minute
    said = (tmp_path / f"log.{1 - dead}").read_text()
    if dead == 1:
        manifest = store.newest_complete(str(tmp_path / "run"), print)
        rows = (tmp_path / "run" / "progress.jsonl").read_text().splitlines()
        assert manifest["step"] >= json.loads(rows[-1])["step"] > 0 and "lost contact" in manifest["emergency"]
    # Rank 0 hosts the store, through which they tell of each other.
    assert re.search("ending, because " + ("rank 1 .*no sign of life" if dead == 1 else ".*rank 0"), said), said


def test_bad_data_on_one_rank_ends_both(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "labels" / "scene3.png").write_bytes(b"no picture")
    statuses = train(flags(tmp_path / "data", tmp_path / "run", batch_size=2), 2, tmp_path / "log")
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert statuses == [1, 1], said
    assert all("scene3.png" in text and "Traceback" not in text for text in said), said


def launch_each(commands: list[list[str]], log: Path) -> list[int]:
    """Ranks with a command each; their exit statuses."""
    port = str(free_port())
    processes = []
    for rank, command in enumerate(commands):
        variables = dict(RANK=str(rank), WORLD_SIZE=str(len(commands)), LOCAL_RANK=str(rank))
        variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with open(f"{log}.{rank}", "w") as output:
            processes.append(
                subprocess.Popen([sys.executable, *command], env=environment(**variables), stdout=output, stderr=output)
            )
    return finish(processes, 60)


@pytest.mark.parametrize("program", ["image_train.py", "image_sample.py"])
def test_ranks_with_different_settings_name_the_first_difference(data, tmp_path, program):
    """Neither trains, nor waits for the other."""
    if program == "image_train.py":
        common = flags(data, tmp_path / "run", batch_size=2)
        others = [[*common, "--max_steps", "4"], [*common, "--max_steps", "8"]]
        expected = "of max_steps, rank 0 has --max_steps 4 and rank 1 has --max_steps 8"
    else:
        common = [str(ROOT / program), "--model_path", "m.pt", "--results_path", str(tmp_path / "run")]
        others = [common, [*common, "--s", "2"]]
        expected = "of s, rank 0 has none and rank 1 has --s 2.0"
    statuses = launch_each(others, tmp_path / "log")
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert statuses == [1, 1] and all(expected in text and "Traceback" not in text for text in said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_load_its_batch_saves_with_the_others(data, tmp_path, rank):
    dataset = make_loop(data, tmp_path / "unused").dataset
    batches = training_batches(dataset, batch_size=2, rank=rank, world_size=2, num_workers=0)._batches
    name = [next(batches)["name"] for _ in range(2)][1][0]  # the first epoch has each scene once
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "labels" / f"{name}.png").write_bytes(b"no picture")
    statuses = train(flags(tmp_path / "data", tmp_path / "run", batch_size=2), 2, tmp_path / "log")
    said = [(tmp_path / f"log.{r}").read_text() for r in range(2)]
    assert statuses == [1, 1] and all(name in text and "Traceback" not in text for text in said), said
    manifest = store.newest_complete(str(tmp_path / "run"), print)
    assert manifest["step"] == 1 and manifest["emergency"].startswith(f"rank {rank}: DataError")


@pytest.mark.parametrize(
    "settings,said",
    [
        (dict(num_classes=7), r"--num_classes 7 contradicts the checkpoint, which was trained with num_classes 4"),
        (dict(num_channels=64), r"--num_channels 64 contradicts .* num_channels 32"),
        (dict(no_instance=False), r"--no_instance False contradicts .* no_instance True"),
        (dict(data_dir="nowhere"), r"nowhere"),
        (dict(schedule_sampler="x"), r"unknown schedule_sampler 'x'"),
        (dict(precision="fp64"), r"unknown precision 'fp64'"),
        (dict(resume_checkpoint="nowhere/model.pt"), r"there is no checkpoint nowhere/model\.pt"),
    ],
)
def test_what_is_refused_is_named_and_leaves_nothing(data, one_rank, tmp_path, settings, said, monkeypatch, capsys):
    """In this process: the entry point as it is, without the seconds of its start."""
    import image_train

    settings = {"resume_checkpoint": one_rank / "model.pt", **settings}
    monkeypatch.setattr(sys, "argv", flags(data, tmp_path / "run", **settings))
    with pytest.raises(SystemExit) as error:
        image_train.main()
    assert re.search(said, str(error.value))
    assert not (tmp_path / "run").exists()


def test_the_data_set_tells_the_number_of_classes(data, tmp_path, monkeypatch):
    """Without --num_classes; and where nothing tells it, it is asked for, instead of 151 being taken."""
    import image_train

    shutil.copytree(data, tmp_path / "data")
    arguments = flags(tmp_path / "data", tmp_path / "run", max_steps=1)
    at = arguments.index("--num_classes")
    monkeypatch.setattr(sys, "argv", arguments[:at] + arguments[at + 2 :])
    with pytest.raises(SystemExit, match=r"needs num_classes, or classes in .*dataset\.json"):
        image_train.main()
    names = [f"class {i}" for i in range(6)]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"classes": names}))
    image_train.main()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["num_classes"] == 6


def test_the_precision_may_change_and_is_remembered(data, tmp_path, monkeypatch):
    """A run begun with --use_fp16 goes on with --precision bf16, and then without either flag."""
    import image_train

    for step, settings in enumerate((dict(use_fp16=True), dict(precision="bf16"), {}), start=1):
        monkeypatch.setattr(sys, "argv", flags(data, tmp_path, max_steps=step, **settings))
        image_train.main()
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model"]["use_fp16"] == (step == 1)
        assert config["training"]["precision"] == ("" if step == 1 else "bf16")


def test_instance_maps_in_one_split_only_are_refused(data, tmp_path, monkeypatch):
    import image_train

    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "train" / "labels", tmp_path / "data" / "train" / "instances")
    monkeypatch.setattr(sys, "argv", flags(tmp_path / "data", tmp_path / "run", no_instance=False))
    with pytest.raises(SystemExit, match="the training split has instance maps, the validation split has none"):
        image_train.main()


def test_fine_tuning_goes_on_from_model_pt(data, one_rank, tmp_path, monkeypatch):
    """Train, fine-tune with label drop in a folder of its own, fine-tune again from there; started twice each."""
    import image_train

    before = one_rank / "model.pt"
    for name in ("first", "second"):
        logdir = tmp_path / name
        for last_step in (1, 2):
            settings = dict(resume_checkpoint=before, drop_rate=0.2, max_steps=last_step)
            monkeypatch.setattr(sys, "argv", flags(data, logdir, **settings))
            image_train.main()
        text = (logdir / "log.txt").read_text()
        assert f"starting a new run from the weights in {before}" in text
        assert "continuing this log directory's run at step 1" in text
        assert json.loads((logdir / "config.json").read_text())["training"]["drop_rate"] == 0.2
        before = logdir / "model.pt"
    assert os.path.samefile(before, tmp_path / "second" / "model000002.pt")


@needs_mpi
def test_whatever_fails_on_one_rank_its_steps_are_saved_and_the_run_ends_in_the_same_weights(data, tmp_path):
    """One run, which fails at another place after every step; by a rank alone, or by all ranks together."""
    settings = dict(
        batch_size=2, max_steps=5, schedule_sampler="loss-second-moment", sample_interval=3, save_interval=4
    )
    # Where, which rank, and after which step.
    failures = [
        ("forward", 1, 1, "Broken: injected"),
        ("backward", 0, 2, "Broken: injected"),
        ("preview", 0, 3, "Broken: injected"),
        ("validation", 1, 4, "Broken: injected"),
        ("save", 0, 5, "CheckpointError: .*Input/output error"),
    ]
    mpiexec(flags(data, tmp_path / "whole", **settings), tmp_path / "whole.log")
    arguments = flags(data, tmp_path / "run", **settings)[1:]
    for place, rank, step, error in failures:
        script = [sys.executable, str(ROOT / "tests" / "failing_rank.py"), place, str(rank), str(step)]
        command = [MPIEXEC, "-n", "2", *script, *arguments]
        result = subprocess.run(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
        )
        told = (tmp_path / "run" / "log.txt").read_text()
        assert result.returncode != 0, (place, result.stdout)
        assert re.search(f"ended at step {step}; all is saved. The reason: rank {rank}: {error}", told), result.stdout
        assert re.search(f"rank {1 - rank}: ending, because rank {rank}.*: {error}", result.stdout), result.stdout
        manifest = store.newest_complete(str(tmp_path / "run"), print)
        assert manifest["step"] == step and re.match(f"rank {rank}: {error}", manifest["emergency"])
    assert differing(state_of(tmp_path / "whole", 5), state_of(tmp_path / "run", 5)) == []


def failing_ranks(place: str, rank: int, step: int, arguments: list[str], log: Path) -> list[int]:
    """Two ranks of which one fails (`failing_rank.py`); their exit statuses."""
    return train([str(ROOT / "tests" / "failing_rank.py"), place, str(rank), str(step), *arguments[1:]], 2, log)


def test_a_rank_that_fails_with_a_part_of_the_optimizer_saves_the_weights_and_removes_nothing(data, tmp_path):
    arguments = flags(data, tmp_path / "run", batch_size=2, shard_optimizer=True, save_interval=2, keep_checkpoints=1)
    assert failing_ranks("backward", 1, 3, arguments, tmp_path / "log") == [1, 1]
    manifest = store.newest_complete(str(tmp_path / "run"), print)
    assert manifest["step"] == 3 and store.optimizer_name(3) not in manifest["files"]
    assert "all is saved but the optimizer's state" in (tmp_path / "run" / "log.txt").read_text()
    assert store.damage(str(tmp_path / "run"), 2) is None  # the whole one before


def test_weights_that_one_rank_was_changing_are_saved_by_the_other(data, two_ranks, tmp_path):
    """Rank 1 fails in the midst of its fourth step, rank 0 has taken it."""
    arguments = flags(data, tmp_path / "run", batch_size=2, save_interval=2)
    assert failing_ranks("optimizer", 1, 3, arguments, tmp_path / "log") == [1, 1]
    assert "lost contact" in store.newest_complete(str(tmp_path / "run"), print)["emergency"]
    assert differing(state_of(two_ranks, 4), state_of(tmp_path / "run", 4)) == []
