"""Kills a tiny training again and again (kill -9) and checks that it ends as if nobody had.

    python scripts/cluster/kill_test.py --kills 50 --ranks 2

An undisturbed run goes first. Then the same command is started again after every kill, at moments spread at random over
the whole run: while it starts, steps, validates, writes and publishes. After each start it must have continued from the
newest checkpoint that is complete by this script's own reckoning; in the end every tensor of weights, averages and
optimizer must equal the undisturbed run's, bit for bit, and so must the figures. Exit status 0: all of that was so.

    python scripts/cluster/kill_test.py --kills 50 --ends kill photographs loader backward diverging

Other ends beside `kill -9`: the photographs vanish, a process that loads data is killed, or one rank fails in its
backward pass, while the others wait for its gradients. From these a run must end by itself, with the last step that it
has logged saved. `diverging`: one more run takes steps that are not finite; its
good checkpoint must stay, and the next start go on from it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guided_diffusion.data.own_files import is_temporary  # noqa: E402
from guided_diffusion.train_util import TrainLoop  # noqa: E402 - imported once, inherited by every forked run

SIDE, CLASSES, RATE = 16, 4, "0.9"
ENDS = ("kill", "photographs", "loader", "backward", "diverging")
SECONDS_TO_END = 120.0  # within which a run must have ended that cannot go on
TIMED = ("images_per_second",)  # figures that differ from run to run


class KillTestFailed(AssertionError):
    """The run did not go on as it should have."""


def make_data(folder: Path) -> None:
    """Random blocks: what the training learns does not matter here."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photograph = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            labels = rng.integers(0, CLASSES, (4, 4), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
            Image.fromarray(photograph).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(folder / split / "labels" / f"{i}.png")


def command(data: Path, logdir: Path, ranks: int, steps: int, **changes: object) -> list[str]:
    """The arguments of image_train.py: global batch 4, a checkpoint every second step."""
    settings = dict(
        data_dir=data, dataset_mode="custom", logdir=logdir, num_workers=0, image_size=SIDE, num_classes=CLASSES,
        no_instance=True, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions=8,
        num_head_channels=32, learn_sigma=True, diffusion_steps=50, dropout=0.1, drop_rate=0.2, lr=1e-3,
        schedule_sampler="loss-second-moment", batch_size=4 // ranks, ema_rate=RATE, max_steps=steps, log_interval=1,
        save_interval=2, keep_checkpoints=3, val_images=2,
    )  # fmt: skip
    return [part for name, value in (settings | changes).items() for part in (f"--{name}", str(value))]


def wish(log: Path, rank: int) -> Path:
    """The file at the sight of which a rank fails in its backward pass."""
    return log.with_suffix(f".rank{rank}-shall-fail")


def _fail_at_sight(path: Path) -> None:
    """For every loop of this process, in the last gradient of a step: those of other layers are on their way."""

    def look(_: torch.Tensor) -> None:
        if path.exists():
            raise torch.OutOfMemoryError("none is left, says the kill test")

    def run(loop: TrainLoop, begin: Callable[[TrainLoop], bool] = TrainLoop.run) -> bool:
        next(loop.model.parameters()).register_hook(look)
        return begin(loop)

    TrainLoop.run = run


def _run_rank(arguments: list[str], variables: dict[str, str], log: Path, rank: int) -> None:
    _fail_at_sight(wish(log, rank))
    torch.set_num_threads(1)  # threads of the parent's pool do not exist in a fork
    os.environ |= variables
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["image_train.py", *arguments]
    runpy.run_path(str(ROOT / "image_train.py"), run_name="__main__")


def start(arguments: list[str], ranks: int, log: Path) -> list[multiprocessing.Process]:
    """The ranks of one run, forked from this process, which has done the imports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(ranks):
        variables = dict(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        process = context.Process(target=_run_rank, args=(arguments, variables if ranks > 1 else {}, log, rank))
        process.start()
        processes.append(process)
    return processes


def run_through(arguments: list[str], ranks: int, log: Path) -> list[int | None]:
    """The exit statuses of the ranks of one run that nobody disturbs."""
    processes = start(arguments, ranks, log)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def rescues(logdir: Path) -> list[int]:
    """The steps at which the run has said that it ended by a failure, with all saved."""
    text = (logdir / "log.txt").read_text() if (logdir / "log.txt").exists() else ""
    if lost := re.search(r"ended at step .*nothing (?:is|could be) saved.*", text):
        raise KillTestFailed(lost[0])
    return [int(step) for step in re.findall(r"ended at step (\d+);", text)]


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it is done
        return []


def fail(kind: str, data: Path, logdir: Path, processes: list[multiprocessing.Process], rng: random.Random) -> int:
    """Lets a run fail in another way than by a kill of its ranks; returns how many steps' saves it told of (0: it had
    not begun, or was done before it noticed). Raises KillTestFailed."""
    before, photographs = len(rescues(logdir)), data / "train" / "images"
    rank = rng.choice(processes)
    wished = wish(logdir.with_suffix(".log"), processes.index(rank))
    if kind == "photographs":
        photographs.rename(data / "elsewhere")
    elif kind == "backward":
        wished.touch()
    end = time.monotonic() + SECONDS_TO_END
    while kind == "loader" and rank.is_alive() and time.monotonic() < end:  # those that it has yet to start, too
        for child in children_of(rank.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    if kind == "photographs":
        (data / "elsewhere").rename(photographs)
    wished.unlink(missing_ok=True)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    if hanging:
        raise KillTestFailed(f"{len(hanging)} rank(s) had not ended {SECONDS_TO_END:.0f} s after: {kind}")
    statuses = [process.exitcode for process in processes]
    if not set(statuses) <= {0, 1}:
        raise KillTestFailed(f"{kind}: the ranks ended with {statuses}")
    told, saved, logged = rescues(logdir)[before:], newest_complete(logdir), last_row(logdir)
    if told and not told[0] == saved == logged:
        raise KillTestFailed(f"{kind}: said to be saved at step {told[0]}, complete is {saved}, logged {logged}")
    return len(told)


def newest_complete(logdir: Path) -> int:
    """The step of the newest whole checkpoint, found without the code that is under test; 0: there is none."""
    for path in sorted(logdir.glob("checkpoint*.json"), key=lambda path: int(path.stem[10:]), reverse=True):
        manifest = json.loads(path.read_text())
        if all(
            (logdir / name).exists() and hashlib.sha256((logdir / name).read_bytes()).hexdigest() == expected["sha256"]
            for name, expected in manifest["files"].items()
        ):
            return manifest["step"]
    return 0


def last_row(logdir: Path) -> int:
    """The last step that the run has logged so far."""
    try:
        return json.loads((logdir / "progress.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def started_at(logdir: Path, starts: int) -> int | None:
    """At which step the `starts`-th start went on, from its log; None: it has not said so yet."""
    text = (logdir / "log.txt").read_text() if (logdir / "log.txt").exists() else ""
    said = [line for line in text.splitlines() if "continuing this log directory" in line or "new weights" in line]
    if len(said) < starts:
        return None
    return 0 if "new weights" in said[-1] else int(said[-1].rsplit(" ", 1)[1])


def state(logdir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint and of what is published beside it."""
    tensors: dict[str, torch.Tensor] = {}

    def collect(name: str, tree: object) -> None:
        if isinstance(tree, torch.Tensor):
            tensors[name] = tree
        elif isinstance(tree, dict):
            for key, value in tree.items():
                collect(f"{name}/{key}", value)

    for name in (f"model{step:06d}", f"ema_{RATE}_{step:06d}", f"opt{step:06d}", "model", f"ema_{RATE}_best"):
        collect(name, torch.load(logdir / f"{name}.pt", weights_only=True))
    return tensors


def rows(logdir: Path) -> list[dict[str, float]]:
    """All logged figures but the times. A row after a restart has the means since the restart: with a row for every
    step, they are the same."""
    lines = (logdir / "progress.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def check_end(reference: Path, killed: Path, steps: int) -> int:
    """Compares both runs' ends; returns the number of tensors compared. Raises KillTestFailed."""
    expected, found = state(reference, steps), state(killed, steps)
    if expected.keys() != found.keys():
        raise KillTestFailed(f"other tensors: {sorted(expected.keys() ^ found.keys())[:5]}")
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    if differing:
        raise KillTestFailed(f"{len(differing)} of {len(expected)} tensors differ, for example {differing[0]}")
    if rows(reference) != rows(killed):
        raise KillTestFailed(f"the figures differ: {reference}/progress.jsonl, {killed}/progress.jsonl")
    leftovers = [path.name for path in killed.iterdir() if is_temporary(path.name)]
    if leftovers:
        raise KillTestFailed(f"temporary files are left: {leftovers}")
    return len(expected)


def kill_and_restart(
    arguments: list[str], data: Path, logdir: Path, ranks: int, kills: int, steps: int, ends: list[str],
    rng: random.Random,
) -> tuple[int, int]:  # fmt: skip
    """Runs to the end through `kills` ends of these kinds; returns at how many different steps the starts went on, and
    how many ends were told with all saved."""
    told = 0
    log = logdir.with_suffix(".log")
    moments = sorted(rng.uniform(0, steps - 4) for _ in range(kills))
    continued = set()
    starts = 0
    for moment in tqdm([*moments, None], desc="kills", unit="start"):
        expected = newest_complete(logdir)
        processes = start(arguments, ranks, log)
        kind = rng.choice(ends)
        early = moment is not None and rng.random() < 0.15  # some die while they start
        while moment is not None and not early and last_row(logdir) < moment:
            if any(process.exitcode not in (None, 0) for process in processes):
                raise KillTestFailed(f"a rank ended by itself: see {log}")
            time.sleep(0.01)
        if moment is not None:
            time.sleep(rng.uniform(0, 0.5))
        if moment is not None and kind != "kill":
            told += fail(kind, data, logdir, processes, rng)
        elif moment is not None:
            for process in rng.sample(processes, ranks):
                os.kill(process.pid, signal.SIGKILL)
                if (
                    process is processes[0]
                ):  # else it could save the step, but not measure it as an undisturbed run does
                    time.sleep(rng.uniform(0, 0.02))  # the others may yet notice
        for process in processes:
            process.join()
        if moment is None and any(process.exitcode for process in processes):
            raise KillTestFailed(f"the last start ended with {[p.exitcode for p in processes]}: see {log}")
        at = started_at(logdir, starts + 1)
        if at is not None:
            starts += 1
            continued.add(at)
            if at != expected:
                raise KillTestFailed(f"start {starts} went on at step {at}, but step {expected} is complete")
    return len(continued), told


def check_divergence(data: Path, folder: Path, ranks: int) -> None:
    """A learning rate that is far too high, after two good steps, and the run that goes on without it. Raises
    KillTestFailed."""
    diverged, reference, log = folder / "diverged", folder / "not_diverged", folder / "diverged.log"
    high = dict(lr=1e30, max_bad_steps=4, keep_checkpoints=1)
    for logdir, steps, changes, expected in (
        (reference, 6, {}, 0), (diverged, 2, {}, 0), (diverged, 20, high, 1), (diverged, 6, {}, 0),
    ):  # fmt: skip
        statuses = run_through(command(data, logdir, ranks, steps, **changes), ranks, log)
        if set(statuses) != {expected}:
            raise KillTestFailed(f"{steps} steps with {changes} ended with {statuses}: see {log}")
        if changes and (state(diverged, 2).keys() != state(reference, 2).keys() or not same_latest(diverged, 2)):
            raise KillTestFailed(f"the good checkpoint of step 2 is not the latest any more in {diverged}")
    check_end(reference, diverged, 6)


def same_latest(logdir: Path, step: int) -> bool:
    return (logdir / "model.pt").read_bytes() == (logdir / f"model{step:06d}.pt").read_bytes()


def run(folder: Path, kills: int, ranks: int, ends: list[str], seed: int = 0) -> str:
    """The whole test; returns one line of what was found. Raises KillTestFailed."""
    data, reference, killed = folder / "data", folder / "undisturbed", folder / "killed"
    steps = max(6, 2 * kills)
    make_data(data)
    if any(run_through(command(data, reference, ranks, steps), ranks, folder / "undisturbed.log")):
        raise KillTestFailed(f"the undisturbed run failed: see {folder / 'undisturbed.log'}")
    arguments = command(data, killed, ranks, steps, num_workers=int("loader" in ends))
    kinds, rng = [kind for kind in ends if kind != "diverging"] or ["kill"], random.Random(seed)
    continued, told = kill_and_restart(arguments, data, killed, ranks, kills, steps, kinds, rng)
    tensors = check_end(reference, killed, steps)
    if "diverging" in ends:
        check_divergence(data, folder, ranks)
    return (
        f"{ranks} rank(s), {kills} ends ({', '.join(ends)}; {told} of them told with all saved) over {steps} steps, "
        f"continued at {continued} different steps: every start "
        f"from the newest complete checkpoint; {tensors} tensors and all figures equal, bit for bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ends", nargs="+", default=["kill"], choices=ENDS, help="what may end a run, beside kills")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="work in this (new) folder and keep it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kill_test_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(run(folder, args.kills, args.ranks, args.ends, args.seed))
    except KillTestFailed as error:
        sys.exit(f"FAILED: {error}")
    if args.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
