"""Many clients at once, and many one after the other: each has its own right answers, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_blocks import leaves
from remote_server import Process, served

from nnatomy import StandardizedTransformer
from nnatomy.remote.wire import pack

CLIENTS = 12


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    torch.set_num_threads(1)
    with served("demo:gpt2") as process:
        yield process


def block(model: Any, which: int) -> list[torch.Tensor]:
    prompt = f"The capital of {('France', 'Japan', 'Italy')[which % 3]} is"
    with torch.no_grad(), model.trace(prompt):
        hidden = model.layers_output[which % model.num_layers]
        hidden[:, -1] *= 1 + which
        logits = model.logits
    return [*leaves(hidden), *leaves(logits)]


def test_clients_at_once(server: Process) -> None:
    local = StandardizedTransformer("demo:gpt2")
    wanted = [block(local, which) for which in range(CLIENTS)]
    found: dict[int, list[torch.Tensor]] = {}

    def client(which: int) -> None:
        model: Any = StandardizedTransformer("demo:gpt2", server=server.address)
        for _ in range(2):
            found[which] = block(model, which)
        model.close()

    threads = [threading.Thread(target=client, args=(which,)) for which in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == list(range(CLIENTS))
    for which, values in found.items():
        assert all(map(torch.equal, values, wanted[which]))


def test_memory_is_flat_after_many_sessions(server: Process) -> None:
    from serve_client import Raw

    def resident() -> int:
        status = Path(f"/proc/{server._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def sessions(count: int) -> None:
        for _ in range(count):
            with Raw(server.address) as one:
                one.put(60, torch.tensor([[1, 2, 3, 4]]))
                one.put(62, torch.zeros(1 << 18))
                told = one.raw(
                    pack(
                        {
                            "n": 1,
                            "c": [["open", 8, {"input_ids": {"t": 60}}]],
                            "q": ["go", 8, [[5, "output"]]],
                        }
                    )
                )
                assert "ok" in told

    sessions(30)
    before = resident()
    sessions(120)
    assert resident() - before < 20_000  # kB; what the sessions have held was a megabyte each
