"""Worker threads for forward passes, and the caller's thread state inside them.

A worker that has finished waits a moment for the next run, because starting a thread costs more than
a short trace (and a new thread starts torch's own thread pool anew). An idle worker holds nothing,
and ends by itself after `IDLE_SECONDS`.
"""

from __future__ import annotations

import _thread
import contextvars
import os
from collections.abc import Callable
from contextlib import ExitStack
from threading import TIMEOUT_MAX, Lock, Thread
from time import monotonic
from typing import Any

import torch
from torch._C import _functorch
from torch._functorch import pyfunctorch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack, _push_mode
from torch.utils import _python_dispatch as dispatch

from nnatomy.core.threads.openmp import release_helpers

IDLE_SECONDS = 2.0
POLL_SECONDS = 0.2

#: How long a thread keeps OpenMP's helpers while it waits for another: shorter work than that is done sooner with
#: too many helpers than after a change. (A timer that is due before the kernel's next tick, 4 ms, costs 25 µs.)
HELPERS_SECONDS = 0.01

#: As long, of a worker whose last job was no such short work: a trace that follows at once finds them still there.
HELPERS_AFTER_LONG_SECONDS = 0.004

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


def wait_for(lock: Lock, seconds: float = TIMEOUT_MAX, patience: float = HELPERS_SECONDS) -> bool:
    """Acquire the lock if that takes no longer, in this thread, which has nothing to compute meanwhile.

    Not in one go: `_thread.interrupt_main` sets a flag, and wakes nobody.

    Args:
        patience: keep OpenMP's helpers for so long. (0 where they have been given up: to wake for that costs the model
            50 µs.)
    """
    if patience and lock.acquire(True, patience):
        return True
    release_helpers()
    end = monotonic() + seconds
    while not lock.acquire(timeout=min(POLL_SECONDS, seconds)):
        if monotonic() >= end:
            return False
    return True


class Worker:
    """A thread that does one job after the other.

    Attributes:
        was_long: whether the last job of any worker took longer than HELPERS_SECONDS.
    """

    was_long = False

    def __init__(self, job: Job, computes: bool = True) -> None:
        self._computes = computes
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
    def start(cls, job: Job, computes: bool = True) -> None:
        """Run `job` in a worker: the one that has been idle for the shortest time.

        Args:
            computes: whether it runs a model, and not a block. Either is run where such a one ran before: a thread that has
                computed keeps the mathematics library's buffers (9 MB), which the next pass needs and a block does not.
        """
        for worker in reversed(_idle.copy()):
            if worker._computes == computes:
                try:
                    _idle.remove(worker)
                except ValueError:  # taken just now
                    continue
                break
        else:
            cls(job, computes)
            return
        worker._job = job
        if worker._gone:
            cls(job, computes)  # should both come to it: a run begins once
        else:
            worker._go.release()

    def _work(self) -> None:
        again = True
        while again:
            assert self._job is not None
            job, self._job = self._job, None
            start = monotonic()
            again, tell = job()
            Worker.was_long = monotonic() - start > HELPERS_SECONDS
            again = again and not self._gone
            if again:
                _idle.append(self)
            tell()
            del job, tell
            again = again and self._wait()

    def _wait(self) -> bool:
        if wait_for(
            self._go, IDLE_SECONDS, HELPERS_AFTER_LONG_SECONDS if Worker.was_long else HELPERS_SECONDS
        ):
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


class ThreadState:
    """What torch and Python keep per thread, as it was where the trace was opened.

    Grad mode, inference mode, autocast, the function and dispatch modes (a default device is one of
    these), the transforms of `torch.func`, the hooks on saved tensors, the number of threads, the CUDA device
    and stream, and the context variables.
    """

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.threads = torch.get_num_threads()
        self.autocast: list[tuple[str, torch.dtype]] = []
        if torch._C._is_any_autocast_enabled():
            self.autocast = [
                (device, torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda", "mps", "xpu")
                if torch.is_autocast_enabled(device)
            ]
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.function_modes: list[Any] = []
        if torch._C._len_torch_function_stack():
            self.function_modes = _get_current_function_mode_stack()
        self.dispatch_modes: list[Any] = []
        if torch._C._len_torch_dispatch_stack():
            self.dispatch_modes = dispatch._get_current_dispatch_mode_stack()
        #: The transforms of `torch.func` that the caller is within, innermost first.
        self.transforms: list[Any] = []
        if _functorch.peek_interpreter_stack() is not None:
            with pyfunctorch.temporarily_clear_interpreter_stack() as transforms:
                self.transforms = transforms
        self.saved_tensors_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.cuda_stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

        modes = [*self.autocast, *self.function_modes, *self.dispatch_modes, *self.transforms]
        others = (self.inference, self.saved_tensors_hooks, self.cuda_stream)
        self.plain = not (modes or any(others))

    def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` in this thread with that state."""
        return self.context.run(self._call, function)

    def _call(self, function: Callable[[], Any]) -> Any:
        if torch.get_num_threads() != self.threads:  # kept per thread by OpenMP
            torch.set_num_threads(self.threads)
        try:
            torch._C._set_grad_enabled(self.grad)
            if self.plain:
                return function()
            with ExitStack() as stack:
                if self.cuda_stream is not None:
                    stack.enter_context(torch.cuda.stream(self.cuda_stream))  # and its device
                if self.inference:
                    stack.enter_context(torch.inference_mode())
                for device, dtype in self.autocast:
                    stack.enter_context(torch.autocast(device, dtype, cache_enabled=self.autocast_cache))
                # Pushed, not entered: to enter one writes to it (a default device notes what to restore).
                for mode in self.function_modes:
                    _push_mode(mode)
                for mode in self.dispatch_modes:
                    dispatch._push_mode(mode)
                if self.saved_tensors_hooks:
                    stack.enter_context(saved_tensors_hooks(*self.saved_tensors_hooks))
                stack.enter_context(pyfunctorch.temporarily_restore_interpreter_stack(self.transforms))
                return function()
        finally:
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            while torch._C._len_torch_dispatch_stack():
                dispatch._pop_mode()
