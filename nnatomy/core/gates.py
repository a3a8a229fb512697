"""Gates: how a forward pass tells that it enters and leaves a module.

While a run is open, the submodules of its root that questions may concern (see `nesting`) carry a *gate*: an instance
attribute `_call_impl`, which `torch.nn.Module.__call__` looks up and calls. The gate counts the call, lets
the run look at (and replace) the inputs, calls the module's own `_call_impl` with all of its hooks,
and lets the run look at the output. When the run ends the attributes are deleted; outside of a run
a model carries none.

`docs/design.md` says why these are no hooks. A gate costs about 0.8 µs a call and 0.3 µs to put on and off. A run
that nobody can ask anything more (its block is over, or waits for the end) starts with gates on the watched modules alone.

A gate acts only in the thread that a run is at work in: every other thread, the one with the
user's block included, goes straight through to the module; so does a call within `backward` (gradient
checkpointing calls modules once more there). `torch.compile`d and scripted modules
run no Python below themselves, so they get no gates there.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from types import FrameType, MethodType
from typing import Any

import torch
from torch._C import _current_graph_task_id as current_graph_task_id
from torch.compiler import is_compiling
from torch.nn import Module

from nnatomy.core.frames import frames

#: The run at work in a thread, by the thread's identifier.
runs: dict[int, Any] = {}

_GATE = "_call_impl"
_gated: list[list[Module]] = []
_lock = Lock()


def _call_impl(self: Module, *args: Any, **kwargs: Any) -> Any:
    if is_compiling():  # torch.compile looks into this, and is to find the module alone
        return type(self)._call_impl(self, *args, **kwargs)
    run = runs.get(get_ident())
    if run is None or current_graph_task_id() != -1:
        return _ungated(self)(*args, **kwargs)
    entered = run.entered
    call = entered.get(self, 0)
    stack = run.stack
    if (
        call and not stack and run.root in entered and not run.arriving
    ):  # its last call was left by an exception
        run.end_step()
        call = 0
    entered[self] = call + 1
    stack.append((self, call))
    try:
        if self in run.watched_inputs or run.cancelled:
            output = run.enter(self, call, args, kwargs)
        else:
            output = type(self)._call_impl(self, *args, **kwargs)
    finally:
        if run.modes:
            run.leave_taps()
        stack.pop()
    if self in run.watched_outputs:
        output = run.arrive(self, "output", call, output).value
    if not stack and run.root in entered and not run.arriving:
        run.end_step()
    return output


def _ungated(module: Module) -> Callable[..., Any]:
    """The call of the gate's module, or of the shallow copy of it that has brought the gate along (and loses it here)."""
    called = next((frame for frame in frames() if frame.f_code is _WRAPPED_CODE), None)
    caller = module if called is None else called.f_locals["self"]
    if caller is not module and getattr(caller.__dict__.get(_GATE), "__self__", None) is module:
        del caller.__dict__[_GATE]
        module = caller
    return MethodType(type(module)._call_impl, module)


_GATE_CODE = inspect.unwrap(_call_impl).__code__
_WRAPPED_CODE = Module._wrapped_call_impl.__code__
_CALL_CODE = inspect.unwrap(Module._call_impl).__code__


@contextmanager
def unseen() -> Iterator[None]:
    """Within, the calls of this thread are no part of its run."""
    run = runs.pop(get_ident())
    try:
        yield
    finally:
        runs[get_ident()] = run


def modules_seen(root: Module) -> list[Module]:
    """`root` and those of its submodules whose calls Python sees."""
    modules = [root]
    seen = {root}
    for module in modules:
        if module._modules and not (is_compiled(module) or isinstance(module, torch.jit.ScriptModule)):
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
    return modules


def is_compiled(module: Module) -> bool:
    """Whether it is under `torch.compile`, by either way of writing that."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def put_gates(modules: list[Module], gated: list[Module]) -> None:
    """Put a gate on each of the modules, and note them in `gated`, which takes them off again."""
    with _lock:
        if not gated:
            _gated.append(gated)
        gated.extend(modules)
        for module in modules:
            # A bound method, so that a copy or a pickle of the module made meanwhile binds to the copy.
            module.__dict__[_GATE] = MethodType(_call_impl, module)


def remove_gates(gated: list[Module]) -> None:
    """Take off the gates that `put_gates` has noted there, but for those another open run needs."""
    with _lock:
        _gated[:] = [other for other in _gated if other is not gated]
        needed = {module for other in _gated for module in other}
        free: Iterable[Module] = (m for m in gated if m not in needed) if needed else gated
        for module in free:
            module.__dict__.pop(_GATE, None)


def is_gate(frame: FrameType) -> bool:
    """Whether a frame is that of a gate; its `self` is the module."""
    return frame.f_code is _GATE_CODE


def is_call(frame: FrameType) -> bool:
    """Whether a frame is that of PyTorch's own call of a module, gated or not; its `self` is the module."""
    return frame.f_code is _CALL_CODE


def gate_of(module: Module) -> FrameType | None:
    """The frame of the gate that a call of `module`, in flight in this thread, has come through."""
    return next((frame for frame in frames() if is_gate(frame) and frame.f_locals["self"] is module), None)


def called_module() -> Module | None:
    """The innermost module, gated or not, that a call is in flight of in this thread."""
    return next((frame.f_locals["self"] for frame in frames() if is_call(frame)), None)


def has_gate(module: Module) -> bool:
    """Whether an open run sees the calls of this module."""
    return _GATE in module.__dict__ and module._compiled_call_impl is None


def _in_child() -> None:
    """A forked process has none of the threads that the open runs are at work in."""
    _lock.release()
    for run in runs.values():
        run.lose()
    runs.clear()
    for modules in list(_gated):
        remove_gates(modules)


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)
