"""Small nets, a plain-hook reference and the leak check of the core's tests."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn

from nnatomy.core import worker

#: What every module's call goes through when no run is open.
UNGATED = nn.Module._call_impl


class Layer(nn.Module):
    """A residual layer with a tuple output, as many transformers' layers have."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, *, scale: float = 1.0) -> tuple[Tensor, float]:
        hidden = hidden + scale * self.attn(hidden)
        return hidden + self.mlp(hidden), scale


class Net(nn.Module):
    """Layers in a list, one of them `shared` and called twice, and a head that is called by keyword."""

    def __init__(self, width: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.shared = nn.Tanh()
        self.never = nn.Linear(2, 2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared(self.embed(x))
        for layer in self.layers:
            hidden, _ = layer(hidden, scale=0.5)
        return self.head(input=self.shared(hidden))


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def x() -> Tensor:
    return torch.tensor([[0.5, -1.0], [2.0, 0.25]])


class Calls(nn.Module):
    """Runs a function of its own submodules and the input: a model written in one line."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@contextmanager
def hooks(*entries: tuple[nn.Module, str, Callable[..., Any]]) -> Iterator[None]:
    """Plain PyTorch hooks: the independent reference. A hook takes the value and returns it or another."""
    handles = []
    for module, kind, function in entries:
        if kind == "output":
            handles.append(module.register_forward_hook(lambda _m, _a, out, f=function: f(out)))
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, f=function: f((args, kwargs)), with_kwargs=True
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(root: nn.Module, call: Callable[[], Any]) -> dict[str, list[Any]]:
    """Every output of every submodule as plain hooks see it, by path."""
    seen: dict[str, list[Any]] = {}

    def note(path: str) -> Callable[[Any], None]:
        return lambda out: seen.setdefault(path, []).append(out.detach().clone() if isinstance(out, Tensor) else out)

    with hooks(*((module, "output", note(path)) for path, module in root.named_modules())):
        call()
    return seen


def state_of(root: nn.Module) -> list[Any]:
    """What a trace must not change of a model: attributes, hooks, tensors and their contents."""
    state: list[Any] = []
    for path, module in root.named_modules(remove_duplicate=False):
        state.append((path, sorted(module.__dict__)))
        for name, value in module.__dict__.items():
            if isinstance(value, dict):
                state.append((path, name, [(key, id(entry)) for key, entry in value.items()]))
            elif not isinstance(value, (int, float, bool, str, type(None))):
                state.append((path, name, id(value)))
            else:
                state.append((path, name, value))
    return state


def forward_threads() -> list[threading.Thread]:
    # Without an identifier it never started: `Thread.start`, interrupted, leaves its entry in the list.
    return [t for t in threading.enumerate() if t.name == "nnatomy-forward" and t.ident is not None]


def busy_threads() -> int:
    """Forward threads that are not idle."""
    return len(forward_threads()) - len(worker._idle)


def settles(is_so: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it becomes so: a worker is told to end before it is gone."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def no_leaks(*roots: nn.Module) -> Iterator[None]:
    """Nothing of a trace is left after the block, however it ended: attributes, hooks, runs, threads."""
    from nnatomy.core import gates

    before = [state_of(root) for root in roots]
    try:
        yield
    finally:
        assert [state_of(root) for root in roots] == before, "the model was changed"
        assert not gates.runs, "a run is still at work"
        assert nn.Module._call_impl is UNGATED, "modules still have a gate"
        assert settles(lambda: busy_threads() == 0), "a forward thread is still at work"


class Weak:
    """Weak references to tensors, to see when they are gone."""

    def __init__(self) -> None:
        self.refs: list[weakref.ref[Tensor]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.refs.append(weakref.ref(tensor))
        return tensor

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.refs)


@contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def our_frames(error: BaseException) -> list[str]:
    """Whose frames an error's traceback has, outermost first: "us", "torch" or "user" (wrappers left out)."""
    from owners import owner  # of `tests`, which is not on the path of the processes that import this file

    return [name for frame in extract_tb(error.__traceback__) if (name := owner(frame.filename))]
