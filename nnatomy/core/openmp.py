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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SOFT = 1  # omp_pause_soft


def _load() -> Callable[[int], Any]:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            return ctypes.PyDLL(str(path)).omp_pause_resource_all
        except (OSError, AttributeError):
            pass
    return lambda _: None


def _load_free() -> Callable[[], Any]:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so")):
        try:
            return ctypes.PyDLL(str(path)).mkl_serv_thread_free_buffers
        except (OSError, AttributeError):  # built with another library
            pass
    return lambda: None


_pause = _load()
_free = _load_free()


def release_helpers() -> None:
    """End the OpenMP helper threads of the calling thread: 0.1 µs if there are none, else about 0.2 ms."""
    _pause(_SOFT)


def release_buffers() -> None:
    """The same, and give back the mathematics library's buffers of the calling thread.

    It keeps some for each form of a product, 2 to 5 MB a thread and form.
    """
    _pause(_SOFT)
    _free()


# A fork takes its thread along and none of its helpers: the child would wait for ever for those it knows of.
os.register_at_fork(before=release_helpers)
