"""A KV cache is given by any of its names, and goes to the model by that which its forward has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from architectures import build, prompt_ids
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs.cache_name import CACHE_NAMES, cache_name, cached_positions, with_cache_called

GIVEN: list[Any] = []


class OfOld(GPT2LMHeadModel):
    """As models' own code has it, whatever the release calls it."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        GIVEN.append(past_key_values)
        return super().forward(input_ids, **kwargs)


class OfNone(GPT2LMHeadModel):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def test_the_name_is_what_the_forward_has() -> None:
    config = build("gpt2").config
    assert cache_name(OfOld(config)) == "past_key_values"
    assert cache_name(OfNone(config)) == ""
    assert cache_name(nn.Linear(1, 1)) == ""


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_it_goes_to_models_of_their_own_code_by_their_name(name: str) -> None:
    hf = OfOld(build("gpt2").config)
    model, past = StandardizedTransformer(hf), object()
    model(prompt_ids(), **{name: past})
    assert GIVEN.pop() is past
    with model.trace(**{name: past}) as tracer:
        tracer.invoke([3, 4], lambda: model.logits)
    assert GIVEN.pop() is past


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "xlstm"])
def test_a_state_goes_on(model_type: str) -> None:
    """In place of keys and values; of how many positions it is does not show."""
    hf = zoo.build(model_type)
    model, ids, own_name = StandardizedTransformer(hf), zoo.ids(hf), cache_name(hf)

    def past(name: str) -> dict[str, Any]:
        return {name: hf(ids[:, :-1], use_cache=True)[own_name], "use_cache": True}

    assert cached_positions(past(own_name)) == 0
    with torch.no_grad():
        expected = hf(ids[:, -1:], **past(own_name)).logits
        assert torch.allclose(expected, hf(ids).logits[:, -1:], atol=1e-4)
        for name in CACHE_NAMES:
            with model.trace(ids[:, -1:], **past(name)):
                assert torch.equal(model.logits, expected)


def test_two_caches_are_for_the_model_to_refuse() -> None:
    both = {"cache": 1, "past_key_values": 2}
    assert with_cache_called("cache", both) == both
    assert with_cache_called("", {"cache": 1}) == {"cache": 1}
