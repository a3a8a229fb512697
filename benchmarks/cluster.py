"""What a cluster costs and gives, as ratios in one run: Ray Serve over the embedded server, two ranks over one process for each read
(`tensor_parallel.py`), and collecting by one and two workers.

pip install '.[cluster,serve]' && python benchmarks/cluster.py [--rounds 15] [--prompts 2000]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnatomy import StandardizedTransformer
from nnatomy.methods import collect_activations

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from remote_server import served

IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def one_read(model: Any) -> float:
    with model.trace(IDS):
        return float(model.layers_output[model.num_layers // 2].sum().item())


def reads(model: Any) -> float:
    with model.trace(IDS):
        found = [model.layers_output[i] for i in range(model.num_layers)]
    return float(found[-1].sum().item())


def upload(model: Any) -> float:
    """A megabyte there, and another one back."""
    ones = torch.ones(1 << 18)
    with model.trace(IDS):
        there = ones * model.layers_output[1][0, 0, 0]
    return float(there.sum().item())


BLOCKS: dict[str, Callable[[Any], float]] = {
    "one read": one_read,
    "a read of each layer": reads,
    "1 MB each way": upload,
}


def blocks(rounds: int) -> None:
    print("| block | embedded, ms | Ray Serve, ms | ratio |\n|---|---|---|---|")
    with served("demo:gpt2") as here, served("demo:gpt2", "--ray") as there, torch.no_grad():
        models = [StandardizedTransformer("demo:gpt2", server=one.address) for one in (here, there)]
        for name, block in BLOCKS.items():
            if len({block(model) for model in models}) > 1:
                raise SystemExit(f"{name}: the two do not agree")
            times: list[list[float]] = [[], []]
            for _ in range(rounds):
                for model, found in zip(models, times, strict=True):
                    began = time.perf_counter()
                    block(model)
                    found.append(1e3 * (time.perf_counter() - began))
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            print(
                f"| {name} | {statistics.median(times[0]):.1f} | {statistics.median(times[1]):.1f} | {ratio:.2f} |",
                flush=True,
            )


def collecting(count: int) -> None:
    """Rows a second, from the first shard that is there to the last: workers load the model once, however much there is to do."""
    model = StandardizedTransformer("demo:gpt2")
    prompts = [[3 + (7 * i + j) % 60 for j in range(64)] for i in range(count)]
    given: dict[str, Any] = {"positions": "all", "prompts_per_shard": max(1, count // 40), "progress": False}
    print("| collecting | rows/s | of one process | until the first shard, s |\n|---|---|---|---|")
    alone = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, workers in {"this process": 0, "1 worker": 1, "2 workers": 2}.items():
            engine: dict[str, Any] = {"engine": "ray", "workers": workers} if workers else {}
            began = time.time()
            collect_activations(model, prompts, folder=f"{folder}/{name}", **given, **engine)
            times = sorted(one.stat().st_mtime for one in Path(f"{folder}/{name}").glob("*.safetensors"))
            rows = 64 * given["prompts_per_shard"] * (len(times) - 1) / (times[-1] - times[0])
            alone = alone or rows
            print(f"| {name} | {rows:,.0f} | {rows / alone:.2f} | {times[0] - began:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--only", choices=("blocks", "ranks", "collecting"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only in (None, "blocks"):
        blocks(options.rounds)
    if options.only in (None, "ranks"):
        ranks = Path(__file__).with_name("tensor_parallel.py")
        subprocess.run([sys.executable, str(ranks), "--rounds", str(options.rounds)], check=True)
    if options.only in (None, "collecting"):
        collecting(options.prompts)


if __name__ == "__main__":
    main()
