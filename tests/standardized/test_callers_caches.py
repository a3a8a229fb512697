"""A cache of the caller's is as a whole pass leaves it, or as it was: held against the model's own code."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import zoo
from encoder_decoders import build as build_encoder_decoder
from torch import Tensor
from transformers import QuantizedCache, StaticCache

from nnatomy import StandardizedTransformer

TYPES = (
    "llama",
    "gemma2",
    "jamba",
    "qwen3_next",
    "deepseek_v4",
    "minimax",
    "mamba2",
    "rwkv",
    "xlstm",
    "static",
)


def made(model_type: str) -> tuple[StandardizedTransformer, str, Any, Tensor]:
    """A model, what it calls its cache, one with six positions, and the two tokens that come next."""
    hf: Any = zoo.shared("llama" if model_type in ("static", "fp8") else model_type)
    ids = zoo.ids(hf, seq=8)
    taken = inspect.signature(hf.forward).parameters
    name = next(one for one in ("cache", "past_key_values", "cache_params", "state") if one in taken)
    given: dict[str, Any] = {}
    if model_type == "static":
        given[name] = StaticCache(hf.config, max_cache_len=12)
    if model_type == "fp8":
        given[name] = QuantizedCache("fp8", hf.config)
    with torch.no_grad():
        cache = getattr(hf(ids[:, :6], use_cache=True, **given), name)
    return StandardizedTransformer(hf, validate=False), name, cache, ids[:, 6:]


@pytest.mark.parametrize("model_type", TYPES)
def test_whatever_becomes_of_the_block(model_type: str) -> None:
    model, name, cache, tokens = made(model_type)
    hf, first, second = model.hf_model, tokens[:, :1], tokens[:, 1:]

    def next_logits(of: Any, token: Tensor = second) -> Tensor:
        return hf(token, **{name: of}, use_cache=True).logits

    whole, read, in_dict, raised, stopped, broken = (copy.deepcopy(cache) for _ in range(6))
    with torch.no_grad():
        next_logits(whole, first)
        after, untouched = next_logits(copy.deepcopy(whole)), next_logits(copy.deepcopy(cache))
        assert not torch.allclose(after, untouched, atol=1e-2)
        with model.trace(first, **{name: read}, use_cache=True):
            model.layers_output[0]  # an early layer
        assert torch.allclose(next_logits(read), after, atol=1e-4)  # a mask is given, and was not there
        with model.trace({"input_ids": first, name: in_dict, "use_cache": True}):
            pass
        assert torch.allclose(next_logits(in_dict), after, atol=1e-4)
        with pytest.raises(KeyError, match="mine"), model.trace(first, **{name: raised}, use_cache=True):
            model.layers_output[1]
            raise KeyError("mine")
        assert torch.equal(next_logits(raised), untouched)
        with model.trace(first, **{name: stopped}, use_cache=True) as tracer:
            model.layers_output[1]
            tracer.stop()
        assert torch.equal(next_logits(stopped), untouched)

        def fail(*_: Any) -> None:
            raise RuntimeError("the model's own")

        handle = model.layers[-1].module.register_forward_hook(fail)
        try:
            with (
                pytest.raises(RuntimeError, match="the model's own"),
                model.trace(first, **{name: broken}, use_cache=True),
            ):
                model.logits
        finally:
            handle.remove()
        assert torch.equal(next_logits(broken), untouched)


def test_in_a_generation_and_in_a_scan() -> None:
    model, name, cache, tokens = made("llama")
    hf: Any = model.hf_model
    prompt = zoo.ids(hf, seq=8)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected, read, scanned = (copy.deepcopy(cache) for _ in range(3))
    with torch.no_grad():
        hf.generate(prompt, attention_mask=torch.ones_like(prompt), **{name: expected}, **how)
        with model.generate(prompt, **{name: read}, **how):
            model.layers_output[0]
        with model.scan(tokens, **{name: scanned}):
            assert model.logits.shape == (2, 2, zoo.vocab_size(hf))
    for layer, other in zip(read.layers, expected.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
    for layer, other in zip(scanned.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)


def test_of_an_encoder_decoder() -> None:
    hf = build_encoder_decoder("T5ForConditionalGeneration")
    model = StandardizedTransformer(hf, validate=False)
    ids, tokens = zoo.ids(hf, seq=5), zoo.ids(hf, seq=4, seed=1)
    with torch.no_grad():
        out = hf(input_ids=ids, decoder_input_ids=tokens[:, :2], use_cache=True)
        name = "cache" if "cache" in inspect.signature(hf.forward).parameters else "past_key_values"
        cache = out[name]
        whole, read, raised = (copy.deepcopy(cache) for _ in range(3))
        states = out.encoder_last_hidden_state

        def next_logits(of: Any, token: Tensor) -> Tensor:
            given = {"encoder_outputs": (states,), "decoder_input_ids": token, name: of}
            return hf(**given, use_cache=True).logits

        untouched = next_logits(copy.deepcopy(cache), tokens[:, 3:])
        next_logits(whole, tokens[:, 2:3])
        after = next_logits(whole, tokens[:, 3:])
        with model.trace(ids, decoder_input_ids=tokens[:, 2:3], **{name: read}, use_cache=True):
            model.layers_output[0]
        assert torch.equal(next_logits(read, tokens[:, 3:]), after)
        with (
            pytest.raises(KeyError),
            model.trace(ids, decoder_input_ids=tokens[:, 2:3], **{name: raised}, use_cache=True),
        ):
            model.layers_output[0]
            raise KeyError
        assert torch.equal(next_logits(raised, tokens[:, 3:]), untouched)
