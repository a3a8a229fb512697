"""A server in another process, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import ProxyHandler, build_opener


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Process:
    """`nnatomy serve MODEL`, or a script that serves at the port it is given."""

    def __init__(self, model: str, *options: str, script: str = "") -> None:
        self.port = free_port()
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

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it, by its own process id."""
        if self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(30)
        if self._process.stderr is not None:
            self._process.stderr.close()


@contextmanager
def served(model: str, *options: str, script: str = "") -> Iterator[Process]:
    process = Process(model, *options, script=script)
    try:
        yield process
    finally:
        process.stop()
