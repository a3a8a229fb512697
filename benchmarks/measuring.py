"""What the benchmarks share: contenders that do the same work, checked to agree, and timed in turn."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import nn

try:
    if os.environ.get("WITHOUT_NNSIGHT"):  # in a contender's own process
        raise ImportError
    import nnsight
except ImportError:
    nnsight = None

try:
    import nnterp
except ImportError:  # also where it does not go with the nnsight that is installed
    nnterp = None

try:
    import transformer_lens
except ImportError:
    transformer_lens = None

Contender = Callable[[], Any]

#: The contenders of each row: ours, by plain hooks, with each peer that is installed.
Rows = dict[str, dict[str, Contender]]


def versions() -> dict[str, Any]:
    """What is being measured."""
    peers = {"nnsight": nnsight, "nnterp": nnterp, "transformer_lens": transformer_lens}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: peer and version(name) for name, peer in peers.items()},
        "threads": torch.get_num_threads(),
    }


def hooked(modules: list[nn.Module], call: Callable[[], Any]) -> list[Any]:
    """By plain forward hooks: the outputs of `modules`, then the result."""
    seen: list[Any] = []
    handles = [module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in modules]
    result = call()
    for handle in handles:
        handle.remove()
    return [*seen, result]


def agree(values: dict[str, Any]) -> bool:
    """Whether all contenders gave the same tensors."""
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return all(
        len(one) == len(lists[0]) and all(torch.equal(a, b) for a, b in zip(one, lists[0], strict=True))
        for one in lists
    )


def timed(run: Contender, repetitions: int) -> float:
    """Microseconds a repetition."""
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - start) / repetitions * 1e6


def measure(
    contenders: dict[str, Contender],
    repetitions: int,
    rounds: int,
    same: Callable[[dict[str, Any]], bool] = agree,
    elsewhere: Callable[[str], float] | None = None,
) -> dict[str, Any]:
    """Times in microseconds (medians; the least under "least"), and the ratios of ours to each other one, round
    by round (in each in another order). `elsewhere` times a contender, by name, in a process of its own."""
    if not same({name: run() for name, run in contenders.items()}):
        raise SystemExit("The contenders do not agree.")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            times[name].append(elsewhere(name) if elsewhere else timed(contenders[name], repetitions))
    figures: dict[str, Any] = {name: statistics.median(taken) for name, taken in times.items()}
    figures["least"] = {name: min(taken) for name, taken in times.items()}
    for other in contenders:
        if other != "ours":
            ratios = [a / b for a, b in zip(times["ours"], times[other], strict=True)]
            figures[f"ours/{other}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return figures
