"""A keyword that the model makes no use of is refused, where the user gives it; the others arrive."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from encoder_decoders import build as build_encoder_decoder
from torch import Tensor
from transformers import GenerationConfig

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError

#: With a forward, and a way to prepare a step of a generation, each of its own.
TYPES = ("gpt2", "llama", "mamba", "jamba", "bert", "mpt", "openai-gpt", "gemma3")
GENERATE: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@functools.cache
def loaded(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo.shared(model_type), validate=False)


@pytest.mark.parametrize("model_type", TYPES)
def test_unused_keywords_are_refused(model_type: str) -> None:
    model = loaded(model_type)
    ids, kind = zoo.ids(model.hf_model), type(model.hf_model).__name__
    calls: list[Callable[..., Any]] = [model, model.trace, model.scan, model.generate]
    for call in calls:
        with pytest.raises(InputError, match=rf"elsewhere=...: {kind}\.(forward|generate) makes no use of such an"):
            call(ids, elsewhere=True)
        with pytest.raises(InputError, match=r"Did you mean .*attention_mask"):
            call(ids, attention_masks=torch.ones_like(ids))
        with pytest.raises(InputError, match="elsewhere=..."):
            call({"input_ids": ids, "elsewhere": True})
    with pytest.raises(InputError, match=r"Did you mean early_stop\?"):
        model.trace(ids, earlystop=False)
    with pytest.raises(InputError, match=r"Did you mean max_new_tokens"):
        model.generate(ids, max_new_token=3)
    with pytest.raises(InputError, match=r"labels=...: \w+\.generate makes no use"):
        model.generate(ids, labels=ids)
    with model.trace() as tracer, pytest.raises(InputError, match="remote=..."):
        tracer.invoke(ids, lambda: None, remote=True)


@pytest.mark.parametrize("model_type", ["mpt", "mamba"])
def test_positions_for_a_model_that_has_none(model_type: str) -> None:
    ids = zoo.ids(loaded(model_type).hf_model)
    with pytest.raises(InputError, match=r"position_ids=...: \w+\.forward makes no use"):
        loaded(model_type).trace(ids, position_ids=torch.arange(9)[None])
    with pytest.raises(InputError, match=r"position_ids=...: \w+\.generate makes no use"):
        loaded(model_type).generate(ids, position_ids=torch.arange(9)[None])


def test_what_transformers_takes_out_of_keywords_is_not_refused() -> None:
    model = StandardizedTransformer(zoo.build("llama"), validate=False)  # recording outputs puts hooks on it
    ids = zoo.ids(model.hf_model)
    given = {"output_hidden_states": True, "return_dict": True, "use_cache": False, "logits_to_keep": 2}
    with torch.no_grad(), model.trace(ids, **given) as tracer:
        result = tracer.result
    assert len(result.hidden_states) == model.num_layers + 1
    assert result.logits.shape[1] == 2
    with pytest.raises(InputError, match="output_router_logits=..."):
        model.trace(ids, output_router_logits=True)  # there are no routers
    # Without flash attention nobody looks at it, and the two prompts would see each other.
    with pytest.raises(InputError, match="cu_seq_lens_q=..."):
        model.trace(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))


def test_keywords_of_a_generation_and_of_an_encoder_decoder() -> None:
    hf = build_encoder_decoder("T5ForConditionalGeneration")
    model = StandardizedTransformer(hf, validate=False)
    ids = zoo.ids(hf)
    how = {
        **GENERATE,
        "num_beams": 2,
        "decoder_start_token_id": 0,
        "decoder_attention_mask": torch.ones(2, 1),
    }
    with torch.no_grad():
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert torch.equal(model.generate(ids, **how).run(), expected)
    with pytest.raises(InputError, match=r"Did you mean repetition_penalty"):
        model.generate(ids, repetition_penaltys=1.5)


def first_logits(model: StandardizedTransformer, ids: Tensor, positions: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.hf_model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "openai-gpt"])
def test_positions_are_those_given(model_type: str) -> None:
    model = loaded(model_type)
    ids, positions = zoo.ids(model.hf_model, seq=6), 2 * torch.arange(6)[None].expand(2, -1) + 1
    expected = first_logits(model, ids, positions)
    assert not torch.allclose(expected, first_logits(model, ids, torch.arange(6)[None].expand(2, -1)), atol=1e-2)
    with torch.no_grad():
        with model.generate(ids, position_ids=positions, **GENERATE):
            logits = model.logits[:, -1]
        assert torch.allclose(logits, expected, atol=1e-5)
        tokens = model.generate(ids, position_ids=positions, **GENERATE).run()
        plain = model.hf_model.generate(ids, attention_mask=torch.ones_like(ids), position_ids=positions, **GENERATE)
        assert torch.equal(tokens, plain)
        for trace in (model.trace(), model.generate(**GENERATE)):
            with trace as tracer:
                one = tracer.invoke(ids, lambda: model.logits[:, -1], position_ids=positions)
                other = tracer.invoke(ids[:1, :4], lambda: model.logits[:, -1])
            assert torch.allclose(one.value, expected, atol=1e-4)
            alone = first_logits(model, ids[:1, :4], torch.arange(4)[None])
            assert torch.allclose(other.value, alone, atol=1e-4)


def test_a_generation_that_does_not_hand_on() -> None:
    model = loaded("xlm")
    ids = zoo.ids(model.hf_model)
    with (
        pytest.raises(InputError, match=r"position_ids=...: \w+\.generate does not hand it on to the model"),
        model.generate(ids, position_ids=torch.arange(9)[None] + 3, **GENERATE),
    ):
        model.logits


def test_a_trace_that_is_dropped_says_so() -> None:
    model = loaded("gpt2")
    ids = zoo.ids(model.hf_model)
    for call in (lambda: model.generate(ids, **GENERATE), lambda: model.trace(ids), lambda: model.trace()):
        with pytest.warns(UserWarning, match=r"was not run: it opens a trace. Write `with model") as seen:
            call()
        assert [one.filename for one in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, **GENERATE).run()
        with model.trace(ids):
            pass


def test_generated_text() -> None:
    model = StandardizedTransformer("demo:gpt2")
    prompts = ["The capital of France is", "Japan is in"]
    tokenizer, hf = model.tokenizer, model.hf_model
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        expected.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    how = {"max_new_tokens": 3, "do_sample": False}
    assert model.generate_text(prompts, **how) == expected
    assert model.generate_text(prompts[0], **how) == expected[0]
    assert model.generate_text(prompts[:1], **how) == expected[:1]
    assert model.generate_text(tokenizer(prompts[1]).input_ids, **how) == expected[1]
    beams = model.generate_text(prompts[0], num_beams=2, num_return_sequences=2, **how)
    assert len(beams) == 2
    assert beams[0] != beams[1]
    plain = model.generate_text(prompts[0], max_new_tokens=12, min_new_tokens=12, do_sample=False)
    middle = plain[len(plain) // 2 :].split()[0]
    stopped = model.generate_text(
        prompts[0], max_new_tokens=12, min_new_tokens=12, do_sample=False, stop_strings=[middle]
    )
    assert middle in stopped
    assert plain.startswith(stopped)
    assert len(stopped) < len(plain)
    with pytest.raises(InputError, match="Text needs a tokenizer"):
        loaded("llama").generate_text([5, 6])


def test_blocks_of_unequal_length_in_chunks_are_refused() -> None:
    model = loaded("llama")
    ids = zoo.ids(model.hf_model)
    for given in ({"prefill_chunk_size": 4}, {"generation_config": GenerationConfig(prefill_chunk_size=4)}):
        with (
            pytest.raises(
                InputError,
                match=r"prompts of 9, 4 tokens are padded to one length, and with prefill_chunk_size",
            ),
            model.generate(**GENERATE, **given) as tracer,
        ):
            tracer.invoke(ids, lambda: model.logits)
            tracer.invoke(ids[:1, :4], lambda: model.logits)
