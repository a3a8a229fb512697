"""What reading costs on two ranks, over one process: each rank is a process of this machine, and they talk by gloo.

    python benchmarks/tensor_parallel.py [--layers 12] [--width 768]

A model on two ranks shares the machine's cores with itself here, so that the ratio of the plain forward passes is the machine's. What
nnatomy adds to it is the difference of the rows to the first. Medians of rounds in which the two take turns, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from nnatomy import StandardizedTransformer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from remote_server import free_port

IDS = torch.arange(3, 67)[None]


def blocks(model: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by what it reads."""

    def reading(*names: str, layer: int = 1) -> Callable[[], Any]:
        def block() -> None:
            with torch.no_grad(), model.trace(IDS, use_cache=False) as tracer:
                for name in names:
                    getattr(model, name)[layer]
                tracer.result  # noqa: B018

        return block

    def plain() -> None:
        with torch.no_grad():
            model.hf_model(IDS, use_cache=False)

    return {
        "the forward pass, plain": plain,
        "layers_output, one layer": reading("layers_output"),
        "heads_output, one layer": reading("heads_output"),
        "neurons, one layer": reading("neurons"),
        "attention_probabilities, one layer": reading("attention_probabilities"),
        "queries, keys, values, heads_output": reading("queries", "keys", "values", "heads_output"),
    }


def measure(folder: str, rounds: int) -> dict[str, tuple[float, float]]:
    """By block, milliseconds in one process and on all ranks; on the first rank."""
    one, two = (
        StandardizedTransformer(folder, validate=False),
        StandardizedTransformer(folder, tp_plan="auto", validate=False),
    )
    here, there = blocks(one), blocks(two)
    found: dict[str, tuple[float, float]] = {}
    for name in here:
        times: tuple[list[float], list[float]] = [], []
        for _ in range(rounds + 1):
            for kept, call in zip(times, (here[name], there[name]), strict=True):
                dist.barrier()
                if call is here[name] and dist.get_rank():
                    continue  # one process has the machine to itself
                began = time.perf_counter()
                call()
                kept.append(time.perf_counter() - began)
        if not dist.get_rank():
            found[name] = statistics.median(times[0][1:]) * 1e3, statistics.median(times[1][1:]) * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        for name, (one, two) in measure(os.environ["MODEL"], options.rounds).items():
            sys.stdout.write(f"| {name} | {one:.1f} | {two:.1f} | {two / one:.2f} |\n")
        dist.barrier()
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        heads = max(2, options.width // 64)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        sys.stdout.write("| | one process, ms | two ranks, ms | ratio |\n|---|---|---|---|\n")
        sys.stdout.flush()
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        common |= {"OMP_NUM_THREADS": "1", "MODEL": folder}
        ranks = [
            subprocess.Popen([sys.executable, *sys.argv], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        codes = [one.wait() for one in ranks]
        if any(codes):
            sys.exit(1)


if __name__ == "__main__":
    main()
