"""Ending another thread's work: Cancelled, raised where it stands."""

from __future__ import annotations

import ctypes
from threading import Lock, get_ident

from nnatomy.core.worker import starting


class Cancelled(BaseException):
    """Ends a forward pass nobody needs any more; seen by the model's code alone."""


class Interruptible:
    """A part of a thread's work in which another thread can have Cancelled raised."""

    def __init__(self) -> None:
        self.interrupted = False
        self._thread = 0
        self._lock = Lock()

    def begin(self) -> None:
        """Called by the thread: from here on."""
        self._thread = get_ident()

    def end(self) -> None:
        """Called by the thread: until here."""
        with self._lock:
            self._thread = 0
            if self.interrupted:
                try:  # what has been sent and has not come yet comes here, and not later
                    for _ in range(100):
                        pass
                except Cancelled:
                    pass

    def interrupt(self) -> None:
        """Have Cancelled raised in the thread, wherever it is, if it is within."""
        with self._lock:
            if self._thread:
                self.interrupted = True
                # Not to be taken back by sending None: that leaves CPython 3.11 looking for it for ever.
                error = ctypes.py_object(Cancelled)
                with starting:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), error)
