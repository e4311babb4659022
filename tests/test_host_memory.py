"""Memory that is freed and asked for again."""

import subprocess
import sys

import pytest

from guided_diffusion.host_memory import keep_freed_memory

STEPS = """
import resource, sys, torch
from guided_diffusion.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(5_000_000) for _ in range(10)]  # 200 MB in blocks of 20 MB
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
def test_pages_are_faulted_in_once():
    """Three more steps over 200 MB of 4 KB pages: some 150,000 faults, or next to none."""
    faults = {}
    for how in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert 10 * faults["keep"] < faults["default"], faults
