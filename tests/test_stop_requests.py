"""How the ranks tell each other of a signal: all at the same step, soon, and seldom."""

import signal
import threading

import pytest

from guided_diffusion.runs import stop_signals
from guided_diffusion.runs.stop_signals import ASKING_SECONDS, StopRequests, StopSignals


class Clock:
    """A rank's own time, of which a step takes as much as it is told."""

    def __init__(self):
        self.local = threading.local()

    def monotonic(self):
        return getattr(self.local, "now", 0.0)


class Ranks:
    """Ranks in threads, whose gather waits for all."""

    def __init__(self, size):
        self.size, self.barrier, self.values, self.asked = size, threading.Barrier(size, timeout=20), {}, 0

    def world(self, rank):
        def gather(value):
            self.values[rank] = value
            self.asked += rank == 0
            self.barrier.wait()
            values = [self.values[other] for other in range(self.size)]
            self.barrier.wait()
            return values

        return type("World", (), dict(size=self.size, rank=rank, gather=staticmethod(gather)))()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stop_signals, "time", clock)
    return clock


def run(clock, seconds, signal_at=None, steps=2000):
    """Trains ranks whose steps take `seconds[rank](step)`; the signal comes to the last one during step `signal_at`.

    Returns each rank's (step, time) of the end, when the signal came, and how often they asked.
    """
    ranks, ends, came = Ranks(len(seconds)), {}, []

    def train(rank):
        clock.local.now = 0.0
        signals = StopSignals()
        requests = StopRequests(signals, ranks.world(rank))
        for step in range(1, steps + 1):
            clock.local.now += seconds[rank](step)
            if step == signal_at and rank == len(seconds) - 1:
                signals.received = signal.SIGTERM
                came.append(clock.local.now)
            number = requests.after_step()
            if number:
                assert number == signal.SIGTERM
                break
        ends[rank] = step, clock.local.now

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(len(seconds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends, came, ranks.asked


@pytest.mark.parametrize("step_seconds", [0.003, 0.05, 0.4, 7.0])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_in_time(clock, step_seconds):
    ends, (came,), _ = run(clock, [lambda step: step_seconds] * 3, signal_at=700)
    assert len({step for step, _ in ends.values()}) == 1 and len(ends) == 3
    assert all(0 <= now - came <= ASKING_SECONDS + step_seconds for _, now in ends.values())


def test_the_slowest_rank_counts_and_a_start_that_seems_fast_does_no_harm(clock):
    """A host that runs ahead of its device measures steps that are too short at first, and an interval of its own would
    part the ranks."""
    ends, (came,), _ = run(clock, [lambda step: 0.001, lambda step: 0.0001 if step < 8 else 0.5], signal_at=300)
    assert len({step for step, _ in ends.values()}) == 1
    assert ends[1][1] - came <= 2 * ASKING_SECONDS


def test_fast_steps_are_seldom_disturbed(clock):
    _, _, asked = run(clock, [lambda step: 0.01] * 2, steps=2000)  # 20 seconds
    assert asked <= 30


def test_one_process_looks_after_every_step():
    signals = StopSignals()
    requests = StopRequests(signals, type("World", (), dict(size=1))())
    assert [requests.after_step() for _ in range(3)] == [0, 0, 0]
    signals.received = signal.SIGINT
    assert requests.after_step() == signal.SIGINT
