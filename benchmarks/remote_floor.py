"""The least that reading each layer of a model in another process costs: plain hooks there, which send over a bare socket.

    python benchmarks/remote_floor.py [--width 768] [--vocab 50257]

Beside it the same block of nnatomy's, here and at a server, in turn. Each value is asked for and sent by itself, as a block at a
server reads by points: 13 round trips. The least of the times, and the median, in milliseconds.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from remote import IDS, reads, served
from transformers import GPT2Config, GPT2LMHeadModel

from nnatomy import StandardizedTransformer


def plain(folder: str) -> Any:
    torch.set_num_threads(1)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


class Enough(Exception):  # noqa: N818
    """The last layer has been read: as in a block, the pass ends there."""


def hooked(model: Any, take: Callable[[torch.Tensor], None]) -> None:
    """A pass whose layers' outputs are handed out, each as it comes."""

    def hook(layer: Any, _: Any, out: Any) -> None:
        take(out[0] if isinstance(out, tuple) else out)
        if layer is model.transformer.h[-1]:
            raise Enough

    taken = [layer.register_forward_hook(hook) for layer in model.transformer.h]
    with suppress(Enough):
        model(torch.tensor(IDS))
    for one in taken:
        one.remove()


def serve(folder: str, port: int) -> None:
    """The other process: a byte asks for the next value."""
    model = plain(folder)
    with socket.create_connection(("127.0.0.1", port)) as line, torch.no_grad():
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def take(value: torch.Tensor) -> None:
            if line.recv(1):
                line.sendall(value.contiguous().numpy().tobytes())

        while line.recv(1):
            hooked(model, take)
            line.sendall(b".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = max(4, options.width // 64)
    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=heads, vocab_size=options.vocab)
    shape = 1, len(IDS[0]), options.width
    size = 4 * shape[1] * shape[2]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), socket.create_server(("127.0.0.1", 0)) as listening:
        GPT2LMHeadModel(config).save_pretrained(folder)
        other = subprocess.Popen([sys.executable, __file__, "--serve", folder, str(listening.getsockname()[1])])
        line, _ = listening.accept()
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        model, local = plain(folder), StandardizedTransformer(folder)

        def here() -> float:
            found: list[torch.Tensor] = []
            hooked(model, found.append)
            return found[-1].sum().item()

        def there() -> float:
            line.sendall(b".")
            for _ in range(options.layers):
                line.sendall(b".")
                data = bytearray(size)
                view, got = memoryview(data), 0
                while got < size:
                    got += line.recv_into(view[got:])
                last = torch.frombuffer(data, dtype=torch.float32).view(shape)
            line.recv(1)
            return last.sum().item()

        with served(folder) as server:
            remote = StandardizedTransformer(folder, server=server.address)
            ways = {
                "plain hooks": here,
                "nnatomy": lambda: reads(local),
                "plain hooks in another process": there,
                "nnatomy at a server": lambda: reads(remote),
            }
            values = {name: way() for name, way in ways.items()}
            if len(set(values.values())) > 1:
                raise AssertionError(f"{values}: they should be the same")
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.rounds):
                for name, way in ways.items():
                    began = time.perf_counter()
                    way()
                    times[name].append(1e3 * (time.perf_counter() - began))
            print(f"GPT-2 of {options.layers} layers, width {options.width}, vocabulary {options.vocab}; ms")
            print("| a read of each layer | least | median | by the floor, median of the rounds |")
            print("|---|---|---|---|")
            floor = times["plain hooks in another process"]
            for name, found in times.items():
                ratio = statistics.median(one / least for one, least in zip(found, floor, strict=True))
                print(f"| {name} | {min(found):.1f} | {statistics.median(found):.1f} | {ratio:.2f} |")
        line.close()
        other.wait()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
