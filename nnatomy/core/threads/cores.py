"""The core that a thread is woken on: that of the thread that wakes it.

Of the two threads of a trace one is always asleep, and who wakes the other falls asleep at once. The
scheduler cannot know that: it wakes the other on a core of its own, which has to come out of its idle
state first. That takes 10 to 100 µs where a switch on one core takes 5. So the sleeper is
brought here before it is woken; once awake it may run again wherever the block's thread may.

Only Linux can tell and say where a thread runs; elsewhere these functions leave it to the system.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection

_core_here: Callable[[], int] | None
try:
    _core_here = ctypes.PyDLL(None).sched_getcpu  # PyDLL: keeps the interpreter's lock, for a call this short
    _set = os.sched_setaffinity
except (AttributeError, OSError, TypeError):
    _core_here = None


def cores_of_this_thread() -> Collection[int]:
    """Where this thread may run, for `run_on`. Empty if that cannot be known."""
    return os.sched_getaffinity(0) if _core_here else ()


def bring_here(thread: int) -> None:
    """Move a sleeping thread (by its native identifier) to this one's core: it is woken next."""
    if thread and _core_here:
        try:  # noqa: SIM105  `suppress` would take as long as the call
            _set(thread, (_core_here(),))
        except OSError:  # it is gone
            pass


def run_on(cores: Collection[int]) -> None:
    """Let this thread, just woken, run on any of these cores again."""
    if cores:
        try:  # noqa: SIM105  `suppress` would take as long as the call
            _set(0, cores)
        except OSError:  # they have been taken from the process
            pass
