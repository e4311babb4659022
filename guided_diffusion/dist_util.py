"""Processes: who they are, which device each uses, and what they say to each other.

The only module that knows MPI and process groups. Ranks come from torchrun's or SLURM's environment or from MPI
(`mpiexec`), else there is one. Control messages go over gloo on the CPU, gradients over NCCL where there are GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from .hosts.addresses import interface_towards, routable_address, slurm_address
from .hosts.rank_monitor import RankMonitor, RemoteError

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)  # a save or a validation on one rank may keep the others waiting
CONTROL_TIMEOUT = datetime.timedelta(days=7)
MPI_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK")


class World:
    """This process among the processes of the run.

    `rank` of `size`; `local_rank` within its host; `device` is this rank's GPU, or the CPU. With one process every
    method is trivial and no process group exists.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, launcher: str = "python"):
        self.rank, self.size, self.local_rank, self.launcher = rank, size, local_rank, launcher
        # One of several chooses when the others can hear of a failure: in _connect.
        self.device = _choose_device(local_rank) if size == 1 else torch.device("cpu")
        self._control: dist.ProcessGroup | None = None
        self._monitor: RankMonitor | None = None
        self._heard: Exception | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """One line for the log."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        line = f"{self.size} process{'es' if self.size > 1 else ''} (started by {self.launcher}), rank 0 on {device}"
        if self.launcher == "python" and not mpi_available():
            line += "; MPI is not installed (pip install mpi4py mpich), so there can be no more"
        return line

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

    def collect_trees(self, tree: Any) -> list[Any]:
        """Every rank's nested dicts, lists and tuples with CPU tensors in them, by rank, on rank 0; empty elsewhere. A
        collective."""
        tensors: list[torch.Tensor] = []
        skeletons = self.gather(_map_tensors(tree, lambda t: _Slot(tensors, t)))
        if not self.is_main:
            for tensor in tensors:
                dist.send(tensor, dst=0, group=self._control)
            return []
        trees = [tree]
        for rank in range(1, self.size):
            received: list[torch.Tensor] = []
            trees.append(
                _map_slots(skeletons[rank], lambda slot: _append(received, torch.empty(slot.shape, dtype=slot.dtype)))  # noqa: B023
            )
            for tensor in received:
                dist.recv(tensor, src=rank, group=self._control)
        return trees

    def sharing_memory(self) -> int:
        """How many ranks share the memory of this rank's device: all of a host's, on the CPU. A collective."""
        place = (socket.gethostname(), _device_identity(self.device))
        return self.gather(place).count(place)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def together(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on every rank, for what each does without the others; an exception on one is raised on all. A
        collective.

        :raises RemoteError: on the ranks where it succeeded, if it raised something on another.
        """
        if self.size == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except Exception as exception:  # whatever it is, every rank must hear of it
            error = exception
        if self.any(error is not None):
            said = self.gather(None if error is None else in_words(error))
            rank, text = next((rank, text) for rank, text in enumerate(said) if text is not None)
            self._heard = RemoteError(f"rank {rank}: {text}") if error is None else error
            raise self._heard
        return result

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 and hands its result to all; an exception ends every rank. A collective.

        :raises RemoteError: on the other ranks, where it raised something on rank 0.
        """
        return self.broadcast_tree(self.together(lambda: action() if self.is_main else None))

    def all_heard(self, error: BaseException) -> bool:
        """Whether every rank has raised at the same place as this one, so that they can still do something together.

        False for an exception of this rank alone: the others wait for it, and do not know.
        """
        return self.size == 1 or error is self._heard

    @contextlib.contextmanager
    def acting_alone(self) -> Iterator[bool]:
        """For one rank, the first that comes, to save what the run has: whether this is the one. Until it has left,
        no other ends."""
        if self._monitor is None:
            yield True
            return
        try:
            yield self._monitor.claim()
        finally:
            self._monitor.release()

    @contextlib.contextmanager
    def guard(self, sentence: Callable[[BaseException], str] | None = None) -> Iterator[None]:
        """While it is open, no rank outlives another for long: a failure is told to all, a death is noticed.

        On leaving in order, the process group is closed.

        :param sentence: what one of several ranks shall print of its failure, which it does before the others may end:
            mpiexec kills all once one has.
        """
        try:
            yield
            self.barrier()  # a rank that has finished must not look like one that died
        except BaseException as error:
            if self._monitor is not None:
                self._monitor.report(error, self.all_heard(error), sentence(error) if sentence else "")
            raise
        if self._monitor is not None:
            self._monitor.stop()
        if self.size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def report_errors(world: World, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """`world.guard()`; for the errors a user can mend, their message alone and exit status 1 in place of a trace."""

    def sentence(error: BaseException) -> str:
        if isinstance(error, RemoteError):
            return f"rank {world.rank}: ending, because {error}"
        if isinstance(error, expected):
            return "error: " + " ".join(str(error).splitlines())  # one line, whatever names and values it quotes
        return "".join(traceback.format_exception(error)) if isinstance(error, Exception) else ""

    try:
        with world.guard(sentence):
            yield
    except Exception as error:
        if world.size == 1:
            sys.exit(sentence(error))
        sys.stdout.flush()
        os._exit(1)  # at once, since an orderly end would wait for the others


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def setup() -> World:
    """Finds out how this process was started and connects it to the others.

    :raises RuntimeError: an MPI launcher started it, but mpi4py cannot be imported or belongs to another MPI.
    """
    environment = os.environ
    # Containers may say that they are one of one, whatever mpiexec starts in them.
    alone = environment.get("WORLD_SIZE") == "1" and _mpi_size(environment) > 1
    if "RANK" in environment and "WORLD_SIZE" in environment and "MASTER_ADDR" in environment and not alone:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        world = World(rank, size, int(environment.get("LOCAL_RANK", 0)), "torchrun")
        # torchrun's agent may host the store itself.
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return _connect(world, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), hosted=hosted)
    if any(name in environment for name in MPI_VARIABLES):
        world = _setup_mpi()
        if world is not None:
            return world
    # srun alone sets the number of tasks of the step; in a batch script the job's number is there with one process.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if size > 1:
        world = World(int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), "srun")
        return _connect(world, *slurm_address(environment))
    return World()


def mpi_available() -> bool:
    """Whether `mpiexec` could start several processes of this program: mpi4py is installed and finds its library."""
    # In a process of its own: importing mpi4py.MPI initializes MPI.
    try:
        return (
            subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, timeout=30).returncode
            == 0
        )
    except subprocess.TimeoutExpired:  # it is there, but does not work outside its launcher
        return True


def _setup_mpi() -> World | None:
    """The world that mpiexec made; None where srun only looks like it (its variables, but no MPI among the tasks)."""
    step_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if step_tasks > 1:
            return None
        raise RuntimeError(
            f"this process was started by mpiexec, but mpi4py cannot be used ({error}). "
            "Install both: pip install mpi4py mpich"
        ) from error
    comm = MPI.COMM_WORLD
    expected = _mpi_size(os.environ)
    if comm.Get_size() == 1 and max(expected, step_tasks) > 1:
        if step_tasks > 1:
            return None
        raise RuntimeError(
            f"mpiexec started {expected} processes, but mpi4py sees one: it belongs to another MPI than this mpiexec "
            f"({MPI.Get_library_version().splitlines()[0]}). Use the mpiexec of that MPI, or torchrun."
        )
    local_rank = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    rank, size = comm.Get_rank(), comm.Get_size()
    if size == 1:
        MPI.Finalize()
        return World(rank, size, local_rank, "mpiexec")
    hosts = comm.allgather(socket.gethostname())
    store, meeting, error = None, None, None
    if rank == 0:
        try:
            # A container's world of one names itself.
            given = os.environ.get("MASTER_ADDR") if os.environ.get("WORLD_SIZE") != "1" else None
            address = given or ("127.0.0.1" if len(set(hosts)) == 1 else routable_address())
            store = dist.TCPStore("0.0.0.0", 0, size, is_master=True, wait_for_workers=False)
            meeting = address, store.port
        except (OSError, RuntimeError) as failure:  # the others wait for an answer
            error = str(failure)
    meeting, error = comm.bcast((meeting, error))
    # MPI has introduced the ranks; its part is over. Finalized at exit instead, a failing rank would wait there for one
    # that is gone; and the loader's workers are forks, which MPI does not like.
    MPI.Finalize()
    if error is not None:
        raise RuntimeError(f"rank 0 cannot open a meeting point for the ranks: {error}")
    return _connect(World(rank, size, local_rank, "mpiexec"), *meeting, store=store)


def _mpi_size(environment: Mapping[str, str]) -> int:
    """How many processes MPI's launcher says it started; 1 where it says nothing."""
    return max(int(environment.get(name, 1)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))


def _connect(world: World, address: str, port: int, *, store: dist.Store | None = None, hosted: bool = False) -> World:
    """Joins the ranks at a store on rank 0's host: `store` where it is made already; `hosted`: by somebody else."""
    if world.size == 1:
        return world
    if store is None:
        store = dist.TCPStore(address, port, world.size, is_master=world.is_main and not hosted, wait_for_workers=False)
    interface = interface_towards(address)
    if interface is not None:  # gloo would take the one of the host's name, which may be the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # keys of an attempt before must not be read
    # A client of its own: the monitor's thread must never wait for a lock that the main thread holds.
    client = dist.TCPStore(address, port, world.size, is_master=False, wait_for_workers=False)
    unusable = None
    try:  # before the monitor, whose heart would stand still while the driver starts
        world.device = _choose_device(world.local_rank)
    except RuntimeError as error:
        unusable = error
    world._monitor = RankMonitor(dist.PrefixStore(f"monitor{attempt}", client), world.rank, world.size)
    try:
        if unusable is not None:
            raise unusable
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"group{attempt}", store),
            rank=world.rank,
            world_size=world.size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        # The monitor notices a dead rank; a slow one (sampling, validating) may keep the others waiting for long.
        world._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        _check_gpus(world)
    except BaseException as error:
        world._monitor.report(error)
        raise
    return world


def _device_identity(device: torch.device) -> str:
    """A GPU's own number: its index may be 0 for every rank that sees one GPU only."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(device)


def _check_gpus(world: World) -> None:
    """:raises RuntimeError: two ranks have come to the same GPU. A collective."""
    if world.device.type != "cuda":
        return
    mine = (socket.gethostname(), _device_identity(world.device))
    others = world.gather(mine)
    if len(set(others)) < len(others):
        raise RuntimeError(
            f"{len(others)} ranks share {len(set(others))} GPUs: start as many ranks per host as there are GPUs "
            "(mpiexec -n), or hide the GPUs with CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )


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
