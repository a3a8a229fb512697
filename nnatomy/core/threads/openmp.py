"""The helper threads of the thread that computes.

torch computes on a CPU with OpenMP, which keeps helper threads for each thread that computes. With those of two
threads there are more than there are cores: GNU's OpenMP then has all helpers fall asleep at once instead of awaiting
their next share, and everything in the process gets slower (a forward pass of GPT-2's size by a quarter).
So of the two threads of a trace the one that waits for the other gives up its helpers after a moment. They are
started again when they are needed, which takes about 1 ms (the mathematics library's buffers go with them).

Only the OpenMP that torch's Linux wheels bring is known to do this, so elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_SOFT = 1  # omp_pause_soft


def _function(libraries: str, name: str) -> Callable[..., Any]:
    """That function of a library that torch brings; where there is none, one that does nothing."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob(libraries)):
        with suppress(OSError, AttributeError):
            return getattr(ctypes.PyDLL(str(path)), name)
    return lambda *_: None


_pause = _function("libgomp*.so*", "omp_pause_resource_all")
_free = _function("libtorch_cpu.so", "mkl_serv_thread_free_buffers")
_trim: Callable[[int], Any] = lambda _: None  # noqa: E731
if sys.platform == "linux":
    _trim = getattr(ctypes.CDLL(None), "malloc_trim", _trim)


def release_helpers() -> None:
    """End the OpenMP helper threads of the calling thread: 0.1 µs if there are none, else about 0.2 ms."""
    _pause(_SOFT)


def release_buffers() -> None:
    """The same, and give back the mathematics library's buffers of the calling thread.

    It keeps some for each form of a product, 2 to 5 MB a thread and form.
    """
    _pause(_SOFT)
    _free()


def release_memory() -> None:
    """The same, and give back what malloc keeps of what has been freed: after a few forward passes 10 MB, in 1 to 3 ms."""
    release_buffers()
    _trim(0)


# A fork takes its thread along and none of its helpers: the child would wait for ever for those it knows of.
os.register_at_fork(before=release_helpers)
