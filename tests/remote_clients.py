"""Clients at once, for tests: mixed blocks, each checked against the local model's values."""

from __future__ import annotations

import threading
from typing import Any

import torch
from remote_blocks import BLOCKS, leaves
from remote_server import Process

from nnatomy import StandardizedTransformer

#: What they do: reads, assignments, generation, gradients, several blocks on one pass.
MIXED = (
    "reads",
    "two_traces",
    "skip",
    "generation",
    "gradients",
    "gradients_asked",
    "invoked",
    "masks_and_indices",
    "caches",
)


def check_clients(server: Process, clients: int) -> None:
    """Have so many run, each a block of its own kind; they all begin when all are connected."""
    local: Any = StandardizedTransformer("demo:gpt2")
    wanted = {name: BLOCKS[name](local) for name in MIXED}
    found: dict[int, dict[str, list[torch.Tensor]]] = {}
    ready = threading.Barrier(clients + 1, timeout=120)

    def client(which: int) -> None:
        model: Any = StandardizedTransformer("demo:gpt2", server=server.address)
        ready.wait()
        found[which] = {key: leaves(one) for key, one in BLOCKS[MIXED[which % len(MIXED)]](model).items()}
        model.close()

    threads = [threading.Thread(target=client, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == list(range(clients))
    for which, values in found.items():
        for key, one in wanted[MIXED[which % len(MIXED)]].items():
            assert torch.equal(leaves(one)[0], values[key][0]), (which, key)
