"""Worker threads, kept for a moment after their work, because to start one costs more than a short trace.

An idle worker holds nothing, and ends by itself after `IDLE_SECONDS`.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable
from threading import TIMEOUT_MAX, Lock, Thread
from time import monotonic

from nnatomy.core.openmp import release_helpers

IDLE_SECONDS = 2.0
#: A thread that waits looks so often whether it has been interrupted: `_thread.interrupt_main` sets a flag, and wakes nobody.
POLL_SECONDS = 0.2
#: How long a thread that waits keeps OpenMP's helpers: for shorter, to start them again would take longer than they cost.
HELPERS_SECONDS = 0.01

#: What a worker does: it returns whether the thread may be used again, and what to call once it can be.
Job = Callable[[], tuple[bool, Callable[[], None]]]

_idle: list[Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # a fork inherits the list, not the threads

#: Held until a new thread is at work: so long it has its creator's identifier (CPython 3.11), by which `Interruptible`
#: finds the thread to interrupt.
starting = Lock()
os.register_at_fork(
    before=starting.acquire, after_in_parent=starting.release, after_in_child=starting.release
)


def wait_for(lock: Lock, seconds: float = TIMEOUT_MAX) -> bool:
    """Acquire the lock, if that takes no longer, in this thread, which has nothing to compute meanwhile."""
    if lock.acquire(timeout=min(HELPERS_SECONDS, seconds)):
        return True
    release_helpers()
    end = monotonic() + seconds
    while not lock.acquire(timeout=min(POLL_SECONDS, seconds)):
        if monotonic() >= end:
            return False
    return True


class Worker:
    """A thread that does one job after the other."""

    def __init__(self, job: Job) -> None:
        self._go = Lock()
        self._go.acquire()
        self._job: Job | None = job
        self._gone = False
        begun = Lock()
        begun.acquire()
        with starting:
            _thread.start_new_thread(self._start, (begun,))
            begun.acquire()

    def _start(self, begun: Lock) -> None:
        begun.release()
        # Not from the block's thread: Ctrl-C inside `Thread.start` can leave its lock taken, and the new thread
        # waiting for it for ever. Only the main thread is interrupted.
        try:
            Thread(target=self._work, name="nnatomy-forward", daemon=True).start()
        except RuntimeError:  # no more threads to be had: then this one
            self._work()

    @classmethod
    def start(cls, job: Job) -> None:
        """Run `job` in a worker: the one that has been idle for the shortest time, or a new one."""
        try:
            worker = _idle.pop()
        except IndexError:
            cls(job)
            return
        worker._job = job
        if worker._gone:
            cls(job)  # should both come to it: a job begins once
        else:
            worker._go.release()

    def _work(self) -> None:
        again = True
        while again:
            assert self._job is not None
            job, self._job = self._job, None
            again, tell = job()
            again = again and not self._gone
            if again:
                _idle.append(self)
            tell()
            del job, tell
            again = again and self._wait()

    def _wait(self) -> bool:
        if wait_for(self._go, IDLE_SECONDS):
            return True
        try:
            _idle.remove(self)
            return False
        except ValueError:  # taken for a job just now
            pass
        if self._go.acquire(timeout=POLL_SECONDS):
            return True
        self._gone = True  # whoever took it was interrupted (Ctrl-C) before it could say so
        return self._job is not None
