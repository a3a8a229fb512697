"""OpenMP's helper threads: only the thread that computes has some."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Calls, settles

from nnatomy.core import worker
from nnatomy.tracing import Traceable

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no helpers here")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Whatever the suite runs with: with one thread there are no helpers."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    worker.release_helpers()
    torch.set_num_threads(before)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def compute() -> torch.Tensor:
    return torch.ones(400, 400) @ torch.ones(400, 400)


def test_helpers_end_and_come_back() -> None:
    compute()
    with_helpers = threads()
    worker.release_helpers()
    assert threads() == with_helpers - (torch.get_num_threads() - 1)
    assert compute()[0, 0] == 400
    assert threads() == with_helpers


def test_a_trace_leaves_helpers_to_the_thread_that_computes() -> None:
    view = Traceable(Calls(lambda self, x: compute() + x))
    worker.release_helpers()
    without = threads()
    helpers = torch.get_num_threads() - 1
    compute()
    assert threads() == without + helpers
    with view.trace(0) as tracer:
        result = tracer.result
        assert result[0, 0] == 400
        # The block's are gone; the forward pass may still have its own for a moment.
        assert settles(lambda: threads() <= without + 1)


def test_where_there_is_no_such_library_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert worker._pause_function()(1) is None
