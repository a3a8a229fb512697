"""`make cluster`, which takes minutes: a hundred clients over two replicas against one, and a cluster that comes again; with figures.

With one replica, 64 of the clients have a session, and the others are refused until one of these has ended.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_processes import kill, left_of, started_by
from remote_blocks import leaves
from remote_server import Process
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from nnatomy import StandardizedTransformer
from nnatomy.errors import ConnectionLostError
from nnatomy.remote.wire import pack, to_bytes, unpack

#: Rows and columns of the tokens of a block.
SHAPE = 16, 32
CLIENTS, BLOCKS = 100, 10
#: What has a number first, in an answer.
_NUMBERED = ("t", "output", "object", "cache")


@pytest.mark.timeout(1200)
def test_a_hundred_clients_over_two_replicas_and_over_one() -> None:
    found = {}
    for replicas in (1, 2):
        process = Process(
            "demo:gpt2", "--ray", "--replicas", str(replicas), "--drain", "5", "--max-held-bytes", str(64 << 20)
        )
        try:
            found[replicas] = asyncio.run(clients(process.address))
            sizes = [(text[:40], resident(pid)) for pid, text in started_by(process._process.pid).items()]
            each = [size for text, size in sizes if "ServeReplica:demo:gpt2" in text]
            others = sum(size for _, size in sizes) - sum(each)
            print(f"\nresident: {max(each) / 1e3:.0f} MB a replica, {others / 1e3:.0f} MB of Ray's other processes")
        finally:
            process.stop()
    for replicas, (seconds, blocks, refused) in found.items():
        blocks.sort()
        print(
            f"\n{CLIENTS} clients, {BLOCKS} blocks of {SHAPE[0] * SHAPE[1]} tokens each, {replicas} replicas: "
            f"{CLIENTS * BLOCKS / seconds:.1f} blocks/s; a block takes {1e3 * statistics.median(blocks):.0f} ms, "
            f"{1e3 * blocks[int(0.95 * len(blocks))]:.0f} at the 95th percentile; refused {refused} times"
        )
    print(f"two replicas against one: {found[1][0] / found[2][0]:.2f} times the throughput")
    assert found[1][2] > 0
    assert found[2][2] == 0 or found[2][2] < found[1][2]


def resident(pid: int) -> int:
    """The memory that a process has, in kB."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def numbers_in(told: Any) -> list[int]:
    """Of all that an answer tells of: tensors, caches, outputs."""
    parts = told if isinstance(told, list) else list(told.values()) if isinstance(told, dict) else []
    own = (
        [one[0] for key, one in told.items() if key in _NUMBERED and isinstance(one, list)]
        if isinstance(told, dict)
        else []
    )
    return own + [number for one in parts for number in numbers_in(one)]


async def clients(address: str) -> tuple[float, list[float], int]:
    """Seconds until all have what they asked for, those of each block, and how often one has been refused."""
    took: list[float] = []
    refused, ids = 0, torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE) % 50
    put = ["put", 60, "int64", list(SHAPE), [0, 1]]
    # What a block gives is dropped by the next one: else 64 sessions hold all that they have had.
    opened = ["open", 8, {"input_ids": {"t": 60}}]

    async def client(_: int) -> None:
        nonlocal refused
        while True:
            try:
                async with connect(
                    f"{address.replace('http', 'ws')}/v1/session",
                    proxy=None,
                    max_size=None,
                    open_timeout=120,
                    ping_timeout=None,
                ) as socket:
                    held: list[int] = []
                    for _ in range(BLOCKS):
                        began = time.perf_counter()
                        commands = [["grad", False], ["drop", held], put, opened]
                        await socket.send(pack({"n": 1, "c": commands, "q": ["go", 8, []]}, [to_bytes(ids)]))
                        answer: Any = unpack(await socket.recv())[0]  # type: ignore[arg-type]
                        assert "ok" in answer, answer
                        held = numbers_in(answer["ok"])
                        took.append(time.perf_counter() - began)
                    return
            except InvalidStatus as error:
                assert error.response.status_code == 503
                assert int(error.response.headers["Retry-After"]) > 0
                refused += 1
                await asyncio.sleep(1)

    began = time.perf_counter()
    await asyncio.gather(*(client(one) for one in range(CLIENTS)))
    assert len(took) == CLIENTS * BLOCKS
    return time.perf_counter() - began, took, refused


@pytest.mark.timeout(600)
def test_a_head_that_is_killed_and_comes_again() -> None:
    """The whole cluster goes with it, its clients are told, and a new one at the same address serves."""
    torch.set_num_threads(1)
    process = Process("demo:gpt2", "--ray", "--cpus", "0.5")
    try:
        old: Any = StandardizedTransformer("demo:gpt2", server=process.address)
        with torch.no_grad(), old.trace("Japan is in"):
            wanted = old.logits
        all_of_them = started_by(process._process.pid)
        kill(process._process.pid)
        process.stop()
        began = time.monotonic()
        with pytest.raises(ConnectionLostError, match="is gone"):
            for _ in range(100):
                old("Japan is in")
                time.sleep(0.1)
        assert time.monotonic() - began < 30
        assert not left_of(all_of_them, 60)
    finally:
        process.stop()
    again = Process("demo:gpt2", "--ray", "--cpus", "0.5", port=process.port)
    try:
        new: Any = StandardizedTransformer("demo:gpt2", server=again.address)
        with torch.no_grad(), new.trace("Japan is in"):
            found = new.logits
        assert torch.equal(leaves(wanted)[0], leaves(found)[0])
        new.close()
    finally:
        again.stop()


@pytest.mark.timeout(600)
def test_replicas_come_with_the_sessions() -> None:
    """One at first; a second one where the first has more than half of the sessions that it can; and all of these are right."""
    torch.set_num_threads(1)
    process = Process("demo:gpt2", "--ray", "--autoscale", "1", "2", "--cpus", "0.5", "--max-sessions", "4")
    models: list[Any] = []
    try:
        replicas: set[str] = set()
        began = time.monotonic()
        while len(replicas) < 2:
            assert time.monotonic() - began < 300
            with suppress(ConnectionLostError):
                models.append(StandardizedTransformer("demo:gpt2", server=process.address))
                replicas.add(models[-1]._connection.replica)
            time.sleep(1)
        print(f"\nthe second replica's first session, after {time.monotonic() - began:.0f} s; {len(models)} sessions")
        assert len(models) > 4
        local = StandardizedTransformer("demo:gpt2")
        for model in models:
            assert torch.equal(torch.tensor(model("Japan is in").logits.tolist()), local("Japan is in").logits)
            model.close()
    finally:
        process.stop()
