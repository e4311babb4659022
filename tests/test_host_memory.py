"""Memory that is freed and asked for again."""

import subprocess
import sys

import pytest

from guided_diffusion.hosts import memory
from guided_diffusion.hosts.memory import keep_freed_memory

STEPS = """
import ctypes, resource, sys
from guided_diffusion.hosts.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    blocks = [libc.malloc(20_000_000) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, 20_000_000)
    for block in blocks:
        libc.free(block)
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
def test_pages_are_faulted_in_once():
    """Three more steps over 200 MB of 4 KB pages: some 150,000 faults, or next to none. Straight from malloc: where
    torch's tensors lie decides how often the default gives memory back."""
    faults = {}
    for how in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert 10 * faults["keep"] < faults["default"], faults


@pytest.mark.parametrize(
    "groups,files,left",
    [
        ("0::/job\n", {"job/memory.max": 1000, "job/memory.current": 700, "job/memory.stat": "inactive_file 50"}, 350),
        ("0::/job\n", {"job/memory.max": "max", "job/memory.current": 700, "job/memory.stat": ""}, float("inf")),
        (
            "4:memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": 1000,
                "memory/job/memory.usage_in_bytes": 400,
                "memory/job/memory.stat": "total_inactive_file 0",
            },
            600,
        ),
        (
            "0::/job/step/task\n",  # SLURM's leaf has no limit of its own
            {
                "job/memory.max": 1000,
                "job/memory.current": 900,
                "job/memory.stat": "inactive_file 0",
                "job/step/task/memory.max": "max",
            },
            100,
        ),
        ("0::/\n", {}, float("inf")),
    ],
)
def test_a_containers_memory_counts_not_its_hosts(tmp_path, groups, files, left):
    (tmp_path / "own").write_text(groups)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert memory._free_in_group(str(tmp_path), str(tmp_path / "own")) == left
