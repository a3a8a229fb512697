"""The names of nnterp, against plain hooks on each prompt alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from architectures import PLACES, prompt_ids
from architectures import shared as shared_tiny
from reference import hooked
from torch import Tensor
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import (
    collect_last_token_activations_session,
    collect_token_activations_batched,
    compute_next_token_probs,
    get_token_activations,
)

HYBRID = "qwen3_next"
TYPES = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "mpt", HYBRID)
PROMPTS = [prompt_ids(1, length, seed=length)[0].tolist() for length in (5, 3, 9)]


def shared(model_type: str) -> Any:
    return zoo_shared(model_type) if model_type == HYBRID else shared_tiny(model_type)


def expected(model_type: str, token: int, part: str | None = None) -> Tensor:
    """(layer, prompt, hidden)."""
    hf = shared(model_type)
    layers = list(hf.get_submodule("model.layers" if model_type == HYBRID else PLACES[model_type][0]))
    modules = [layer.get_submodule(part) if part else layer for layer in layers]
    points = {i: (module, "output") for i, module in enumerate(modules)}
    rows = []
    for ids in PROMPTS:
        seen = hooked(hf, lambda ids=ids: hf(torch.tensor([ids])), points)
        rows.append(torch.stack([seen[i][0, token] for i in range(len(layers))]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("idx", [None, -2, 1])
def test_one_token_of_each_prompt_after_each_layer(model_type: str, idx: int | None) -> None:
    model = StandardizedTransformer(shared(model_type))
    reference = expected(model_type, -1 if idx is None else idx)
    found = get_token_activations(model, PROMPTS, idx=idx)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
    for function in (collect_token_activations_batched, collect_last_token_activations_session):
        batched = function(model, PROMPTS, batch_size=2, idx=idx)
        torch.testing.assert_close(batched, reference, rtol=1e-4, atol=1e-4)


def test_layers_in_any_order_and_other_values() -> None:
    model = StandardizedTransformer(shared("llama"))
    found = collect_token_activations_batched(
        model, PROMPTS, batch_size=2, layers=[2, -3], get_activations=lambda model, layer: model.mlps_output[layer]
    )
    torch.testing.assert_close(found, expected("llama", -1, "mlp")[[2, 0]], rtol=1e-4, atol=1e-4)


def test_in_a_trace_that_is_open() -> None:
    model = StandardizedTransformer(shared("llama"))
    with model.trace(PROMPTS) as tracer:
        found = get_token_activations(model, layers=[0, 1], tracer=tracer)
        later = model.layers_output[2]
    torch.testing.assert_close(found, expected("llama", -1)[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(later[:, -1], expected("llama", -1)[2], rtol=1e-4, atol=1e-4)


def test_progress_is_shown_with_what_is_given() -> None:
    shown = []

    def bar(starts: Any) -> Any:
        for start in starts:
            shown.append(start)
            yield start

    collect_token_activations_batched(StandardizedTransformer(shared("gpt2")), PROMPTS, batch_size=2, tqdm=bar)
    assert shown == [0, 2]


def test_the_probabilities_of_the_next_token() -> None:
    hf = shared("llama")
    probs = compute_next_token_probs(StandardizedTransformer(hf), PROMPTS)
    with torch.no_grad():
        logits = torch.cat([hf(torch.tensor([ids])).logits[:, -1] for ids in PROMPTS])
    torch.testing.assert_close(probs, logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_errors() -> None:
    model = StandardizedTransformer(shared("llama"))
    with pytest.raises(
        InputError, match=re.escape("There are no prompts: give some, or a trace that is open (tracer=...).")
    ):
        get_token_activations(model)
    with pytest.raises(
        InputError, match=re.escape("prompt 1 has 3 tokens, at 0 to 2 (or -3 to -1); there is no position 3.")
    ):
        get_token_activations(model, PROMPTS, idx=3)
    with pytest.raises(InputError, match=re.escape("There are no prompts to collect activations of.")):
        collect_token_activations_batched(model, [], batch_size=2)
