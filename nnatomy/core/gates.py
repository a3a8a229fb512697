"""The gate: how a forward pass tells its run that it enters and leaves a module.

While any run is open, `torch.nn.Module._call_impl`, which every call of every module goes through, is the function
below. In the thread of a run it counts the call, lets the run look at (and replace) the inputs, calls the module's
own `_call_impl` with all of its hooks, and lets the run look at the output. In every other thread, and in a call within
`backward` (gradient checkpointing calls modules once more there), it goes straight on to the module. When the last
run ends, the class is as it was.

`docs/design.md` says why these are no hooks. `torch.compile`d and scripted modules run no Python below themselves, so
nothing below them is seen.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from types import FrameType
from typing import Any

import torch
from torch._C import _current_graph_task_id as current_graph_task_id
from torch.compiler import is_compiling
from torch.nn import Module

from nnatomy.core.progress import INSIDE

#: The run at work in a thread, by the thread's identifier.
runs: dict[int, Any] = {}

_ungated: Callable[..., Any] = Module._call_impl
_lock = Lock()


def _call_impl(self: Module, *args: Any, **kwargs: Any) -> Any:
    if is_compiling():  # torch.compile looks into this, and is to find the module alone
        return _ungated(self, *args, **kwargs)
    run = runs.get(get_ident())
    if run is None or current_graph_task_id() != -1:
        return _ungated(self, *args, **kwargs)
    progress = run.progress
    calls, stack = progress.calls, progress.stack
    call = calls.get(self, 0)
    if not stack and run.root in calls:  # the root's last call was left by an exception
        run.end_step()
        call = 0
    calls[self] = call + 1
    stack.append([self, call, INSIDE])  # while an end of it is shown, `arrive` says so here
    try:
        try:
            skip = None
            if self in run.watched_inputs or run.cancelled:  # (in a run that is cancelled `arrive` raises)
                slot = run.arrive(self, "input", call, (args, kwargs))
                (args, kwargs), skip = slot.value, slot if slot.skipped else None
                del slot
            output = _ungated(self, *args, **kwargs) if skip is None else skip.instead
        finally:
            if run.taps.modes:
                run.taps.leave(len(stack) - 1)
        if self in run.watched_outputs:
            output = run.arrive(self, "output", call, output).value
    finally:
        stack.pop()
    if not stack and run.root in calls:
        run.end_step()
    return output


_GATE_CODE = inspect.unwrap(_call_impl).__code__
_CALL_CODE = inspect.unwrap(_ungated).__code__


@contextmanager
def gated(run: Any) -> Iterator[None]:
    """Within, the calls of this thread are that run's."""
    global _ungated
    with _lock:
        if not runs:
            _ungated = Module._call_impl
        runs[get_ident()] = run
        Module._call_impl = _call_impl  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            del runs[get_ident()]
            if not runs:
                Module._call_impl = _ungated  # type: ignore[method-assign]


@contextmanager
def unseen() -> Iterator[None]:
    """Within, the calls of this thread are no part of its run."""
    run = runs[get_ident()]
    runs[get_ident()] = None
    try:
        yield
    finally:
        runs[get_ident()] = run


def is_seen(module: Module, within: Module) -> bool:
    """Whether that is `within` itself, or one of its submodules whose calls Python sees."""
    hidden = is_compiled(within) or isinstance(within, torch.jit.ScriptModule)
    return module is within or (not hidden and any(is_seen(module, child) for child in within.children()))


def is_compiled(module: Module) -> bool:
    """Whether it is under `torch.compile`, by either way of writing that."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def is_gate(frame: FrameType) -> bool:
    """Whether a frame is that of a gate; its `self` is the module."""
    return frame.f_code is _GATE_CODE


def is_call(frame: FrameType) -> bool:
    """Whether a frame is that of PyTorch's own call of a module, gated or not; its `self` is the module."""
    return frame.f_code is _CALL_CODE


def _in_child() -> None:
    """A forked process has none of the threads that the open runs are at work in."""
    _lock.release()
    runs.clear()
    Module._call_impl = _ungated  # type: ignore[method-assign]


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)
