"""Small nets and the leak check."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnatomy.core import gates, worker


class Block(nn.Module):
    """A container whose call holds two others, and which returns a tuple."""

    def __init__(self, width: int, shared: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.act = nn.Tanh()
        self.shared = shared

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, float]:
        return x + scale * self.shared(self.act(self.inner(x))), scale


class Net(nn.Module):
    """Blocks in a list, with one module that all of them call."""

    def __init__(self, depth: int = 3, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, shared) for _ in range(depth))
        self.head = nn.Linear(width, 2)
        self.unused = nn.Linear(width, width)

    def forward(self, x: Tensor, fail_at: int | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i == fail_at:
                raise AttributeError("the model's own")
            x, _ = block(x, scale=0.5)
        return self.head(x)


def loop(net: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    """A generation: the net runs many times."""
    return [net(x + step) for step in range(steps)]


_UNGATED = nn.Module._call_impl


def gated() -> bool:
    """Whether module calls go through the gate."""
    return nn.Module._call_impl is not _UNGATED


@contextmanager
def nothing_left(*modules: nn.Module) -> Iterator[list[weakref.ref[Any]]]:
    """Check that nothing is left behind; the body may append weak references that have to be dead.

    The garbage collector is off: reference counts alone have to free everything.
    """
    threads = {t for t in threading.enumerate() if t.name != "nnatomy-forward"}
    attributes = [dict(module.__dict__) for root in modules for module in root.modules()]
    references: list[weakref.ref[Any]] = []
    gc.collect()
    gc.disable()
    try:
        yield references
        assert [reference() for reference in references if reference() is not None] == []
    finally:
        gc.enable()
    assert not gated()
    assert not gates.runs
    after = [module.__dict__ for root in modules for module in root.modules()]
    assert [one.keys() for one in after] == [one.keys() for one in attributes]
    running = [t for t in threading.enumerate() if t.name == "nnatomy-forward"]
    assert len(running) <= len(worker._idle)  # each that is there waits for work
    assert {t for t in threading.enumerate() if t.name != "nnatomy-forward"} <= threads
