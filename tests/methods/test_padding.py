"""Every method gives for prompts that the caller has padded, on either side, what it gives for each prompt alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import build, prompt_ids
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.methods import (
    SteeringVector,
    TargetPrompt,
    TargetPromptBatch,
    TunedLens,
    activation_patching,
    attribution_patching,
    causal_tracing,
    circuit_faithfulness,
    collect_activations,
    collect_token_activations_batched,
    compute_next_token_probs,
    direct_logit_attribution,
    edge_attribution,
    get_token_activations,
    integrated_gradients,
    lens_statistics,
    logit_difference,
    logit_lens,
    next_token_probs_unsqueeze,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    path_patching,
)

SIDES = ("left", "right", "none")
Model = StandardizedTransformer


@functools.cache
def loaded(model_type: str) -> Model:
    return Model(build(model_type))


def prompts(side: str, seed: int = 0) -> list[list[int]]:
    lengths = (5, 5, 5) if side == "none" else (7, 4, 5)
    return [prompt_ids(1, length, seed=seed + i)[0].tolist() for i, length in enumerate(lengths)]


def padded(each: list[list[int]], side: str) -> dict[str, Tensor]:
    longest = max(map(len, each))
    rows, mask, positions = [], [], []
    for ids in each:
        filling, none = [5] * (longest - len(ids)), [0] * (longest - len(ids))
        own = list(range(len(ids)))
        rows.append(filling + ids if side == "left" else ids + filling)
        mask.append(none + [1] * len(ids) if side == "left" else [1] * len(ids) + none)
        positions.append(none + own if side == "left" else own + none)
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(mask),
        "position_ids": torch.tensor(positions),
    }


METRIC = logit_difference(3, 9)
TUNED = TunedLens(0.1 * torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)), torch.ones(2, 32))
#: From the model and prompts to values by prompt.
BY_PROMPT: dict[str, Callable[[Model, Any], Any]] = {
    "compute_next_token_probs": compute_next_token_probs,
    "next_token_probs_unsqueeze": next_token_probs_unsqueeze,
    "logit_lens": logit_lens,
    "logit_lens at 1": lambda m, p: logit_lens(m, p, positions=1),
    "logit_lens at [0, -2]": lambda m, p: logit_lens(m, p, positions=[0, -2]),
    "logit_lens in batches": lambda m, p: logit_lens(m, p, batch_size=2),
    "tuned lens": lambda m, p: logit_lens(m, p, lens=TUNED),
    "get_token_activations": lambda m, p: get_token_activations(m, p).transpose(0, 1),
    "get_token_activations at 0": lambda m, p: get_token_activations(m, p, idx=0).transpose(0, 1),
    "get_token_activations at -3": lambda m, p: get_token_activations(m, p, layers=[2, 0], idx=-3).transpose(0, 1),
    "direct_logit_attribution": lambda m, p: direct_logit_attribution(m, p, answer=3, wrong=9).effect,
    "direct_logit_attribution at 0": lambda m, p: (
        direct_logit_attribution(m, p, answer=3, by="layer", position=0).effect
    ),
    "direct_logit_attribution by head": lambda m, p: (
        direct_logit_attribution(m, p, answer=3, by="head", position=-2).effect
    ),
    "patchscope_lens": lambda m, p: patchscope_lens(m, p, TargetPrompt([4, 5, 6], 1)),
    "patchscope_lens from 1": lambda m, p: patchscope_lens(m, p, TargetPrompt([4, 5, 6], -1), source_position=1),
    "patch_object_attn_lens of targets": lambda m, p: patch_object_attn_lens(m, [4, 5, 6, 7], p, attn_idx_patch=1),
    "activation_patching": lambda m, p: _patched(m, p).effect[..., -3:],
    "activation_patching at -2": lambda m, p: _patched(m, p, positions=[-2]).effect,
    "path_patching": lambda m, p: (
        path_patching(
            m, clean=p, corrupted=_others(p), sender="mlps_contribution[0]", receivers="logits", metric=METRIC
        ).effect
    ),
    "attribution_patching": lambda m, p: attribution_patching(m, p, _others(p), metric=METRIC).effect[..., -3:],
    "integrated_gradients": lambda m, p: integrated_gradients(m, p, _others(p), metric=METRIC, steps=2).effect[
        ..., -3:
    ],
    "edge_attribution": lambda m, p: edge_attribution(m, p, _others(p), metric=METRIC).effect,
    "circuit_faithfulness": lambda m, p: _faithful(m, p),
    "collect_activations": lambda m, p: torch.stack(
        list(collect_activations(m, _each(p), progress=False).tensors.values()), 1
    ),
}


def _each(given: Any) -> list[Any]:
    """One prompt at a time, each with its padding."""
    if not isinstance(given, dict):
        return given
    return [
        {name: given[name][i : i + 1] for name in ("input_ids", "attention_mask")}
        for i in range(len(given["input_ids"]))
    ]


def _others(given: Any) -> Any:
    """Prompts as long, of other tokens."""
    if isinstance(given, dict):
        return {**given, "input_ids": (given["input_ids"] + 11) % 60}
    return [[(token + 11) % 60 for token in ids] for ids in given]


def _patched(model: Model, given: Any, **kwargs: Any) -> Any:
    return activation_patching(model, clean=given, corrupted=_others(given), metric=METRIC, progress=False, **kwargs)


def _faithful(model: Model, given: Any) -> Tensor:
    scores = edge_attribution(model, [[4, 5, 6]], [[7, 8, 9]], metric=METRIC)
    return circuit_faithfulness(model, given, _others(given), metric=METRIC, attribution=scores, sizes=[0, 20]).effect


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", list(BY_PROMPT))
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_padding_does_not_show(model_type: str, name: str, side: str) -> None:
    model, each = loaded(model_type), prompts(side)
    found = BY_PROMPT[name](model, padded(each, side))
    for i, ids in enumerate(each):
        (alone,) = BY_PROMPT[name](model, [ids])
        torch.testing.assert_close(found[i], alone, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("side", SIDES)
def test_statistics_of_every_position(side: str) -> None:
    model, each = loaded("llama"), prompts(side)
    found = lens_statistics(model, padded(each, side), top_k=2)
    every = logit_lens(model, padded(each, side), positions="all")
    for i, ids in enumerate(each):
        alone = lens_statistics(model, [ids], top_k=2)
        for name in ("kl", "entropy", "top_tokens", "target_rank"):
            torch.testing.assert_close(
                getattr(found, name)[i, :, -len(ids) :], getattr(alone, name)[0], atol=1e-4, rtol=1e-3
            )
        torch.testing.assert_close(every[i], logit_lens(model, [ids], positions="all")[0], atol=1e-4, rtol=1e-3)
        assert found.tokens[i] == list(map(str, ids))


@pytest.mark.parametrize("side", SIDES)
def test_the_sources_of_an_attention_patchscope(side: str) -> None:
    model, each = loaded("gpt2"), prompts(side)
    targets = [[4, 5, 6, 7]] * 3
    found = patch_object_attn_lens(model, padded(each, side), targets, attn_idx_patch=-2)
    for i, ids in enumerate(each):
        torch.testing.assert_close(
            found[i], patch_object_attn_lens(model, [ids], [targets[i]], attn_idx_patch=-2)[0], atol=1e-4, rtol=1e-3
        )


class Letters:
    """As much of a tokenizer as says on which side it pads."""

    pad_token_id = eos_token_id = bos_token_id = 0
    chat_template = bos_token = None

    def __init__(self) -> None:
        self.padding_side = "left"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_on_which_side_the_tokenizer_pads_makes_no_difference() -> None:
    model = Model(build("llama"), Letters())
    each = ["a sentence", "one", "words."]
    ids = [model.tokenizer(text)["input_ids"] for text in each]
    more = {
        "collect": lambda: torch.stack(
            [*collect_activations(model, each, positions=[0, -2], progress=False).tensors.values()]
        ),
        "batched": lambda: collect_token_activations_batched(model, each, batch_size=2, idx=-2),
        "targets": lambda: patchscope_lens(model, [3, 4], TargetPromptBatch.from_prompts(each, [0, 1, -1])[1]),
        "several targets": lambda: patchscope_lens(model, each, TargetPromptBatch.from_prompts(each, [0, 1, -1])),
        "generate": lambda: patchscope_generate(
            model, each, TargetPrompt("words", -2), max_length=2, layers=0, min_new_tokens=2
        )[0],
        "causal": lambda: causal_tracing(model, each[0], subject=[1, 2], samples=2, progress=False).effect,
        "vector": lambda: SteeringVector.from_prompts(model, each, each[::-1][:1], progress=False).directions[1],
        "projections": lambda: SteeringVector({1: torch.ones(32)}, "layers_output", "", "").projections(model, each[0]),
        "tuned lens": lambda: TunedLens.train(model, each, steps=3, batch_size=2).history,
        "statistics": lambda: lens_statistics(model, each, next_tokens=True).target_probability,
        **{name: functools.partial(ask, model, ids) for name, ask in BY_PROMPT.items()},
    }
    expected = {name: ask() for name, ask in more.items()}
    model.tokenizer.padding_side = "right"
    assert model.prepare(each)["attention_mask"].tolist()[1] == [1] * 3 + [0] * 7
    for name, ask in more.items():
        torch.testing.assert_close(
            ask(),
            expected[name],
            atol=2e-4,
            rtol=2e-3,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_where_padding_on_the_left_shows_it_is_not_moved_there() -> None:
    model = Model(build("llama"))
    model._prompts.no_padding = "it shows"
    each = prompts("right")
    given = padded(each, "right")
    found = compute_next_token_probs(model, given)
    for i, ids in enumerate(each):
        torch.testing.assert_close(found[i : i + 1], compute_next_token_probs(model, ids), atol=1e-4, rtol=1e-3)
    with pytest.raises(Exception, match="of 7, 4, 5 tokens. On this model padding is no way to one length: it shows"):
        attribution_patching(model, given, _others(given), metric=METRIC)
