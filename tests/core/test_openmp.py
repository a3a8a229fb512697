"""OpenMP's helper threads: only the thread that computes has some."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Calls, settles

from nnatomy.core import Traceable
from nnatomy.core.threads import openmp

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no helpers here")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Whatever the suite runs with: with one thread there are no helpers."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    openmp.release_helpers()
    torch.set_num_threads(before)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def compute() -> torch.Tensor:
    return torch.ones(400, 400) @ torch.ones(400, 400)


def test_helpers_end_and_come_back() -> None:
    compute()
    with_helpers = threads()
    openmp.release_helpers()
    assert threads() == with_helpers - (torch.get_num_threads() - 1)
    assert compute()[0, 0] == 400
    assert threads() == with_helpers


def test_a_trace_leaves_helpers_to_the_thread_that_computes() -> None:
    view = Traceable(Calls(lambda self, x: compute() + x))
    openmp.release_helpers()
    without = threads()
    helpers = torch.get_num_threads() - 1
    compute()
    assert threads() == without + helpers
    with view.trace(0) as tracer:
        result = tracer.result
        assert result[0, 0] == 400
        # The block's are gone; the forward pass may still have its own for a moment.
        assert settles(lambda: threads() <= without + 1)


def test_a_block_has_no_thread_that_has_run_a_model() -> None:
    models, blocks = set(), set()

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            models.add(threading.current_thread())
            return x + 1

    view = Traceable(Net())

    def block() -> torch.Tensor:
        blocks.add(threading.current_thread())
        return view.output

    with view.trace(torch.ones(1, 2)) as tracer:
        assert tracer.result.sum() == 4
    for _ in range(3):
        with view.trace() as tracer:
            both = [tracer.invoke(torch.full((1, 2), value), block) for value in (1.0, 2.0)]
        assert [one.value.sum() for one in both] == [4, 6]
    assert len(blocks) > 1
    assert models
    assert not models & blocks


def test_where_there_is_no_such_library_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert openmp._function("libgomp*.so*", "omp_pause_resource_all")(1) is None
    assert openmp._function("libtorch_cpu.so", "mkl_serv_thread_free_buffers")() is None


def test_memory_that_has_been_freed_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

    openmp.release_memory()
    before = resident()
    kept = [torch.ones(1000) for _ in range(20_000)]  # 4 kB each: 80 MB of the heap
    last = kept[-1]  # at the heap's top: malloc cannot give back what is below of itself
    assert resident() > before + 60
    del kept
    openmp.release_memory()
    assert resident() < before + 40
    assert last[0] == 1
