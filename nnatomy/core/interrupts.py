"""Ending another thread's work: Cancelled, raised where it stands."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock, get_ident

from nnatomy.core.worker import starting


class Cancelled(BaseException):
    """Ends a coroutine's work that nobody needs any more: a forward pass, or a block of `invoke`."""


class Interruptible:
    """A part of a thread's work in which another thread can have Cancelled raised.

    Attributes:
        interrupted: whether another thread has asked for it.
        thread: the identifier of the thread, while it is at work in it; else 0.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.thread = 0
        self._lock = Lock()

    def run(self, work: Callable[[], object]) -> None:
        """Do the work. Raises Cancelled if it is interrupted meanwhile, or has been before."""
        try:
            try:
                self.thread = get_ident()
                if self.interrupted:
                    raise Cancelled
                work()
            finally:
                self._end()
        finally:
            self._end()  # a Cancelled may have come within the first

    def _end(self) -> None:
        with self._lock:
            self.thread = 0
            if self.interrupted:
                try:  # what has been sent and has not come yet comes here, and not later
                    for _ in range(100):
                        pass
                except Cancelled:
                    pass

    def interrupt(self) -> None:
        """Have Cancelled raised in the thread, wherever it is in the work."""
        with self._lock:
            self.interrupted = True
            if self.thread:
                # Not to be taken back by sending None: that leaves CPython 3.11 looking for it for ever.
                error = ctypes.py_object(Cancelled)
                with starting:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), error)
