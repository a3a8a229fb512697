"""`make load`, which takes minutes: fifty clients at once, memory after 2,000 sessions, what parked ones cost; with figures."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from remote_blocks import BLOCKS
from remote_clients import check_clients
from remote_server import many_sessions, served
from serve_client import Raw

from nnatomy import StandardizedTransformer


def test_fifty_clients_at_once() -> None:
    torch.set_num_threads(1)
    with served("demo:gpt2") as server:
        began = time.perf_counter()
        check_clients(server, 50)
        print(
            f"\n50 clients with mixed blocks, from connection to the last answer: {time.perf_counter() - began:.1f} s"
        )


def test_memory_after_two_thousand_sessions() -> None:
    with served("demo:gpt2") as server:
        many_sessions(server, 200)
        found = [server.resident]
        for _ in range(4):
            many_sessions(server, 500)
            found.append(server.resident)
    print("\nresident after 200, 700, 1,200, 1,700 and 2,200 sessions, kB:", *found)
    assert found[-1] - found[0] < 30_000  # each session has held a megabyte, and left a pass in the middle


def test_what_parked_sessions_cost() -> None:
    torch.set_num_threads(1)
    with served("demo:gpt2") as server, ExitStack() as stack:
        model: Any = StandardizedTransformer("demo:gpt2", server=server.address)
        stack.callback(model.close)

        def fastest() -> float:
            def once() -> float:
                began = time.perf_counter()
                BLOCKS["reads"](model)
                return time.perf_counter() - began

            return min(once() for _ in range(60))

        fastest()
        alone = fastest()
        for _ in range(50):
            parked = stack.enter_context(Raw(server.address))
            parked.put(60, torch.tensor([[1, 2, 3, 4]]))
            assert "at" in parked.ask(["go", 8, [[4, "output"]]], [["open", 8, {"input_ids": {"t": 60}}]])["ok"]
        beside = fastest()
    print(f"\na block of twelve reads: {1000 * alone:.1f} ms alone, {1000 * beside:.1f} ms beside 50 parked sessions")
    assert beside < 1.5 * alone
