"""Many clients at once, and many one after the other: each has its own right answers, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from remote_blocks import BLOCKS, leaves
from remote_clients import check_clients
from remote_server import Process, many_sessions, served
from serve_client import Raw

from nnatomy import StandardizedTransformer


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    torch.set_num_threads(1)
    with served("demo:gpt2") as process:
        yield process


def test_clients_at_once(server: Process) -> None:
    check_clients(server, 18)  # `make load` has 50


def test_memory_is_flat_after_many_sessions(server: Process) -> None:
    many_sessions(server, 30)
    before = server.resident
    many_sessions(server, 120)
    assert server.resident - before < 20_000  # kB; what the sessions have held was a megabyte each


def test_parked_sessions_do_not_hold_up_others(server: Process) -> None:
    """Twenty stand in the middle of a pass; another's is run."""
    with ExitStack() as stack:
        for _ in range(20):
            parked = stack.enter_context(Raw(server.address))
            parked.put(60, torch.tensor([[1, 2, 3, 4]]))
            assert "at" in parked.ask(["go", 8, [[4, "output"]]], [["open", 8, {"input_ids": {"t": 60}}]])["ok"]
        model: Any = StandardizedTransformer("demo:gpt2", server=server.address)
        wanted = BLOCKS["reads"](StandardizedTransformer("demo:gpt2"))
        for key, one in BLOCKS["reads"](model).items():
            assert torch.equal(leaves(one)[0], leaves(wanted[key])[0])
        model.close()
