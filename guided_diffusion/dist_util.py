"""Processes: who they are, which device each uses, and what they say to each other.

The only module that knows MPI and process groups. Ranks come from torchrun's or SLURM's environment or from MPI
(`mpiexec`), else there is one. Control messages go over gloo on the CPU, gradients over NCCL where there are GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 30.0
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)  # a save or a validation on one rank may keep the others waiting
MPI_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK")


class World:
    """This process among the processes of the run.

    `rank` of `size`; `local_rank` within its host; `device` is this rank's GPU, or the CPU. With one process every
    method is trivial and no process group exists.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, launcher: str = "python"):
        self.rank, self.size, self.local_rank, self.launcher = rank, size, local_rank, launcher
        self.device = _choose_device(local_rank)
        self._control: dist.ProcessGroup | None = None
        self._monitor: _Monitor | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """One line for the log."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.size} process{'es' if self.size > 1 else ''} (started by {self.launcher}), rank 0 on {device}"

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. A collective."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """The largest of the ranks' integers. A collective."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return int(tensor)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a CPU tensor over the ranks, in place. A collective."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._control)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, by rank, on every rank. A collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's (picklable) value, on every rank. A collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def broadcast_tree(self, tree: Any) -> Any:
        """Rank 0's nested dicts, lists and tuples with CPU tensors in them, on every rank; tensors travel as tensors.
        A collective."""
        if self.size == 1:
            return tree
        tensors: list[torch.Tensor] = []
        skeleton = self.broadcast(_map_tensors(tree, lambda t: _Slot(tensors, t)) if self.is_main else None)
        if not self.is_main:
            skeleton = _map_slots(skeleton, lambda slot: _append(tensors, torch.empty(slot.shape, dtype=slot.dtype)))
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=self._control)
        return tree if self.is_main else skeleton

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 and hands its result to all; its exception is raised on every rank. A collective."""
        if self.size == 1:
            return action()
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as exception:  # whatever it is, every rank must hear of it
                error = exception
        message = self.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if message is not None:
            raise RemoteError(f"rank 0: {message}")
        return self.broadcast(result)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """While it is open, no rank outlives another for long: a failure is told to all, a death is noticed.

        On leaving in order, the process group is closed.
        """
        try:
            yield
        except BaseException as error:
            if self._monitor is not None:
                self._monitor.report(error)
            raise
        if self._monitor is not None:
            self._monitor.stop()
        if self.size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def report_errors(world: World, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """`world.guard()`; for the errors a user can mend, their message alone and exit status 1 in place of a trace."""
    try:
        with world.guard():
            yield
    except RemoteError as error:
        sys.exit(f"rank {world.rank}: ending, because {error}")
    except expected as error:
        sys.exit(f"error: {error}")


class RemoteError(RuntimeError):
    """Something failed on another rank, which has said what."""


def setup() -> World:
    """Finds out how this process was started and connects it to the others.

    :raises RuntimeError: an MPI launcher started it, but mpi4py cannot be imported.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        world = World(rank, size, int(os.environ.get("LOCAL_RANK", 0)), "torchrun")
        return _connect(world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), elastic=True)
    if any(name in os.environ for name in MPI_VARIABLES):
        return _setup_mpi()
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        world = World(rank, size, int(os.environ.get("SLURM_LOCALID", 0)), "srun")
        port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000
        return _connect(world, _first_slurm_host(os.environ["SLURM_NODELIST"]), port)
    return World()


def mpi_available() -> bool:
    """Whether `mpiexec` could start several processes of this program: mpi4py is installed and finds its library."""
    # In a process of its own: importing mpi4py.MPI initializes MPI.
    return subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True).returncode == 0


def _setup_mpi() -> World:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"this process was started by mpiexec, but mpi4py cannot be used ({error}). "
            "Install both: pip install mpi4py mpich"
        ) from error
    comm = MPI.COMM_WORLD
    local_rank = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    world = World(comm.Get_rank(), comm.Get_size(), local_rank, "mpiexec")
    if world.size == 1:
        return world
    hosts = comm.allgather(socket.gethostname())
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(set(hosts)) == 1 else _routable_address())
    store = None
    if world.is_main:
        store = dist.TCPStore("0.0.0.0", 0, world.size, is_master=True, wait_for_workers=False)
    address, port = comm.bcast((address, store.port if store is not None else None))
    return _connect(world, address, port, store=store)


def _connect(world: World, address: str, port: int, *, store: dist.Store | None = None, elastic: bool = False) -> World:
    if world.size == 1 and not elastic:
        return world
    if world.size == 1:
        world.launcher = "torchrun"
        return world
    # torchrun's agent may host the store itself.
    hosted = elastic and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if store is None:
        store = dist.TCPStore(address, port, world.size, is_master=world.is_main and not hosted, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # keys of an attempt before must not be read
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"group{attempt}", store),
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    world._control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    # A client of its own: the monitor's thread must never wait for a lock that the main thread holds.
    client = dist.TCPStore(address, port, world.size, is_master=False, wait_for_workers=False)
    world._monitor = _Monitor(dist.PrefixStore(f"monitor{attempt}", client), world)
    return world


def _choose_device(local_rank: int) -> torch.device:
    """This rank's GPU among those that CUDA_VISIBLE_DEVICES allows, by its rank within the host; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Some launchers show each rank its own GPU only: then there is nothing to choose.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise RuntimeError(
            f"rank {local_rank} of this host has no GPU of its own: {count} are visible "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start {count} ranks per host"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _routable_address() -> str:
    """An address of this host that other hosts can reach."""
    address = socket.gethostbyname(socket.gethostname())
    if not address.startswith("127."):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing; asks the kernel which address it would send from
        return probe.getsockname()[0]


def _first_slurm_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: "node[03-05,07],gpu1" -> "node03"."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodelist)
    name, numbers = match.group(1), match.group(2)
    return name + re.split(r"[,-]", numbers)[0] if numbers else name


class _Slot:
    """Stands for a tensor while a tree travels as an object."""

    def __init__(self, tensors: list[torch.Tensor], tensor: torch.Tensor):
        tensors.append(tensor.contiguous())
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def __reduce__(self):
        return _slot, (self.shape, self.dtype)


def _slot(shape: tuple[int, ...], dtype: torch.dtype) -> _Slot:
    slot = object.__new__(_Slot)
    slot.shape, slot.dtype = shape, dtype
    return slot


def _append(tensors: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    tensors.append(tensor)
    return tensor


def _map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map_leaves(value, kind, function) for value in tree)
    return tree


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    return _map_leaves(tree, torch.Tensor, function)


def _map_slots(tree: Any, function: Callable[[_Slot], Any]) -> Any:
    return _map_leaves(tree, _Slot, function)


class _Monitor:
    """A thread that shows this rank to be alive and ends the process when another one fails or dies.

    Without it, ranks would wait for a dead one inside a collective until that times out.
    """

    def __init__(self, store: dist.Store, world: World):
        self.store, self.rank, self.size = store, world.rank, world.size
        self.host = socket.gethostname()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="rank monitor")
        self.thread.start()

    def _watch(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in range(self.size) if rank != self.rank}
        beats = 0
        while not self.stopped.wait(BEAT_SECONDS):
            beats += 1
            try:
                self.store.set(f"beat{self.rank}", f"{beats}@{self.host}")
                reason = self._failure(seen)
            except (RuntimeError, dist.DistError):
                reason = "the rank that hosts the run's rendezvous (rank 0, or torchrun's agent) cannot be reached"
            if reason is not None:
                # A failing rank's own message comes first; a rank that is ending in order is let go.
                if not self.stopped.wait(2 * BEAT_SECONDS):
                    _end_process(self.rank, reason)
                return

    def _failure(self, seen: dict[int, tuple[str, float]]) -> str | None:
        if self.store.check(["failure"]):
            return self.store.get("failure").decode()
        now = time.monotonic()
        for rank, (last, since) in seen.items():
            beat = self.store.get(f"beat{rank}").decode() if self.store.check([f"beat{rank}"]) else ""
            if beat != last:
                seen[rank] = (beat, now)
            elif beat == "done":
                continue
            elif now - since > DEAD_AFTER_SECONDS:
                host = beat.partition("@")[2] or "unknown"
                return f"rank {rank} (host {host}) has given no sign of life for {now - since:.0f} s"
        return None

    def report(self, error: BaseException) -> None:
        """Tells the other ranks that this one fails."""
        text = f"rank {self.rank} (host {self.host}) failed: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            if not isinstance(error, RemoteError) and not self.store.check(["failure"]) and not _lost_contact(error):
                self.store.set("failure", text)
        if _lost_contact(error):
            # This rank saw a connection close. Its monitor finds out whose, and names it.
            print(f"rank {self.rank}: lost contact with another rank; finding out which", file=sys.stderr, flush=True)
            self.thread.join(DEAD_AFTER_SECONDS + 5 * BEAT_SECONDS)
        self.stop()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join(2 * BEAT_SECONDS)
        with contextlib.suppress(Exception):
            self.store.set(f"beat{self.rank}", "done")


def _lost_contact(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("connection closed by peer", "connection reset", "gloo", "nccl", "socket timeout")
    )


def _end_process(rank: int, reason: str) -> None:
    print(f"rank {rank}: ending, because {reason}", file=sys.stderr, flush=True)
    os._exit(1)
