"""What remote models cost: blocks on a local model, and on the same at a server behind a slow line.

    python benchmarks/remote.py [--delays 0 20 100] [--layers 12] [--width 64]

The server is another process on this machine; between the two stands a proxy that holds back what either sends for half of a
round trip's delay. Each figure is the median of several runs, in milliseconds, after one that is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnatomy import StandardizedTransformer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from remote_server import free_port, served

IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Hand on what comes, later by `delay`; what comes meanwhile is not held back for longer."""
    loop = asyncio.get_running_loop()
    while data := await reader.read(1 << 20):
        if delay:
            loop.call_later(delay, writer.write, data)
        else:
            writer.write(data)
    loop.call_later(delay, writer.close)


def proxy(target: int, delay: float) -> int:
    """A port whose connections go to that one, each way late by `delay` seconds."""
    port, ready = free_port(), threading.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)
        with suppress(ConnectionError):
            await asyncio.gather(_forward(reader, back, delay), _forward(there, writer, delay))

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", port)
        ready.set()
        async with server:
            await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    ready.wait()
    return port


def one_read(model: Any) -> Any:
    with model.trace(IDS):
        return model.layers_output[model.num_layers // 2].sum().item()


def reads(model: Any) -> Any:
    with model.trace(IDS):
        found = [model.layers_output[i] for i in range(model.num_layers)]
    return found[-1].sum().item()


def lens(model: Any) -> Any:
    with model.trace(IDS):
        rows = [model.lm_head(model.ln_final(model.layers_output[i][:, -1])) for i in range(model.num_layers)]
    return torch.stack([row.softmax(-1) for row in rows]).sum().item()


def patching(model: Any) -> Any:
    """Each layer's stream zeroed at each position, and a logit read: layers x positions."""
    values = []
    for i in range(model.num_layers):
        for position in range(len(IDS[0])):
            with model.trace(IDS):
                model.layers_output[i][:, position] = 0
                values.append(model.logits[0, -1, 7])
    return torch.stack(values).sum().item()


BLOCKS: dict[str, Callable[[Any], Any]] = {
    "one read": one_read,
    "a read of each layer": reads,
    "lens by hand": lens,
    "layers x positions, patched": patching,
}


def timed(block: Callable[[Any], Any], model: Any, wanted: float | None = None) -> tuple[float, int, float]:
    """Milliseconds, round trips, and the value."""
    connection = getattr(model, "_connection", None)
    times = []
    value = block(model)
    for _ in range(3 if block is patching else 7):
        before, trips = time.perf_counter(), connection.trips if connection else 0
        value = block(model)
        times.append((time.perf_counter() - before) * 1e3)
    if wanted is not None and value != wanted:
        raise AssertionError(f"{block.__name__}: {value} at the server, and {wanted} here")
    return sorted(times)[len(times) // 2], (connection.trips - trips) if connection else 0, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 20, 100], metavar="MS")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=4, vocab_size=1000)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        GPT2LMHeadModel(config).save_pretrained(folder)
        local = StandardizedTransformer(folder)
        here = {name: timed(BLOCKS[name], local) for name in options.blocks}
        print(f"GPT-2 of {options.layers} layers, width {options.width}; ms")
        print("| block | way | local | " + " | ".join(f"{delay:g} ms" for delay in options.delays) + " | round trips |")
        with served(folder) as server:
            addresses = {d: f"http://127.0.0.1:{proxy(server.port, d / 2e3)}" for d in options.delays}
            models = {d: StandardizedTransformer(folder, server=one) for d, one in addresses.items()}
            for name in options.blocks:
                for way in ("points", "commands"):
                    cells, trips = [], 0
                    for model in models.values():
                        model.by_commands = way == "commands"  # type: ignore[attr-defined]
                        took, trips, _ = timed(BLOCKS[name], model, here[name][2])
                        cells.append(f"{took:.0f}")
                    print(
                        f"| {name} | {way} | {here[name][0]:.0f} | {' | '.join(cells)} | {trips} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
