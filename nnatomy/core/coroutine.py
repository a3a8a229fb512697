"""A coroutine on a thread: work that takes turns with the thread that resumes it, so that exactly one of the two runs.

A forward pass is one, and so is each of several blocks on one pass. `resume` and `cancel` are called by whoever has the turn,
`suspend` by the work itself.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from enum import Enum, auto
from threading import TIMEOUT_MAX, Lock, get_ident
from types import TracebackType
from typing import Any
from weakref import ref

from nnatomy.core.frames import hide_our_frames
from nnatomy.core.thread_state import ThreadState
from nnatomy.core.worker import start, starting, wait_for
from nnatomy.errors import OutsideTraceError

#: How often work that catches everything is interrupted again, and suspended work looks whether its owner is still there.
AGAIN_SECONDS = 1.0


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
                try:  # Python raises between instructions what another thread has sent: now, and not in what comes later
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
                with starting:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(Cancelled))


class State(Enum):
    """Whose turn it is, and whether there is any."""

    NEW = auto()
    RUNNING = auto()
    SUSPENDED = auto()
    ENDED = auto()


class Coroutine:
    """Work in a thread of its own, with the thread state of the trace.

    Attributes:
        state: see `State`.
        cancelled: whether it has been told to end.
        owner: a weak reference to something that lives as long as somebody may resume the work. When it is gone (an
            interrupt can come where nobody is able to cancel any more), suspended work ends by itself. None: it waits.
        interruptible: the work in its thread, and which thread that is.
        lost: whether this process is a fork of the one that it is at work in.
    """

    def __init__(self, work: Callable[[], None], state: ThreadState) -> None:
        self.state = State.NEW
        self.cancelled = self.lost = False
        self._error: tuple[BaseException, TracebackType | None] | None = None
        self.owner: ref[Any] | None = None
        self._job: Any = (work, state)
        self._begin = Lock()  # taken by the thread when it begins, or else by `cancel`
        self._resumed, self._yielded = Lock(), Lock()
        self._resumed.acquire()  # released to let the suspended work go on
        self._yielded.acquire()  # released when it is suspended, or over
        self.interruptible = Interruptible()

    @property
    def started(self) -> bool:
        return self.state is not State.NEW

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    @property
    def error(self) -> BaseException | None:
        """What the work has raised, if it has, and not because it had been cancelled; with the traceback that it had."""
        return None if self._error is None else self._error[0].with_traceback(self._error[1])

    # Called by whoever has the turn.

    def resume(self) -> None:
        """Let the work begin or go on, until it is suspended or over."""
        if self.state is State.ENDED:
            return
        if sys.is_finalizing():
            raise OutsideTraceError(
                "Python is shutting down, and runs no other thread any more: a model cannot be traced now. Trace it "
                "before the script ends, not in a __del__ or a callback at its end."
            )
        try:
            begins, self.state = self.state is State.NEW, State.RUNNING
            if begins:
                start(self._main)
            else:
                self._resumed.release()
            wait_for(self._yielded)
            while self.state is State.RUNNING:  # released for a turn before, whose wait had been interrupted
                wait_for(self._yielded)
        except BaseException:  # Ctrl-C
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the work where it stands, and wait until it is gone; called once more while it is running, for a second at most."""
        if self.ended:
            return
        again, self.cancelled = self.cancelled, True
        if self._begin.acquire(blocking=False):  # it has not begun, and now will not
            self._job, self.state = None, State.ENDED
            return
        if sys.is_finalizing():  # no other thread will ever run again
            return
        suspended = self.state is State.SUSPENDED
        try:
            while not self.ended:
                if not suspended:
                    self.interruptible.interrupt()
                with suppress(RuntimeError):  # it has been released just now
                    self._resumed.release()
                # Work that swallows the exception (`except:`) is given it again.
                came = wait_for(self._yielded, TIMEOUT_MAX if suspended else AGAIN_SECONDS)
                if again and not came:
                    return
        except BaseException:  # Ctrl-C, while a `finally` of the work's own is running
            self.interruptible.interrupt()
            raise

    def forget(self) -> None:
        """Drop the error, which holds frames."""
        self._error = None

    # Called by the work.

    def around(self) -> AbstractContextManager[Any]:
        """What is done before and after the work, in its thread, and never interrupted."""
        return nullcontext()

    def suspend(self) -> None:
        """Let whoever has resumed this go on, until it is resumed again."""
        if self.cancelled:
            raise Cancelled
        self.state = State.SUSPENDED
        self._yielded.release()
        while not wait_for(self._resumed, AGAIN_SECONDS):
            if self.owner is not None and self.owner() is None:
                self.cancelled = True
                break
        self.state = State.RUNNING
        if self.cancelled:
            raise Cancelled

    def _main(self) -> tuple[bool, Callable[[], None]]:
        if not self._begin.acquire(blocking=False):
            return True, lambda: None
        (work, state), self._job = self._job, None
        _at_work.add(self)
        try:
            with self.around():
                self.interruptible.run(lambda: state.call(work))
        except BaseException as error:  # noqa: BLE001
            # What is raised after cancelling comes of it: a `finally` that misses a value, say.
            if not self.cancelled:
                self._error = hide_our_frames(error), error.__traceback__
        _at_work.discard(self)
        return not self.interruptible.interrupted, self._end

    def _end(self) -> None:
        self.state = State.ENDED
        with suppress(RuntimeError):
            self._yielded.release()

    def _lose(self) -> None:
        self.lost = self.cancelled = True
        self.state = State.ENDED
        text = "This trace was open when the process was forked, and its forward pass goes on in the parent alone. "
        self._error = OutsideTraceError(f"{text}Open a new trace in the child."), None


_at_work: set[Coroutine] = set()


def _in_child() -> None:
    """A forked process has none of the threads."""
    for coroutine in _at_work:
        coroutine._lose()
    _at_work.clear()


os.register_at_fork(after_in_child=_in_child)
