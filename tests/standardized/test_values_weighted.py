"""`values_weighted` against hooks: the values that a projection gives, times the pattern that the model itself returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import build, prompt_ids
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, OutOfOrderError

LAYER, HEADS, KEY = 1, 4, 2
#: What the dtype resolves, of products of a few numbers.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def naive(hf: nn.Module, ids: Tensor) -> Tensor:
    """From the value projection's output (heads of keys, each for two of queries), and the pattern in eager mode."""
    given: list[Tensor] = []
    attention = hf.get_submodule(f"model.layers.{LAYER}.self_attn")
    hook = attention.get_submodule("v_proj").register_forward_hook(lambda _, __, output: given.append(output))
    with torch.no_grad():
        pattern = hf(ids, output_attentions=True).attentions[LAYER]
    hook.remove()
    values = given[0].unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(HEADS // 2, 1)
    return pattern[..., None] * values[:, :, None]


def logits_with(hf: Any, ids: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits where the output projection is given `edit` of what the heads give: (batch, seq, head * value_dim)."""
    module = hf.get_submodule(f"model.layers.{LAYER}.self_attn.o_proj")
    hook = module.register_forward_pre_hook(lambda _, args: (edit(args[0]),))
    try:
        with torch.no_grad():
            logits: Tensor = hf(ids).logits
            return logits
    finally:
        hook.remove()


def off(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype).partition(".")[2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_they_are_read_and_assigned_in_each_dtype(implementation: str, dtype: torch.dtype) -> None:
    hf = build("llama", attn_implementation="eager").to(dtype)
    ids = prompt_ids()
    expected = naive(hf, ids)
    hf.set_attn_implementation(implementation)
    model = StandardizedTransformer(hf)
    assert model.validation["values_weighted", LAYER].status == "verified"
    with torch.no_grad(), model.trace(ids):
        weighted = model.values_weighted[LAYER]
        heads = model.heads_output[LAYER]
        logits = model.logits
    with torch.no_grad():
        assert torch.equal(logits, hf(ids).logits)  # a read changes no bit
    assert weighted.dtype == dtype
    assert off(weighted, expected) <= CLOSE[dtype]
    if implementation == "eager":
        assert torch.equal(weighted, expected)
    assert off(weighted.sum(3).transpose(1, 2), heads) <= CLOSE[dtype]

    with torch.no_grad(), model.trace(ids):  # no head hears this key
        model.values_weighted[LAYER][:, :, :, KEY] = 0
        without = model.heads_output[LAYER]
        logits = model.logits
    naively = expected.float()
    naively[:, :, :, KEY] = 0
    given = naively.sum(3).transpose(1, 2)
    assert off(without, given) <= CLOSE[dtype]
    assert off(without, heads) > 10 * CLOSE[dtype]
    assert off(logits, logits_with(hf, ids, lambda _: given.flatten(2).to(dtype))) <= 4 * CLOSE[dtype]

    with torch.no_grad(), model.trace(ids):
        model.values_weighted[LAYER] = torch.zeros_like(weighted)
        logits = model.logits
    assert torch.equal(logits, logits_with(hf, ids, torch.zeros_like))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_was_assigned_before_is_in_them(implementation: str) -> None:
    model, ids = StandardizedTransformer(build("llama", attn_implementation=implementation)), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        values = model.values[LAYER] * 3
        model.values[LAYER] = values
        pattern = model.attention_probabilities[LAYER].flip(-1)
        model.attention_probabilities[LAYER] = pattern
        weighted = model.values_weighted[LAYER]
        heads = model.heads_output[LAYER]
    each = values.repeat_interleave(HEADS // 2, 1)
    assert torch.allclose(weighted, torch.einsum("bhqk,bhkd->bhqkd", pattern, each))
    assert torch.allclose(heads, (pattern @ each).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_edit_in_each_step_of_a_generation_with_padding(implementation: str) -> None:
    """No head hears the prompt's third token: as if its values were none, in each step."""
    model = StandardizedTransformer(build("llama", attn_implementation=implementation))
    prompts = [prompt_ids(1, 7, 1)[0].tolist(), prompt_ids(1, 5, 2)[0].tolist()]
    found = []
    for name in ("values_weighted", "values"):
        with model.generate(prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            logits = []
            for _ in tracer.iter[:]:
                value = getattr(model, name)[LAYER]
                value = value.clone()
                value[..., 2, :] = 0
                getattr(model, name)[LAYER] = value
                logits.append(model.logits)
        found.append(torch.cat(logits, 1))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)
    with model.generate(prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        plain = torch.cat([model.logits for _ in tracer.iter[:]], 1)
    assert not torch.allclose(found[0], plain, atol=1e-2)


def test_what_cannot_be_is_said() -> None:
    model, ids = StandardizedTransformer(build("llama")), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        with pytest.raises(AssignmentError, match=r"values_weighted\[1\] is torch.float32 of shape \(2, 4, 9, 9, "):
            model.values_weighted[LAYER] = torch.zeros(2, HEADS, 9, 9)
        model.heads_output[LAYER]
        with pytest.raises(OutOfOrderError, match=r"values_weighted\[1\] was asked for"):
            model.values_weighted[LAYER]
