"""Ranks: how they find each other, talk, and notice that one is gone."""

import os
import re
import signal
import socket
import sys
import time
import types
from pathlib import Path

import pytest
import torch.distributed as dist
from training_helpers import finish, launch, wait_for

from guided_diffusion import dist_util
from guided_diffusion.dist_util import World
from guided_diffusion.hosts import addresses, rank_monitor
from guided_diffusion.hosts.rank_monitor import RankMonitor

TALK = """
import sys, torch
from guided_diffusion import dist_util
world = dist_util.setup()
with world.guard():
    assert world.size == 2 and world.any(world.rank == 1) and not world.any(False) and world.max(3 * world.rank) == 3
    assert world.sum_(torch.tensor([1.0, world.rank])).tolist() == [2.0, 1.0]
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.broadcast("from %d" % world.rank) == "from 0"
    tree = {"a": [torch.arange(6.0).view(2, 3) + world.rank, 7], "b": (torch.tensor(True), "text"), "c": None}
    got = world.broadcast_tree(tree)
    assert torch.equal(got["a"][0], torch.arange(6.0).view(2, 3)) and got["b"][1] == "text" and got["c"] is None
    assert got["b"][0].dtype == torch.bool
    assert torch.equal(world.on_main(lambda: torch.full((3,), float(world.rank))), torch.zeros(3))
    trees = world.collect_trees({"n": [torch.full((world.rank + 1,), float(world.rank)), world.rank]})
    assert len(trees) == (2 if world.is_main else 0)
    for rank, tree in enumerate(trees):
        assert torch.equal(tree["n"][0], torch.full((rank + 1,), float(rank))) and tree["n"][1] == rank
    try:
        world.together(lambda: 1 / (1 - world.rank))
    except Exception as error:
        said = {0: "rank 1: ZeroDivisionError: division by zero", 1: "division by zero"}[world.rank]
        assert str(error) == said and world.all_heard(error) and not world.all_heard(ValueError(said))
    else:
        raise AssertionError("rank 0 has not heard of it")
    assert world.together(lambda: world.rank) == world.rank
    world.barrier()
print("talked")
"""

FAIL = """
import sys
from guided_diffusion import dist_util
world = dist_util.setup()
with dist_util.report_errors(world, (ValueError,)):
    if sys.argv[1] == "on_main":
        def fail():
            raise ValueError("no such layout")
        world.on_main(fail)
    if world.rank == int(sys.argv[1]):
        raise ValueError("no such layout")
    world.barrier()
    world.barrier()
"""


def run(code: str, tmp_path: Path, *arguments: str) -> tuple[list[int], list[str]]:
    statuses = finish(launch(["-c", code, *arguments], ranks=2, log=tmp_path / "log"), 90)
    return statuses, [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]


def test_two_ranks_talk(tmp_path):
    statuses, output = run(TALK, tmp_path)
    assert statuses == [0, 0], output
    assert all("talked" in text for text in output)


@pytest.mark.parametrize("where", ["0", "1", "on_main"])
def test_a_failure_on_one_rank_ends_the_other_with_its_message(tmp_path, where):
    since = time.monotonic()
    statuses, output = run(FAIL, tmp_path, where)
    failing = 1 if where == "1" else 0
    assert statuses == [1, 1], output
    assert time.monotonic() - since < 60
    assert "error: no such layout" in output[failing]
    assert re.search(rf"rank {failing}\b.*ValueError: no such layout", output[1 - failing]), output[1 - failing]
    assert not any("Traceback" in text for text in output)


NO_DEVICE = """
from guided_diffusion import dist_util
def choose(local_rank):
    if local_rank == 1:
        raise RuntimeError("rank 1 of this host has no GPU of its own")
    return torch.device("cpu")
import torch
dist_util._choose_device = choose
dist_util.setup()
"""


SLEEP = """
import sys, time
from guided_diffusion import dist_util
from guided_diffusion.hosts import addresses
from guided_diffusion.hosts import rank_monitor
rank_monitor.BEAT_SECONDS, rank_monitor.DEAD_AFTER_SECONDS = 0.2, 2.0
world = dist_util.setup()
with world.guard():
    print("running", flush=True)
    for _ in range(40):  # a sleep of 4 s would be over when the process goes on
        time.sleep(0.1)
"""


def test_a_run_that_was_suspended_goes_on(tmp_path):
    """SLURM suspends a job by SIGSTOP: for longer than a silent rank is waited for, and no rank is to blame."""
    processes = launch(["-c", SLEEP], ranks=2, log=tmp_path / "log")
    wait_for(lambda: all("running" in (tmp_path / f"log.{rank}").read_text() for rank in range(2)))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            process.send_signal(number)
        time.sleep(4 if number == signal.SIGSTOP else 0)
    assert finish(processes, 60) == [0, 0], [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]


def test_a_rank_without_a_device_does_not_keep_the_others_waiting(tmp_path):
    since = time.monotonic()
    statuses, output = run(NO_DEVICE, tmp_path)
    assert statuses == [1, 1], output
    assert time.monotonic() - since < 60
    assert "no GPU of its own" in output[0] and "no GPU of its own" in output[1]


@pytest.fixture
def monitors(monkeypatch):
    """Monitors of two ranks over one store, with a fast heart; those that end their process say so in `ended`."""
    ended = {}
    monkeypatch.setattr(rank_monitor, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(rank_monitor, "DEAD_AFTER_SECONDS", 0.3)
    monkeypatch.setattr(rank_monitor, "_end_process", ended.setdefault)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [
        RankMonitor(dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False), rank, 2)
        for rank in range(2)
    ]
    yield made, ended
    for monitor in made:
        monitor.stopped.set()
        monitor.thread.join()


def test_living_ranks_leave_each_other_alone(monitors):
    _, ended = monitors
    time.sleep(0.6)
    assert ended == {}


def test_a_rank_that_falls_silent_is_named(monitors):
    (_, other), ended = monitors
    time.sleep(0.1)
    other.stopped.set()  # as after kill -9
    time.sleep(0.8)
    assert re.match(rf"rank 1 \(host {socket.gethostname()}\) has given no sign of life", ended[0])


def test_a_rank_that_ends_in_order_is_let_go(monitors):
    (_, other), ended = monitors
    time.sleep(0.1)
    other.stop()
    time.sleep(0.8)
    assert ended == {}


def test_a_rank_that_fails_is_quoted(monitors):
    (first, _), ended = monitors
    first.report(ValueError("the disk is full"))
    time.sleep(0.3)
    assert re.search(r"rank 0 .* failed: ValueError: the disk is full", ended[1])


def test_while_a_rank_acts_alone_no_other_ends(monitors):
    (first, other), ended = monitors
    assert other.claim() and not first.claim()
    first.store.set("failure", "a third rank has failed")
    time.sleep(0.3)
    assert ended == {}
    other.release()
    time.sleep(0.3)
    assert ended == {0: "a third rank has failed", 1: "a third rank has failed"}


def test_a_rank_that_dies_while_it_acts_alone_is_named(monitors):
    (_, other), ended = monitors
    other.claim()
    other.stopped.set()
    time.sleep(0.8)
    assert re.match(r"rank 1 .* has given no sign of life", ended[0])


def test_a_rank_that_acts_alone_for_too_long_is_ended(monitors, monkeypatch):
    (_, other), ended = monitors
    monkeypatch.setattr(rank_monitor, "SAVING_SECONDS", 0.2)
    other.claim()
    time.sleep(0.8)
    assert "emergency save has taken more than" in ended[1] and re.match(r"rank 1 .* failed: its emergency", ended[0])


def test_one_process_needs_no_group(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("PMI", "OMPI", "SLURM"))] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    world = dist_util.setup()
    assert (world.rank, world.size, world.launcher) == (0, 1, "python")
    assert world.gather(1) == [1] and world.broadcast_tree("x") == "x" and world.on_main(lambda: 5) == 5
    with world.guard():
        world.barrier()


@pytest.mark.parametrize(
    "nodelist,host",
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu7", "gpu1"),
        ("node[03-05,07],gpu1", "node03"),
        ("node[7,9]", "node7"),
        ("rack[2-3]-ib", "rack2-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert addresses._first_slurm_host(nodelist) == host


def test_an_srun_step_is_recognized_and_a_batch_script_is_not(monkeypatch):
    connected = []
    monkeypatch.setattr(dist_util, "_connect", lambda world, *address: connected.append((world, address)) or world)
    for name in [n for n in os.environ if n.startswith(("PMI", "OMPI", "SLURM"))] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    # What a batch script sees: one process, in a job of four tasks
    job = dict(SLURM_JOB_ID="123", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODELIST="n[1-2]")
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert dist_util.setup().size == 1
    # and what srun adds in it
    step = dict(SLURM_STEP_ID="3", SLURM_STEP_NUM_TASKS="4", SLURM_STEP_NODELIST="n[2]", SLURM_PROCID="2")
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    world = dist_util.setup()
    assert (world.rank, world.size, world.launcher) == (2, 4, "srun")
    ((_, (address, port)),) = connected
    assert address == "n2" and 20000 <= port < 40000
    other = addresses.slurm_address({**os.environ, "SLURM_STEP_ID": "4"})
    assert other[1] != port  # two steps of one job at a time


def test_one_of_one_in_the_environment_does_not_hide_mpiexec(monkeypatch):
    """Containers may export torchrun's variables for a world of one; eight such would train side by side."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="h", MASTER_PORT="1", PMI_RANK="3").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_util, "_setup_mpi", lambda: "mpi")
    monkeypatch.setenv("PMI_SIZE", "8")
    assert dist_util.setup() == "mpi"
    monkeypatch.setenv("PMI_SIZE", "1")
    assert dist_util.setup().launcher == "torchrun"


def test_an_mpiexec_of_another_mpi_is_noticed(monkeypatch):
    """Then mpi4py sees one process in each of four: they must not train four times side by side."""
    mpi = types.SimpleNamespace(
        COMM_WORLD=types.SimpleNamespace(Get_size=lambda: 1, Get_rank=lambda: 0),
        Get_library_version=lambda: "MPICH Version: 5",
    )
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match="started 4 processes, but mpi4py sees one"):
        dist_util.setup()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
def test_the_interface_of_an_address():
    assert addresses.interface_towards("127.0.0.1") == "lo"
    assert addresses.interface_towards("no such host.invalid") is None


def test_local_world_describes_itself():
    assert World().describe().startswith("1 process (started by python)")
