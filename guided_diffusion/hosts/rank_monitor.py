"""Ranks watch each other, so that none waits for ever for one that is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 30.0
SAVING_SECONDS = 600.0  # so long may a rank that acts alone keep the others from ending
STARTING_SECONDS = 600.0  # so long may a rank take to start: hosts differ in how fast they read Python's files
SAVING_TOO_LONG = f"its emergency save has taken more than {SAVING_SECONDS:.0f} s"
UNREACHABLE = "the rank that hosts the run's rendezvous (rank 0, or torchrun's agent) cannot be reached"


class RemoteError(RuntimeError):
    """Something failed on another rank, which has said what."""


class RankMonitor:
    """A thread that shows this rank to be alive and ends the process when another one fails or dies.

    Without it, ranks would wait for a dead one inside a collective until that times out. A second thread ends the
    process should the first get no answer any more (rank 0's host lost its power, or the network its cable).
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self.host = socket.gethostname()
        self.stopped = threading.Event()
        self.contact = time.monotonic()
        self.alone_since: float | None = None  # when this rank began to act alone
        store.set(f"beat{rank}", f"0@{self.host}")
        self.thread = threading.Thread(target=self._watch, daemon=True, name="rank monitor")
        self.thread.start()
        threading.Thread(target=self._watch_contact, daemon=True, name="contact monitor").start()

    def _watch(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in range(self.size) if rank != self.rank}
        beats = 0
        while (late := self._next_beat()) is not None:
            beats += 1
            if late > DEAD_AFTER_SECONDS / 3:  # this process was stopped (SLURM's suspend), and so were the others
                seen = {rank: (last, time.monotonic()) for rank, (last, _) in seen.items()}
            try:
                self.store.set(f"beat{self.rank}", f"{beats}@{self.host}")
                reason = self._failure(seen)
                self.contact = time.monotonic()
            except (RuntimeError, dist.DistError):
                reason = UNREACHABLE
            if (alone := self.seconds_alone) is not None:
                reason = SAVING_TOO_LONG if alone > SAVING_SECONDS else None
            if reason is not None:
                # A failing rank's own message comes first; a rank that is ending in order is let go.
                if self.stopped.wait(2 * BEAT_SECONDS):
                    return
                with contextlib.suppress(RuntimeError, dist.DistError):
                    if reason == SAVING_TOO_LONG:
                        self.store.set("failure", f"rank {self.rank} (host {self.host}) failed: {reason}")
                        self.release()
                    else:
                        reason = self._failure(seen)  # a rank that was only suspended has beaten by now
                if reason is not None:
                    self._say_end()
                    _end_process(self.rank, reason)
                    return

    def _watch_contact(self) -> None:
        while (late := self._next_beat()) is not None:
            if late > DEAD_AFTER_SECONDS / 3:
                self.contact = time.monotonic()
            if time.monotonic() - self.contact > DEAD_AFTER_SECONDS + 5 * BEAT_SECONDS and self.seconds_alone is None:
                _end_process(self.rank, UNREACHABLE)

    def _next_beat(self) -> float | None:
        """Waits for one beat; by how many seconds it came late. None once the monitor is stopped."""
        since = time.monotonic()
        return None if self.stopped.wait(BEAT_SECONDS) else time.monotonic() - since - BEAT_SECONDS

    def _failure(self, seen: dict[int, tuple[str, float]]) -> str | None:
        now, lost = time.monotonic(), {}
        for rank, (last, since) in seen.items():
            beat = self._beat(rank)
            if beat != last:
                seen[rank] = (beat, now)
            elif not beat and now - since > STARTING_SECONDS:
                lost[rank] = f"rank {rank} has not started within {STARTING_SECONDS:.0f} s"
            elif beat and beat != "done" and now - since > DEAD_AFTER_SECONDS:
                host = beat.partition("@")[2] or "unknown"
                lost[rank] = f"rank {rank} (host {host}) has given no sign of life for {now - since:.0f} s"
        alone = self._who_acts_alone()
        if alone is not None and alone not in lost:
            return None  # it reports what has happened once it is done
        if self.store.check(["failure"]):
            return self.store.get("failure").decode()
        return next(iter(lost.values()), None)

    def _beat(self, rank: int) -> str:
        return self.store.get(f"beat{rank}").decode() if self.store.check([f"beat{rank}"]) else ""

    @property
    def seconds_alone(self) -> float | None:
        """For how long this rank has acted alone; None: it does not."""
        since = self.alone_since
        return None if since is None else time.monotonic() - since

    def _who_acts_alone(self) -> int | None:
        if self.store.check(["alone"]) and not self.store.check(["alone is done"]):
            return int(self.store.get("alone"))
        return None

    def claim(self) -> bool:
        """Whether this rank is the first that asks to act alone, for the run's last work: then no other ends before
        `release`, or its death, or `SAVING_SECONDS`. False also where the other ranks cannot be asked."""
        try:
            first = self.store.compare_set("alone", "", str(self.rank)).decode() == str(self.rank)
        except (RuntimeError, dist.DistError):
            return False
        self.alone_since = time.monotonic() if first else None
        return first

    def release(self) -> None:
        if self.alone_since is not None:
            self.alone_since = None
            with contextlib.suppress(RuntimeError, dist.DistError):
                self.store.set("alone is done", "")

    def report(self, error: BaseException, all_heard: bool = False, sentence: str = "") -> None:
        """Prints `sentence`, tells the other ranks that this one fails, and stays until they have heard of it.

        Not where they do not know yet (`all_heard`) and none has acted alone: that this one is gone will then wake
        those that wait for it in a collective, and one of them may act.
        """
        text = f"rank {self.rank} (host {self.host}) failed: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # should the one that acts alone die, this rank's own monitor ends it
            while self._who_acts_alone() is not None:
                time.sleep(0.1)
        at_once = not all_heard
        if lost_contact(error):
            # This rank saw a connection close. That rank says why, or the monitor finds out whose it was.
            print(f"rank {self.rank}: lost contact with another rank; finding out which", file=sys.stderr, flush=True)
            self._end_with_the_failure_of_another()
        with contextlib.suppress(Exception):
            if not isinstance(error, RemoteError) and not self.store.check(["failure"]):
                self.store.set("failure", text)
            at_once = at_once and not self.store.check(["alone"])
        if sentence:
            print(sentence, file=sys.stderr, flush=True)
        self._leave(at_once)

    def _end_with_the_failure_of_another(self) -> None:
        end = time.monotonic() + DEAD_AFTER_SECONDS + 5 * BEAT_SECONDS
        with contextlib.suppress(RuntimeError, dist.DistError):
            while self.thread.is_alive() and time.monotonic() < end:
                if self.store.check(["failure"]):
                    reason = self.store.get("failure").decode()
                    self._leave()
                    _end_process(self.rank, reason)
                time.sleep(0.1)
        self.thread.join(max(0.0, end - time.monotonic()))

    def _leave(self, at_once: bool = False) -> None:
        """Stays until the others have heard: mpiexec kills them once one has ended, and this one may host the store."""
        self.stop()
        if at_once and self.rank != 0:
            return
        end, others = time.monotonic() + 4 * BEAT_SECONDS, set(range(self.size)) - {self.rank}
        with contextlib.suppress(Exception):
            while time.monotonic() < end and any(self._beat(rank) != "done" for rank in others):
                time.sleep(0.1)

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join(2 * BEAT_SECONDS)
        self._say_end()

    def _say_end(self) -> None:
        with contextlib.suppress(Exception):
            self.store.set(f"beat{self.rank}", "done")


def lost_contact(error: BaseException) -> bool:
    """Whether a collective has failed because another rank is gone: the failure is that rank's."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("connection closed by peer", "connection reset", "gloo", "nccl", "socket timeout")
    )


def _end_process(rank: int, reason: str) -> None:
    print(f"rank {rank}: ending, because {reason}", file=sys.stderr, flush=True)
    os._exit(1)
