"""Rows that go on from keys and values: when they do, that they are what plain hooks give, and when they must not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import build, shared
from reference import edited
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, cache_utils
from zoo.build import build as zoo_build
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.methods import (
    TargetPrompt,
    TargetPromptBatch,
    patch_object_attn_lens,
    patchscope_lens,
)

#: With windows of 4, multipliers, caps, sinks, experts, ALiBi, positions of the model's own.
CACHED = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "opt", "mistral", "deepseek_v3")
#: And what their caches have beside keys and values.
OTHERS = {
    "jamba": "the model's cache has LinearAttentionLayer",
    "lfm2": "the model's cache has LinearAttentionLayer",
    "gemma4_text": "the model's cache has DummyLayer",
    "falcon_h1": "the model's cache has LinearAttentionAndFullAttentionLayer",
    "mamba": "the model's cache has LinearAttentionLayer",
}
GOES_ON = "Positions from"
SEQ, SOURCES = 9, 8


@functools.cache
def wrapped(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo_shared(model_type) if model_type in OTHERS else shared(model_type))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What was logged since it was last asked."""
    caplog.set_level(logging.INFO, "nnatomy.methods.patched_rows")

    def newest() -> str:
        (record,) = [one for one in caplog.records if one.name == "nnatomy.methods.patched_rows"]
        caplog.clear()
        return record.getMessage()

    return newest


def tokens(seq: int, seed: int) -> list[int]:
    return torch.randint(20, 60, (seq,), generator=torch.Generator().manual_seed(seed)).tolist()


def latents(model: StandardizedTransformer, count: int = SOURCES) -> Tensor:
    """Of (layer, source, hidden), as large as hidden states are."""
    with model.trace([tokens(SEQ, 1)]):
        size = model.layers_output[-1].std()
    noise = torch.randn(model.num_layers, count, model.hidden_size, generator=torch.Generator().manual_seed(2))
    return size * noise


def naive(model: StandardizedTransformer, target: list[int], position: int, states: Tensor) -> Tensor:
    """One pass a source and layer, by a hook on the layer: (source, layer, vocab)."""

    def put(state: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            return torch.cat([hidden[:, :position], state[None, None], hidden[:, position:][:, 1:]], 1)

        return edit

    def run() -> Any:
        return model.hf_model(torch.tensor([target]))

    rows = [
        [edited(run, model.layers[layer].module, "output", put(state)).logits[0, -1] for state in of_layer]
        for layer, of_layer in enumerate(states)
    ]
    return torch.stack([torch.stack(row) for row in rows]).softmax(-1).transpose(0, 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", CACHED)
@pytest.mark.parametrize("position", [8, -1, 6])
@pytest.mark.parametrize("batch_size", [64, 7])
def test_rows_go_on_from_keys_and_values(
    model_type: str, position: int, batch_size: int, log: Callable[[], str]
) -> None:
    model, target = wrapped(model_type), tokens(SEQ, 3)
    states = latents(model)
    positions: list[int] = []
    handle = model.layers[1].module.register_forward_hook(
        lambda _, args, output: positions.append((output if isinstance(output, Tensor) else output[0])[..., 0].numel())
    )
    found = patchscope_lens(model, None, TargetPrompt(target, position), latents=states, batch_size=batch_size)
    handle.remove()
    assert log() == f"Positions from {position % -SEQ} on, after the keys and values of the others"
    rows, rest = model.num_layers * SOURCES, SEQ - position % SEQ
    assert sum(positions) == 2 * SEQ + (1 + rows) * rest
    close(found, naive(model, target, position % SEQ, states))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "gpt_oss", "bloom", "opt"])
def test_target_prompts_of_several_lengths_and_positions(model_type: str, log: Callable[[], str]) -> None:
    """Padded on the left; of six targets two prompts are distinct."""
    model = wrapped(model_type)
    prompts, positions = [tokens(9, 3), tokens(6, 4)] * 3, [8, 5, -2, -1, -1, -2]
    states = latents(model, 6)
    target = TargetPromptBatch.from_prompts(prompts, positions)
    found = patchscope_lens(model, None, target, latents=states)
    assert log().startswith("Positions from -2 on")
    for i, (prompt, position) in enumerate(zip(prompts, positions, strict=True)):
        close(found[i : i + 1], naive(model, prompt, position % len(prompt), states[:, i : i + 1]))


def test_from_another_model(log: Callable[[], str]) -> None:
    """From GPT-2, 32 wide, into a Llama of another width and depth."""
    target_model = StandardizedTransformer(build("llama", hidden_size=48, num_hidden_layers=4))
    torch.manual_seed(0)
    linear, sources, target = nn.Linear(32, 48), [tokens(5, i) for i in range(SOURCES)], tokens(SEQ, 3)
    found = patchscope_lens(
        target_model,
        sources,
        TargetPrompt(target, -1),
        target_layers=[3, 1, 0],
        source_model=wrapped("gpt2"),
        mapping=linear,
    )
    assert log().startswith(GOES_ON)
    hf, states = shared("gpt2"), []
    for layer in hf.transformer.h:
        handle = layer.register_forward_hook(
            lambda _, __, out: states.append((out if isinstance(out, Tensor) else out[0])[:, -1])
        )
        with torch.no_grad():
            hf(torch.tensor(sources))
        handle.remove()
    given = torch.zeros(4, SOURCES, 48)
    with torch.no_grad():
        given[[3, 1, 0]] = linear(torch.stack(states))
    close(found, naive(target_model, target, 8, given)[:, [3, 1, 0]])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_oss"])
def test_attention_lens(model_type: str, log: Callable[[], str]) -> None:
    """The whole way, which its own test holds against hooks, and from keys and values."""
    model, sources, target = wrapped(model_type), [tokens(5, i) for i in range(SOURCES)], tokens(SEQ, 3)
    found = patch_object_attn_lens(model, sources, [target] * SOURCES, attn_idx_patch=-1, num_patches=2)
    assert log().startswith(GOES_ON)
    for i in range(SOURCES):
        alone = patch_object_attn_lens(model, [sources[i]], [target], attn_idx_patch=-1, num_patches=2, batch_size=1)
        assert log().startswith("Whole prompts")
        close(found[i : i + 1], alone)


@pytest.mark.parametrize("model_type", OTHERS)
def test_whole_prompts_where_the_cache_is_another(model_type: str, log: Callable[[], str]) -> None:
    model, target = wrapped(model_type), tokens(SEQ, 3)
    states = latents(model)
    found = patchscope_lens(model, None, TargetPrompt(target, -1), latents=states)
    expected = f"Whole prompts: {OTHERS[model_type]}"
    if "DummyLayer" in expected and not hasattr(cache_utils, "DummyLayer"):  # in older releases no layer is empty
        expected = "Positions from -1 on, after the keys and values of the others"
    assert log() == expected
    close(found, naive(model, target, 8, states))


def test_whole_prompts_of_an_encoder(log: Callable[[], str]) -> None:
    model, target = StandardizedTransformer(zoo_build("bert", is_decoder=False)), tokens(SEQ, 3)
    assert not model.causal
    states = latents(model)
    found = patchscope_lens(model, None, TargetPrompt(target, -1), latents=states)
    assert log() == "Whole prompts: going on from the keys and values gives something else"
    close(found, naive(model, target, 8, states))


@pytest.mark.parametrize("looks", ["back", "ahead"])
def test_whole_prompts_where_more_than_keys_and_values_goes_from_one_position_to_another(
    looks: str, log: Callable[[], str]
) -> None:
    """Back: not kept. Ahead: what is kept is that of the unpatched prompt, which an unpatched row cannot show."""
    model, target = StandardizedTransformer(build("llama")), tokens(SEQ, 3)
    states = latents(model)

    def add(_: Any, __: Any, hidden: Tensor) -> Tensor:
        if looks == "back":
            return hidden + hidden.mean(1, keepdim=True)
        return torch.cat([hidden[:, :-1] + hidden[:, -1:], hidden[:, -1:]], 1)

    handle = model.layers[1].mlp.module.register_forward_hook(add)
    found = patchscope_lens(model, None, TargetPrompt(target, -1), latents=states)
    assert log() == "Whole prompts: going on from the keys and values gives something else"
    close(found, naive(model, target, 8, states))
    handle.remove()


class OfTuples(GPT2LMHeadModel):
    """As code of models' own was before there were such caches."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values[0][0].shape
        return super().forward(input_ids, **kwargs)


class OfNone(GPT2LMHeadModel):
    """Takes a cache, and does nothing with it."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize(
    ("model_class", "why"),
    [
        (OfTuples, "'DynamicCache' object is not subscriptable"),
        (OfNone, "the model leaves no keys and values of all positions"),
    ],
)
def test_whole_prompts_where_the_model_does_nothing_with_the_cache(
    model_class: type[GPT2LMHeadModel], why: str, log: Callable[[], str]
) -> None:
    hf = model_class(shared("gpt2").config).eval()
    hf.load_state_dict(shared("gpt2").state_dict())
    model, target = StandardizedTransformer(hf), tokens(SEQ, 3)
    states = latents(model)
    found = patchscope_lens(model, None, TargetPrompt(target, -1), latents=states)
    assert log() == f"Whole prompts: {why}"
    close(found, naive(wrapped("gpt2"), target, 8, states))


def test_whole_prompts_where_edits_count_positions(log: Callable[[], str]) -> None:
    model, target = wrapped("llama"), tokens(SEQ, 3)
    states, vector = latents(model), torch.ones(32)
    found = patchscope_lens(
        model.edit(lambda: model.steer(0, vector, token_positions=2)),
        None,
        TargetPrompt(target, -1),
        latents=states,
    )
    assert log() == "Whole prompts: edits may count positions"

    def steer(_: Any, __: Any, hidden: Tensor) -> Tensor:
        return hidden.index_add(1, torch.tensor([2]), vector.expand(1, 1, -1))

    handle = model.layers[0].module.register_forward_hook(steer)
    expected = naive(model, target, 8, states)
    handle.remove()
    close(found, expected)


def test_whole_prompts_where_little_is_saved(log: Callable[[], str]) -> None:
    model, target = wrapped("llama"), tokens(SEQ, 3)
    patchscope_lens(model, None, TargetPrompt(target, 2), latents=latents(model))
    assert log() == "Whole prompts: of 216 positions 193 would be run"
    patchscope_lens(model, None, TargetPrompt(target, -1), latents=latents(model), batch_size=1)
    assert log() == "Whole prompts: of 216 positions 43 would be run"


def test_an_error_of_the_call_is_not_taken_for_the_models(log: Callable[[], str]) -> None:
    model, target = wrapped("llama"), tokens(SEQ, 3)

    def fails(_: Tensor) -> Tensor:
        raise ZeroDivisionError("of the call")

    with pytest.raises(ZeroDivisionError, match="of the call"):
        patchscope_lens(model, None, TargetPrompt(target, -1), latents=latents(model), mapping=fails)
