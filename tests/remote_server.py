"""A server in another process, for tests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import torch
from websockets.sync.client import connect

from nnatomy.remote.wire import pack, to_bytes, unpack


def free_port() -> int:
    """One that is free, and not of those that the system gives to connections: it may be taken only a while later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


class Process:
    """`nnatomy serve MODEL`, or a script that serves at the port it is given."""

    def __init__(self, model: str, *options: str, script: str = "", port: int = 0) -> None:
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "nnatomy", "serve", model, *options, "--port", str(self.port)]
        if script:
            command = [sys.executable, "-c", script, str(self.port)]
        environment = {name: one for name, one in os.environ.items() if name != "NNATOMY_SERVER"} | {
            "OMP_NUM_THREADS": "1"
        }
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        opener = build_opener(ProxyHandler({}))
        for _ in range(1200):
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                raise RuntimeError(f"the server has ended: {self._process.stderr.read().decode()}")
            try:
                opener.open(f"{self.address}/v1/status", timeout=5).close()
                return
            except OSError as error:
                if "401" in str(error):
                    return
            time.sleep(0.1)
        raise RuntimeError("the server does not come up")

    @property
    def resident(self) -> int:
        """The memory that it has, in kB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it, by its own process id."""
        if self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(30)
        if self._process.stderr is not None:
            self._process.stderr.close()


@contextmanager
def served(model: str, *options: str, script: str = "", port: int = 0) -> Iterator[Process]:
    process = Process(model, *options, script=script, port=port)
    try:
        yield process
    finally:
        process.stop()


def many_sessions(server: Process, count: int) -> None:
    """So many, one after the other, each left in the middle of a pass, with a megabyte."""
    ids, zeros = torch.tensor([[1, 2, 3, 4]]), torch.zeros(1 << 18)
    commands = [
        ["put", 60, "int64", [1, 4], [0, 1]],
        ["put", 62, "float32", [1 << 18], [0]],
        ["open", 8, {"input_ids": {"t": 60}}],
    ]
    frame = pack({"n": 1, "c": commands, "q": ["go", 8, [[5, "output"]]]}, [to_bytes(ids), to_bytes(zeros)])
    for _ in range(count):
        with connect(f"{server.address.replace('http', 'ws')}/v1/session", proxy=None, max_size=None) as socket:
            socket.send(frame)
            assert "ok" in unpack(socket.recv(timeout=60))[0]
