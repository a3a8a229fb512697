"""What remote models cost: blocks on a local model, and on the same at a server behind a slow line.

    python benchmarks/remote.py [--delays 0 20 100] [--layers 12] [--width 64]
    python benchmarks/remote.py --delays 0 --width 768 --vocab 50257      # GPT-2's size

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
from nnatomy.methods import activation_patching, attribution_patching, logit_difference, logit_lens

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


OTHER_IDS = [[3, 1, 4, 7, 5, 9, 2, 6]]


def method_lens(model: Any) -> Any:
    return logit_lens(model, IDS).sum().item()


def method_patching(model: Any) -> Any:
    found = activation_patching(model, clean=IDS, corrupted=OTHER_IDS, metric=logit_difference(7, 8), progress=False)
    return found.effect.sum().item()


def method_attribution(model: Any) -> Any:
    return attribution_patching(model, IDS, OTHER_IDS, metric=logit_difference(7, 8)).effect.sum().item()


BLOCKS: dict[str, Callable[[Any], Any]] = {
    "one read": one_read,
    "a read of each layer": reads,
    "lens by hand": lens,
    "layers x positions, patched": patching,
    "`logit_lens`": method_lens,
    "`activation_patching`": method_patching,
    "`attribution_patching`": method_attribution,
}
METHODS = [name for name in BLOCKS if name.startswith("`")]


def timed(block: Callable[[Any], Any], models: list[Any]) -> tuple[list[float], int]:
    """Milliseconds of each model, run in turn, and the round trips of the last one."""
    values, trips = [block(model) for model in models], 0
    if len(set(values)) > 1:
        raise AssertionError(f"{block.__name__}: {values}, and they should be the same")
    times: list[list[float]] = [[] for _ in models]
    for _ in range(3 if block in (patching, method_patching) else 7):
        for model, found in zip(models, times, strict=True):
            connection = getattr(model, "_connection", None)
            before, trips = time.perf_counter(), connection.trips if connection else 0
            block(model)
            found.append((time.perf_counter() - before) * 1e3)
            trips = connection.trips - trips if connection else 0
    return [sorted(found)[len(found) // 2] for found in times], trips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 20, 100], metavar="MS")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = max(4, options.width // 64)
    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=heads, vocab_size=options.vocab)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        GPT2LMHeadModel(config).save_pretrained(folder)
        local = StandardizedTransformer(folder)
        print(f"GPT-2 of {options.layers} layers, width {options.width}; ms")
        print("| block | way | local | " + " | ".join(f"{delay:g} ms" for delay in options.delays) + " | round trips |")
        print("|---|---|---|" + "---|" * len(options.delays) + "---|")
        with served(folder) as server:
            addresses = {d: f"http://127.0.0.1:{proxy(server.port, d / 2e3)}" for d in options.delays}
            models = {d: StandardizedTransformer(folder, server=one) for d, one in addresses.items()}
            for name in options.blocks:
                for way in ("whole", "points") if name in METHODS else ("points", "commands"):
                    for model in models.values():
                        model.by_commands = way == "commands"  # type: ignore[attr-defined]
                        model.whole_methods = way == "whole"  # type: ignore[attr-defined]
                    (here, *there), trips = timed(BLOCKS[name], [local, *models.values()])
                    cells = [f"{here:.0f}", *(f"{one:.0f}" for one in there)]
                    if len(there) == 1:
                        cells[1] += f" ({there[0] / here:.2f} x)"
                    print(f"| {name} | {way} | {' | '.join(cells)} | {trips} |", flush=True)


if __name__ == "__main__":
    main()
