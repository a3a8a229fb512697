"""Measure what the two demo models know, and over which layers their answers form.

``python training/evaluate.py`` prints the tables and writes them to ``nnatomy/demo/models/card.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from facts import COUNTRIES
from phrasings import HELD_OUT_SHARE, Sentence, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS_DIR = Path(__file__).resolve().parent.parent / "nnatomy" / "demo" / "models"
NAMES = ("gpt2", "llama")


class Result:
    """One sentence, whether greedy decoding gives its whole answer, and the lens at the end of its prompt.

    ``rise`` has shape [layers + 1]: the probability (0 to 1) of the answer's first token read from the
    residual stream at the last prompt token, before the first layer and after each layer.
    """

    def __init__(self, sentence: Sentence, correct: bool, rise: torch.Tensor) -> None:
        self.sentence, self.correct, self.rise = sentence, correct, rise


def blocks_and_norm(model: Any) -> tuple[Any, Any]:
    """Return the layers of ``model`` and its final norm."""
    if model.config.model_type == "gpt2":
        return model.transformer.h, model.transformer.ln_f
    return model.model.layers, model.model.norm


@torch.no_grad()
def residual_stream(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ids [rows, tokens]; return logits [rows, tokens, vocab], stream [layers + 1, rows, tokens, d]."""
    blocks, _ = blocks_and_norm(model)
    kept: list[torch.Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, __, output: kept.append(output)) for block in blocks]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(kept)


def _by_length(tests: Iterable[Sentence], tokenizer: Any) -> Iterator[tuple[list[Sentence], torch.Tensor, int]]:
    """Group sentences of equal length: (sentences, their ids [rows, tokens], tokens of the answer)."""
    groups: dict[tuple[int, int], list[tuple[Sentence, list[int]]]] = defaultdict(list)
    for test in tests:
        prompt, answer = tokenizer.encode(test.prompt), tokenizer.encode(test.answer)
        groups[len(prompt), len(answer)].append((test, prompt + answer))
    for (_, answer_length), rows in groups.items():
        yield [test for test, _ in rows], torch.tensor([ids for _, ids in rows]), answer_length


@torch.no_grad()
def measure(model: Any, tokenizer: Any, tests: Iterable[Sentence]) -> list[Result]:
    """Test ``model`` on bare prompts, one result per sentence (in no particular order)."""
    _, norm = blocks_and_norm(model)
    results: list[Result] = []
    for group, ids, answer_length in _by_length(tests, tokenizer):
        logits, residuals = residual_stream(model, ids)
        answers = ids[:, -answer_length:]
        correct = (logits[:, -answer_length - 1 : -1].argmax(-1) == answers).all(-1)
        lens = model.lm_head(norm(residuals[:, :, -answer_length - 1])).softmax(-1)
        rise = lens[:, torch.arange(len(group)), answers[:, 0]]
        results += [Result(s, bool(c), r) for s, c, r in zip(group, correct, rise.T, strict=True)]
    return results


def accuracy(results: list[Result]) -> dict[str, Any]:
    """Share of correct answers (0 to 1) and the number of prompts."""
    return {"accuracy": round(sum(r.correct for r in results) / len(results), 4), "prompts": len(results)}


def mean_rise(results: list[Result]) -> list[float]:
    """Mean lens probability (0 to 1) of the answer, before the first layer and after each one."""
    return [round(p, 3) for p in torch.stack([r.rise for r in results]).mean(0).tolist()]


def evaluate(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return all figures of one model."""
    _, held_out, unseen = sentences()
    results = measure(model, tokenizer, held_out)
    relations = sorted({r.sentence.fact.relation for r in results})
    hops = {n: [r for r in results if r.sentence.fact.hops == n] for n in (1, 2)}
    other = measure(model, tokenizer, unseen)
    return {
        "parameters": model.num_parameters(),
        "held_out": {
            "one_hop": accuracy(hops[1]),
            "two_hop": accuracy(hops[2]),
            **{name: accuracy([r for r in results if r.sentence.fact.relation == name]) for name in relations},
        },
        "unseen_phrasings": {
            "one_hop": accuracy([r for r in other if r.sentence.fact.hops == 1]),
            "two_hop": accuracy([r for r in other if r.sentence.fact.hops == 2]),
        },
        "answer_probability_by_layer": {
            "one_hop": mean_rise(hops[1]),
            "two_hop": mean_rise(hops[2]),
        },
    }


def show(name: str, figures: dict[str, Any]) -> None:
    """Print the figures of one model."""
    print(f"\n{name}: {figures['parameters']:,} parameters")
    for part in ("held_out", "unseen_phrasings"):
        for row, value in figures[part].items():
            print(f"  {part:17} {row:19} {value['accuracy']:8.1%}  of {value['prompts']} prompts")
    for row, rise in figures["answer_probability_by_layer"].items():
        print(f"  answer probability by layer, {row}: {' '.join(f'{p:.2f}' for p in rise)}")


def write_card(folder: Path) -> None:
    """Test the models in ``folder`` as they are stored; print the figures and write them to ``card.json``."""
    card: dict[str, Any] = {
        "command": "python training/train.py",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "countries": len(COUNTRIES),
        "notes": {
            "held_out": f"about {HELD_OUT_SHARE:.0%} of all (fact, phrasing) pairs, never trained on; the "
            "fact is trained on in other phrasings, and the phrasing with others; two-hop facts too",
            "unseen_phrasings": "phrasings never trained on with any fact, made of known words",
            "accuracy": "share of bare prompts for which greedy decoding gives the whole answer",
            "answer_probability_by_layer": "mean over the held-out prompts of the probability of the first "
            "answer token, through the final norm and the output head, before the first layer and after each",
        },
        "models": {},
    }
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        card["models"][name] = evaluate(model, AutoTokenizer.from_pretrained(folder / name))
        show(name, card["models"][name])
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"\n{size / 1e6:.2f} MB in {folder.name}/")


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=MODELS_DIR)
    torch.set_num_threads(1)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
