"""Worker threads, kept for a moment after their work, because to start one costs more than a short trace.

torch computes on a CPU with OpenMP, which keeps helper threads for each thread that has computed. A trace has two such
threads, the block's and the forward pass's, of which one always waits. With the helpers of both there are more of them
than cores, and GNU's OpenMP, which torch's Linux wheels bring, then lets all helpers sleep instead of awaiting their next
share: a forward pass of GPT-2's size takes a quarter longer. So a thread that waits gives its helpers up. They are
started again when it computes again, which takes about 1 ms.
"""

import _thread
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Lock, Thread
from time import monotonic
from typing import Any

import torch

#: An idle worker holds nothing, and ends by itself after so long.
IDLE_SECONDS = 2.0
#: A thread that waits looks so often whether it has been interrupted: `_thread.interrupt_main` sets a flag, and wakes nobody.
POLL_SECONDS = 0.2
#: How long a thread that waits keeps OpenMP's helpers: for shorter, to start them again would take longer than they cost.
HELPERS_SECONDS = 0.01

#: What a worker does: it returns whether the thread may be used again, and what to call once it can be.
Job = Callable[[], tuple[bool, Callable[[], None]]]

#: Where each idle worker waits for its next job.
_idle: list[SimpleQueue[Job]] = []
os.register_at_fork(after_in_child=_idle.clear)  # a fork inherits the list, not the threads

#: Held until a new thread is at work. Before that CPython 3.11 gives it its creator's identifier, and `Interruptible`, which finds
#: threads by that, would interrupt the creator.
starting = Lock()
os.register_at_fork(before=starting.acquire, after_in_parent=starting.release, after_in_child=starting.release)


def start(job: Job) -> None:
    """Run `job` in a worker: the one that has been idle for the shortest time, or a new one."""
    try:
        # `_idle.pop()`, which raises IndexError where there is none, and `put`, within one call of C code, which Ctrl-C cannot
        # divide: a worker that has been taken is always given its job.
        next(map(SimpleQueue.put, iter(_idle.pop, None), [job]))
    except IndexError:
        start_thread(job)


def start_thread(job: Job) -> None:
    """Run `job` in a new worker."""
    jobs: SimpleQueue[Job] = SimpleQueue()
    jobs.put(job)
    begun = Lock()
    begun.acquire()

    def begin() -> None:
        begun.release()
        # Not from the block's thread: Ctrl-C inside `Thread.start` can leave its lock taken, and the new thread
        # waiting for it for ever. Only the main thread is interrupted.
        try:
            Thread(target=_work, args=(jobs,), name="nnatomy-forward", daemon=True).start()
        except RuntimeError:  # no more threads to be had: then this one
            _work(jobs)

    with starting:
        _thread.start_new_thread(begin, ())
        begun.acquire()


def _work(jobs: SimpleQueue[Job]) -> None:
    again = True
    while again and (job := _next_job(jobs)):
        again, tell = job()
        if again:
            _idle.append(jobs)
        tell()
        del job, tell


def _next_job(jobs: SimpleQueue[Job]) -> Job | None:
    """The job that the worker is given, or None if it has been idle for long."""
    with suppress(Empty):
        return jobs.get(timeout=HELPERS_SECONDS)
    release_helpers()
    with suppress(Empty):
        return jobs.get(timeout=IDLE_SECONDS)
    try:
        _idle.remove(jobs)
    except ValueError:  # it has been taken just now
        return jobs.get()
    return None


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


def _pause_function() -> Callable[[int], Any]:
    """OpenMP's own, from the library that torch brings; where there is none, one that does nothing."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        with suppress(OSError, AttributeError):
            return ctypes.PyDLL(str(path)).omp_pause_resource_all
    return lambda _: None


_pause = _pause_function()


def release_helpers() -> None:
    """End the OpenMP helper threads of the calling thread: 0.1 µs if there are none, else about 0.2 ms."""
    _pause(1)  # omp_pause_soft


# A fork takes its thread along and none of its helpers: the child would wait for ever for those it knows of.
os.register_at_fork(before=release_helpers)
