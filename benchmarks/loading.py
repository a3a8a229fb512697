"""Load time: `StandardizedTransformer(folder)` against 1.2 x `from_pretrained` and three forwards of a short prompt.

    python benchmarks/loading.py

A random model of GPT-2's size is saved once; each round loads it both ways. Figures are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from nnatomy import StandardizedTransformer

ROUNDS = 9


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    start = clock()
    result = run()
    return (clock() - start) * 1e3, result


def main() -> None:
    """Measure and print."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (1, 6))
    loads, forwards, ours, ratios = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        for round_ in range(ROUNDS + 1):
            load, hf = timed(lambda: AutoModelForCausalLM.from_pretrained(folder))
            # The first forward pass reads the weights from the file that loading has mapped.
            three = sum(timed(partial(hf, ids))[0] for _ in range(3))
            del hf
            mine, model = timed(lambda: StandardizedTransformer(folder))
            del model
            if round_:  # the first one warms up
                loads.append(load)
                forwards.append(three)
                ours.append(mine)
                ratios.append(mine / (1.2 * load + three))
    print(
        f"from_pretrained {statistics.median(loads):.0f} ms, three forwards {statistics.median(forwards):.0f} ms, ",
        end="",
    )
    print(f"StandardizedTransformer {statistics.median(ours):.0f} ms")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"ours / (1.2 x load + 3 forwards): {middle:.2f} ({low:.2f}-{high:.2f}); the target is 1.0")


if __name__ == "__main__":
    main()
