"""Worker threads for forward passes, and the caller's thread state inside them.

A worker that has finished waits a moment for the next run, because starting a thread costs more than
a short trace (and a new thread starts torch's own thread pool anew). An idle worker holds nothing,
and ends by itself after `IDLE_SECONDS`.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock, Thread
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

IDLE_SECONDS = 2.0

_idle: list[Worker] = []


class Worker:
    """A thread that does one job after the other."""

    def __init__(self) -> None:
        self._go = Lock()
        self._go.acquire()
        self._job: Callable[[], Callable[[], None]] | None = None
        self._pid = os.getpid()
        self.thread = Thread(target=self._work, name="nnatomy-forward", daemon=True)
        self.thread.start()

    @classmethod
    def start(cls, job: Callable[[], Callable[[], None]]) -> Worker:
        """Run `job` in a worker; what it returns is called once the worker is free again."""
        worker = None
        while _idle:
            worker = _idle.pop()
            if worker._pid == os.getpid():  # a fork inherits the list, not the threads
                break
            worker = None
        worker = worker or cls()
        worker._job = job
        worker._go.release()
        return worker

    def _work(self) -> None:
        while self._wait():
            assert self._job is not None
            job, self._job = self._job, None
            tell = job()
            del job
            _idle.append(self)
            tell()
            del tell

    def _wait(self) -> bool:
        if self._go.acquire(timeout=IDLE_SECONDS):
            return True
        try:
            _idle.remove(self)
        except ValueError:  # taken for a job just now
            return self._go.acquire()
        return False


class ThreadState:
    """What torch and Python keep per thread, as it was where the trace was opened.

    Grad mode, inference mode, autocast, the function and dispatch modes (a default device is one of
    these), the CUDA device and stream, and the context variables.
    """

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.autocast: list[tuple[str, torch.dtype]] = []
        if torch._C._is_any_autocast_enabled():
            self.autocast = [
                (device, torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda", "mps", "xpu")
                if torch.is_autocast_enabled(device)
            ]
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.modes: list[Any] = []
        if torch._C._len_torch_function_stack():
            self.modes += _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if torch._C._len_torch_dispatch_stack():
            self.modes += _get_current_dispatch_mode_stack()
        self.cuda_stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` in this thread with that state."""
        return self.context.run(self._call, function)

    def _call(self, function: Callable[[], Any]) -> Any:
        with torch.set_grad_enabled(self.grad):
            if not (self.inference or self.autocast or self.modes or self.cuda_stream):
                return function()
            with ExitStack() as stack:
                if self.cuda_stream is not None:
                    stack.enter_context(torch.cuda.stream(self.cuda_stream))  # and its device
                if self.inference:
                    stack.enter_context(torch.inference_mode())
                for device, dtype in self.autocast:
                    stack.enter_context(torch.autocast(device, dtype, cache_enabled=self.autocast_cache))
                for mode in self.modes:
                    stack.enter_context(mode)
                return function()
