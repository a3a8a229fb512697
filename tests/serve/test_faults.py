"""Clients that do not read, sessions that last, and servers that come and go: an end within a time, with its reason."""

from __future__ import annotations

import signal
import socket as sockets
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from remote_blocks import leaves
from remote_server import Process, served
from serve_client import Raw
from websockets.sync.client import connect

from nnatomy import StandardizedTransformer
from nnatomy.errors import ConnectionLostError
from nnatomy.remote.connection import Connection
from nnatomy.remote.wire import pack

PROMPT = "The capital of France is"
MANY = ["op", "aten.new_zeros.default", [{"t": 2}, [50 << 18]], {}, [60]]  # 50 MiB


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with served("demo:gpt2", "--max-send-seconds", "4") as process:
        yield process


def sessions(server: Process) -> int:
    connection = Connection(server.address)
    found = int(connection.status()["sessions"]) - 1
    connection.close()
    return found


def _handshake(server: Process) -> sockets.socket:
    """A WebSocket by hand: nothing reads it but the test."""
    plain = sockets.create_connection(("127.0.0.1", server.port))
    plain.sendall(
        b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert plain.recv(4096).startswith(b"HTTP/1.1 101")
    return plain


def send(plain: sockets.socket, frame: bytes) -> None:
    assert len(frame) < 1 << 16
    plain.sendall(bytes([0x82, 0xFE]) + len(frame).to_bytes(2, "big") + bytes(4) + frame)


def asked(server: Process) -> sockets.socket:
    plain = _handshake(server)
    put = ["put", 2, "float32", [1], [0]]
    send(plain, pack({"n": 1, "c": [put, MANY], "q": ["fetch", [60]]}, [bytes(4)]))
    return plain


@pytest.mark.parametrize("trickle", [False, True], ids=["nothing", "a byte at a time"])
def test_a_client_that_does_not_read(server: Process, trickle: bool) -> None:
    """It is cut off, what was to be sent is let go, and others are answered meanwhile."""
    Raw(server.address).__enter__().socket.close()
    time.sleep(0.2)
    before = server.resident
    with ExitStack() as stack:
        slow = [stack.enter_context(asked(server)) for _ in range(4)]
        began, longest = time.monotonic(), 0.0
        with Raw(server.address) as other:
            while (asked_at := time.monotonic()) < began + 6.5:
                assert "ok" in other.ask(["sync"])
                longest = max(longest, time.monotonic() - asked_at)
                for one in slow if trickle else ():
                    with suppress(OSError):
                        one.recv(1)
                time.sleep(0.05)
        assert longest < 3  # seconds; where an answer waited for the slow clients to be cut off, it would take 4
        for _ in range(50):
            if sessions(server) == 0:
                break
            time.sleep(0.1)
        assert sessions(server) == 0
        assert server.resident - before < 60_000  # kB; four answers were 200 MiB


def test_a_client_that_takes_its_time_is_not_cut_off(server: Process) -> None:
    """It reads on; between its answers it may wait."""
    with connect(
        f"{server.address.replace('http', 'ws')}/v1/session", proxy=None, max_size=None, compression=None
    ) as one:
        put = ["put", 2, "float32", [1], [0]]
        for _ in range(2):
            one.send(pack({"n": 1, "c": [put, MANY], "q": ["fetch", [60]]}, [bytes(4)]))
            assert len(one.recv(timeout=60)) > 50 << 20
            time.sleep(5)


def test_a_session_lasts_so_long(server: Process) -> None:
    with served("demo:gpt2", "--max-total-seconds", "3") as process:
        model: Any = StandardizedTransformer("demo:gpt2", server=process.address)
        began = time.monotonic()
        with pytest.raises(ConnectionLostError, match="a session lasts 3 seconds at most"):
            while time.monotonic() - began < 30:
                model(PROMPT)
        assert time.monotonic() - began < 10


def test_a_server_that_is_killed_and_comes_again() -> None:
    """The old model says what to do, at once; a new one works."""
    with served("demo:gpt2") as first:
        old: Any = StandardizedTransformer("demo:gpt2", server=first.address)
        with torch.no_grad(), old.trace(PROMPT):
            wanted = old.logits
        first.stop(signal.SIGKILL)
        with served("demo:gpt2", port=first.port) as second:
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(ConnectionLostError, match="is gone.*Make the model again to go on"):
                    with old.trace(PROMPT):
                        old.logits
                assert time.monotonic() - began < 5
            new: Any = StandardizedTransformer("demo:gpt2", server=second.address)
            with torch.no_grad(), new.trace(PROMPT):
                found = new.logits
            assert torch.equal(leaves(wanted)[0], leaves(found)[0])
            new.close()
