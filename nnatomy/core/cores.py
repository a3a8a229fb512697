"""The core that a thread is woken on: that of the thread that wakes it.

Of the two threads of a trace one is always asleep, and who wakes the other falls asleep at once. The
scheduler cannot know that: it wakes the other on a core of its own, which has to come out of its idle
state first. That takes 10 to 100 µs where a switch on one core takes 5. So the sleeper is
brought here before it is woken; once awake it may run again wherever the block's thread may.

Only Linux can tell and say where a thread runs; elsewhere these functions leave it to the system.
"""

from __future__ import annotations

import ctypes
from typing import TypeAlias

Cores: TypeAlias = ctypes.Array[ctypes.c_ulong]

_bits = ctypes.c_ulong * 16  # a bit for each of 1024 cores
_size = ctypes.sizeof(_bits)

try:
    _libc = ctypes.PyDLL(None)  # PyDLL: keeps the interpreter's lock, for calls this short
    _here, _get, _set = _libc.sched_getcpu, _libc.sched_getaffinity, _libc.sched_setaffinity
    _alone = [_bits.from_buffer_copy((1 << core).to_bytes(_size, "little")) for core in range(_size * 8)]
except (AttributeError, OSError, TypeError):
    _alone = []


def cores_of_this_thread() -> Cores | None:
    """Where this thread may run, for `run_on`. None if that cannot be known."""
    cores = _bits()
    return cores if _alone and _get(0, _size, cores) == 0 else None


def bring_here(thread: int) -> None:
    """Move a sleeping thread (by its native identifier) to this one's core: it is woken next."""
    if _alone and thread:
        _set(thread, _size, _alone[_here()])


def run_on(cores: Cores | None) -> None:
    """Let this thread, just woken, run on any of these cores again."""
    if cores is not None:
        _set(0, _size, cores)
