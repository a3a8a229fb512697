"""Prompts that share rows: when they do, that they come out as alone, and when they must not."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import PLACES, build, shared
from hypothesis import given
from hypothesis import strategies as st
from reference import edited, hooked
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import logit_lens, packed_rows
from nnatomy.methods.packed_rows import ROW, SHORT, _rows

#: With windows of 4, multipliers, caps, experts, positions that are learned.
PACKED = (
    "gpt2",
    "llama",
    "gemma2",
    "cohere",
    "granite",
    "phi3",
    "gpt_neox",
    "mistral",
    "mixtral",
    "deepseek_v3",
)
LENGTHS = (40, 31, 3, 28, 1, 25, 22, 9, 19, 16, 13, 10, 33, 7, 5, 4, 30, 2, 12, 8)
wrapped = functools.cache(lambda model_type: StandardizedTransformer(shared(model_type)))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged since it was last asked."""
    caplog.set_level(logging.INFO, "nnatomy.methods.logit_lens")

    def newest() -> list[str]:
        found = [one.getMessage() for one in caplog.records if one.name == "nnatomy.methods.logit_lens"]
        caplog.clear()
        return found

    return newest


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(20, 60, (length,), generator=draw).tolist() for length in LENGTHS]


def naive(hf: PreTrainedModel, layers: list[Any], ids: list[int]) -> Tensor:
    """The logits of one prompt, each layer's output put in the last layer's place by a plain hook: (layer, position, vocab)."""

    def run() -> Any:
        return hf(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))

    hidden = hooked(hf, run, {i: (layer, "output") for i, layer in enumerate(layers)})
    rows = [edited(run, layers[-1], "output", lambda _, h=h: h).logits[0] for h in hidden.values()]  # type: ignore[misc]
    return torch.stack(rows)


def check(model: StandardizedTransformer) -> None:
    layers = [view.module for view in model.layers]
    expected = [naive(model.hf_model, layers, ids) for ids in prompts()]
    last = logit_lens(model, prompts(), output="logits")
    every = logit_lens(model, prompts(), output="logits", positions="all")
    for i, one in enumerate(expected):
        torch.testing.assert_close(last[i], one[:, -1], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(every[i], one, rtol=1e-3, atol=2e-5)


def positions_run(model: StandardizedTransformer, call: Callable[[], Any]) -> list[tuple[int, int]]:
    """The batch and length of each pass."""
    sizes: list[tuple[int, int]] = []
    handle = model.layers[0].module.register_forward_pre_hook(
        lambda _, args: sizes.append((args[0].shape[0], args[0].shape[1]))
    )
    call()
    handle.remove()
    return sizes


@pytest.mark.parametrize("model_type", PACKED)
def test_prompts_that_share_rows_come_out_as_alone(model_type: str, log: Callable[[], list[str]]) -> None:
    model = wrapped(model_type)
    check(model)
    assert log() == []
    short = [length for length in LENGTHS if length <= SHORT]
    (rows, row), *longer = positions_run(model, lambda: logit_lens(model, prompts()))
    assert (rows, longer) == (-(-sum(short) // ROW), [(2, 40)])
    assert sum(short) + min(short) <= rows * row <= 1.05 * sum(short)


def test_with_attention_computed_in_the_open(log: Callable[[], list[str]]) -> None:
    check(StandardizedTransformer(build("gemma2", attn_implementation="eager")))
    assert log() == []


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("bloom", "the prompts are of one length, or the model takes no position ids"),
        ("qwen3_next", "the model's cache has LinearAttentionLayer"),
        ("gpt_oss", "the model mixes prompts that share a row"),
        ("bert", "the model mixes prompts that share a row"),
    ],
)
def test_models_that_cannot(model_type: str, why: str, log: Callable[[], list[str]]) -> None:
    """Bloom counts by itself, gpt_oss makes its masks without the positions, BERT attends to the whole row."""
    model = wrapped(model_type) if model_type in PLACES else StandardizedTransformer(zoo_shared(model_type))
    check(model)
    assert set(log()) == {f"Prompts in rows of their own: {why}"}


@pytest.mark.parametrize("model_type", ["qwen3_next", "olmo_hybrid"])
def test_what_mixes_prompts_is_seen(
    model_type: str, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    """A recurrence and a convolution run over the whole row."""
    monkeypatch.setattr(packed_rows, "other_caches", lambda _: "")
    check(StandardizedTransformer(zoo_shared(model_type)))
    assert set(log()) == {"Prompts in rows of their own: the model mixes prompts that share a row"}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_a_transformers_that_keeps_none_apart_is_seen(
    model_type: str, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    check(wrapped(model_type))
    assert set(log()) == {"Prompts in rows of their own: the model mixes prompts that share a row"}


def test_only_what_is_asked_plainly(log: Callable[[], list[str]]) -> None:
    model = wrapped("llama")
    given = model.prepare(prompts())
    mask, ids = given["attention_mask"], given["input_ids"]
    own = "the attention mask or the position ids are the caller's own"
    holes = mask.clone()
    holes[:, -2] = 0
    doubled = {"position_ids": 2 * given["position_ids"]}
    edited_model = model.edit(lambda: None)
    for one, inputs, why in (
        (model, {**given, **doubled}, own),
        (model, {"input_ids": ids, "attention_mask": holes}, own),
        (edited_model, given, "edits may count positions"),
        (
            model,
            {"input_ids": ids[:, :4].clamp(min=1)},
            "the prompts are of one length, or the model takes no position ids",
        ),
        (model, {**given, "labels": ids}, "the prompts are more than token ids"),
        (model, [prompts()[0], prompts()[12]], "no prompt has 32 tokens or fewer"),
        (model, prompts()[5:8], "105 positions would be run for 115"),
    ):
        found = logit_lens(one, inputs, output="logits")
        assert log() == [f"Prompts in rows of their own: {why}"]
        torch.testing.assert_close(found, logit_lens(one, inputs, output="logits", batch_size=1), rtol=1e-3, atol=2e-5)
        assert log() == []


@given(st.lists(st.integers(1, SHORT), min_size=1, max_size=80))
def test_each_prompt_is_in_one_row_and_the_last_once_more(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    rows, last = _rows([*range(len(lengths))], lengths), len(lengths) - 1
    assert sorted(itertools.chain(*rows)) == sorted([*range(len(lengths)), last])
    assert rows[0][0] == last
    assert all(rows)
    assert max(sum(lengths[i] for i in row) for row in rows) <= ROW + 2 * SHORT
    if last:
        (row,) = (row for row in rows if last in row[1:])
        assert row.index(last, 1) > 1 or row[0] != last  # behind another


def test_a_trace_takes_prompts_that_share_a_row() -> None:
    """By the names that Transformers has for it: no attention mask, no cache, and position ids that begin anew."""
    model = wrapped("gemma2")
    one, other = prompts()[1][:9], prompts()[3][:6]
    positions = torch.tensor([[*range(9), *range(6)]])
    with model.trace([one + other], attention_mask=None, position_ids=positions, use_cache=False):
        stream = model.layers_output[-1]
    for ids, part in ((one, stream[:, :9]), (other, stream[:, 9:])):
        with model.trace([ids]):
            alone = model.layers_output[-1]
        torch.testing.assert_close(part, alone, rtol=1e-3, atol=2e-5)
    with model.trace([one, other], attention_mask=None, position_ids=positions[:, :9].repeat(2, 1)):
        assert model.attention_mask.sum(1).tolist() == [9, 6]  # one is padded: it needs a mask


def test_a_mask_of_none_that_is_not_asked_for_is_made() -> None:
    """In a dict of what a tokenizer gave, say: methods count positions by it."""
    model, ids = wrapped("gemma2"), prompts()[1]
    given = {"input_ids": [ids], "attention_mask": None, "position_ids": torch.arange(len(ids))[None]}
    assert model.prepare(given)["attention_mask"].tolist() == [[1] * len(ids)]
    torch.testing.assert_close(logit_lens(model, given), logit_lens(model, [ids]))


def test_a_row_of_several_prompts_beside_other_blocks_is_refused() -> None:
    model, ids = wrapped("gemma2"), prompts()[1]
    with pytest.raises(InputError) as error, model.trace() as tracer:
        with tracer.invoke([ids], attention_mask=None, position_ids=torch.arange(len(ids))[None]):
            _ = model.logits
        with tracer.invoke([ids[:4]]):
            _ = model.logits
    assert str(error.value) == (
        "A block's prompts share a row (attention_mask=None): beside other blocks they would be padded, which "
        "needs a mask. Give each prompt a block, or trace that row alone."
    )
