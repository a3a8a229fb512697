"""`python -m nnatomy.demo.remote`: the demo's analyses through a server in another process, and whether they are the local ones."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from transformers.utils import logging

from nnatomy.demo.__main__ import MODELS
from nnatomy.demo.analysis import analyse
from nnatomy.demo.tables import results_table
from nnatomy.errors import ConnectionLostError
from nnatomy.remote.connection import Connection

_SECONDS = 120


@contextmanager
def server_of(model: str) -> Iterator[str]:
    """A server of that model in another process, on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen([sys.executable, "-m", "nnatomy", "serve", model, "--port", port])
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + _SECONDS
        while True:
            try:
                Connection(address).close()
                break
            except ConnectionLostError:
                if process.poll() is not None or time.monotonic() > end:
                    raise
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def differences(one: Any, other: Any, path: str = "results") -> list[str]:
    """Where two results are not the same, bit for bit."""
    if isinstance(one, Tensor):
        theirs = other.local() if hasattr(other, "local") else other
        mine = one.detach()
        same = mine.shape == theirs.shape and bool((mine == theirs.detach()).all())
        return [] if same else [path]
    if is_dataclass(one):
        names = [field.name for field in fields(one)]
        return [at for name in names for at in differences(getattr(one, name), getattr(other, name), f"{path}.{name}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [at for i, pair in enumerate(zip(one, other, strict=True)) for at in differences(*pair, f"{path}[{i}]")]
    return [] if one == other else [path]


def main() -> None:
    """Run everything at a server and here, print the tables, and end with an error if they differ."""
    logging.disable_progress_bar()
    for name in MODELS:
        with server_of(f"demo:{name}") as address:
            remote, local = analyse(name, address), analyse(name)
            print(results_table(remote), flush=True)
            if different := differences(local, remote):
                raise SystemExit(f"Not what the local model gives: {', '.join(different)}")
        print(f"demo:{name} at {address}: all of it is what the local model gives, bit for bit.\n", flush=True)


if __name__ == "__main__":
    main()
