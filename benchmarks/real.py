"""SmolLM2-135M-Instruct (`demo:smollm2`): load time, and the layer x position map of a pair of five tokens.

    python benchmarks/real.py [--rounds N] [--only map|loading] [--processor]

Loading is set against `from_pretrained` and four forwards of the prompts that validation runs (two of six tokens; the last time of
eight, one padded), without the tokenizer and with it, which ours loads too; and against the least that validation needs: the same
passes, of which only the first goes on to the logits, and a product of the head with the last positions. With `--processor` it is
timed by the processor's clock, which other processes disturb less.

The map is set against the same work by plain hooks: both prompts once, of each layer the five patched rows through the layers behind
it, called by themselves, and one product with the head. The two maps have to agree.

All in turn in one process, in random order; figures are medians, of ratios those within a round.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loading import timed
from measuring import hooked, measure, versions
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from nnatomy import StandardizedTransformer
from nnatomy.methods import activation_patching, logit_difference
from nnatomy.validation.passes import Passes

CLEAN, CORRUPTED, ANSWERS = "The capital of France is", "The capital of Japan is", (" Paris", " Tokyo")


def loading(folder: str, rounds: int, clock: Callable[[], float]) -> None:
    """Print the load time, what it is set against, and the ratios."""
    passes = Passes(StandardizedTransformer(folder, validate=False))
    first, second = passes.inputs["input_ids"].tolist()
    padded = passes.prepare([first + first[:2], second])
    names = ("from_pretrained", "the tokenizer", "four forwards", "the passes alone", "ours")
    found: dict[str, list[float]] = {name: [] for name in names}

    def clocked(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
        return timed(partial(call, *args, **kwargs), clock)

    def theirs() -> None:
        model_ms, hf = clocked(AutoModelForCausalLM.from_pretrained, folder)
        tokenizer_ms, _ = clocked(AutoTokenizer.from_pretrained, folder)
        # The first one reads the weights from the file that loading has mapped.
        whole = [clocked(hf, **inputs)[0] for inputs in (passes.inputs,) * 3 + (padded,)]
        body = [clocked(hf.model, **inputs)[0] for inputs in (passes.inputs,) * 2 + (padded,)]
        head, _ = clocked(hf.lm_head, torch.ones(2, 1, hf.config.hidden_size))
        parts = (model_ms, tokenizer_ms, sum(whole), whole[0] + sum(body) + head)
        for name, part in zip(names, parts, strict=False):
            found[name].append(part)

    def ours() -> None:
        found["ours"].append(clocked(StandardizedTransformer, folder)[0])

    for _ in range(rounds + 1):
        for one in random.sample((theirs, ours), 2):
            gc.collect()  # what the others have left is nobody's
            one()
    for name, times in found.items():
        del times[0]  # which warms up
        print(f"{name}: {statistics.median(times):.0f} ms ({min(times):.0f}-{max(times):.0f})")
    model, tokenizer, four, alone, mine = (torch.tensor(times) for times in found.values())
    for name, ratios in (
        ("ours / (from_pretrained + four forwards)", mine / (model + four)),
        ("ours / (the same and the tokenizer)", mine / (model + tokenizer + four)),
        ("ours / (1.5 x from_pretrained + four forwards)", mine / (1.5 * model + four)),
        ("ours / (from_pretrained + the tokenizer + the passes alone)", mine / (model + tokenizer + alone)),
    ):
        print(f"{name}: {statistics.median(ratios.tolist()):.2f} ({ratios.min():.2f}-{ratios.max():.2f})")


def by_hooks(model: StandardizedTransformer) -> Tensor:
    """The map, by plain hooks on the model's own modules: (layer, position)."""
    hf, layers = model.hf_model, list(model.hf_model.model.layers)
    clean, corrupted = (model.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in (CLEAN, CORRUPTED))
    kept, base = (hooked(layers, partial(hf, ids, use_cache=False))[:-1] for ids in (clean, corrupted))
    length = clean.shape[1]
    rotary = hf.model.rotary_emb(base[0], torch.arange(length)[None])
    own = torch.eye(length, dtype=torch.bool)[:, :, None]
    ends = []
    for i in range(len(layers)):
        hidden = torch.where(own, kept[i], base[i])
        for layer in layers[i + 1 :]:
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        ends.append(hidden[:, -1])
    logits = hf.lm_head(hf.model.norm(torch.stack(ends)))
    right, wrong = (model.tokenizer.encode(answer)[0] for answer in ANSWERS)
    return logits[..., right] - logits[..., wrong]


def agree(values: dict[str, Any]) -> bool:
    """Whether both maps are the same but for rounding."""
    return bool((values["ours"] - values["hooks"]).abs().max() <= 1e-3)


def the_map(model: StandardizedTransformer, rounds: int) -> None:
    """Print the time of the map, ours and by hooks."""
    metric = logit_difference(*ANSWERS, model)

    def ours() -> Tensor:
        return activation_patching(model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, progress=False).effect

    figures = measure({"ours": ours, "hooks": partial(by_hooks, model)}, 1, rounds, agree)
    middle, low, high = figures["ours/hooks"]
    times = " and ".join(f"{figures[name] / 1e3:.0f} ms" for name in ("ours", "hooks"))
    print(
        f"map of {model.num_layers} layers x 5 positions, ours and by hooks: {times}, {middle:.2f} ({low:.2f}-{high:.2f})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("map", "loading"))
    parser.add_argument("--processor", action="store_true")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(versions())
    model = StandardizedTransformer("demo:smollm2")
    if arguments.only != "loading":
        the_map(model, arguments.rounds)
    if arguments.only != "map":
        clock = time.process_time if arguments.processor else time.perf_counter
        loading(model.hf_model.name_or_path, arguments.rounds, clock)


if __name__ == "__main__":
    main()
