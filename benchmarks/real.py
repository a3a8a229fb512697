"""SmolLM2-135M-Instruct (`demo:smollm2`): load time, and the layer x position map of a pair of five tokens.

    python benchmarks/real.py [--rounds N]

Loading is set against 1.5 x `from_pretrained` plus four forwards of six tokens, and the map against the same work by plain hooks:
both prompts once, of each layer the five patched rows through the layers behind it, called by themselves, and one product with the
head. The two maps have to agree. All in turn in one process; figures are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
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

CLEAN, CORRUPTED, ANSWERS = "The capital of France is", "The capital of Japan is", (" Paris", " Tokyo")


def loading(folder: str, rounds: int) -> None:
    """Print the load time and its ratios."""
    ids = torch.randint(0, 49152, (1, 6))
    parts: list[list[float]] = []
    for round_ in range(rounds + 1):
        model_ms, hf = timed(partial(AutoModelForCausalLM.from_pretrained, folder))
        four = sum(timed(partial(hf, ids))[0] for _ in range(4))
        tokenizer_ms, _ = timed(partial(AutoTokenizer.from_pretrained, folder))
        del hf
        ours = timed(partial(StandardizedTransformer, folder))[0]
        if round_:  # the first one warms up
            parts.append([model_ms, four, tokenizer_ms, ours])
    names = ("from_pretrained", "four forwards", "the tokenizer", "StandardizedTransformer")
    print(
        ", ".join(
            f"{name} {statistics.median(part):.0f} ms"
            for name, part in zip(names, zip(*parts, strict=True), strict=True)
        )
    )
    for name, bases in (
        ("1.5 x from_pretrained + four forwards", [1.5 * model + four for model, four, _, _ in parts]),
        ("the same with the tokenizer loaded", [1.5 * (model + tok) + four for model, four, tok, _ in parts]),
    ):
        ratios = sorted(part[-1] / base for part, base in zip(parts, bases, strict=True))
        print(f"load / ({name}): {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")


def by_hooks(model: StandardizedTransformer) -> Tensor:
    """The map, by plain hooks on the model's own modules: (layer, position)."""
    hf, layers = model.hf_model, list(model.hf_model.model.layers)
    clean, corrupted = (
        model.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in (CLEAN, CORRUPTED)
    )
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(versions())
    model = StandardizedTransformer("demo:smollm2")
    metric = logit_difference(*ANSWERS, model)

    def ours() -> Tensor:
        return activation_patching(
            model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, progress=False
        ).effect

    figures = measure({"ours": ours, "hooks": partial(by_hooks, model)}, 1, rounds, agree)
    middle, low, high = figures["ours/hooks"]
    times = " and ".join(f"{figures[name] / 1e3:.0f} ms" for name in ("ours", "hooks"))
    print(
        f"map of {model.num_layers} layers x 5 positions, ours and by hooks: {times}, {middle:.2f} ({low:.2f}-{high:.2f})"
    )
    loading(model.hf_model.name_or_path, rounds)


if __name__ == "__main__":
    main()
