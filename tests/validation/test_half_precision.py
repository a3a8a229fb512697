"""Validation in half precision: rounding and saturation are no faults, and faults are no rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from nnatomy import StandardizedTransformer

HALVES = (torch.bfloat16, torch.float16)
#: Where queries and keys come from, in one family or another.
PROJECTIONS = (*("q_proj", "k_proj", "query", "key", "c_attn", "Wqkv", "qkv_proj", "query_key_value", "q_b_proj"),)
TYPES = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "falcon", "mistral", "mixtral", "qwen2"),
    *("qwen2_moe", "gemma", "gemma3_text", "phi", "phi3", "granite", "starcoder2", "deepseek_v3", "glm4"),
    *("bert", "xglm", "biogpt", "codegen"),
)


def saturated(model_type: str) -> Any:
    """Its queries and keys are large, so that a softmax gives 1 to one key and 0 to the others.

    (At 8 times its size, GLM-4 in float16 has two keys that are all but tied: a processor's rounding chooses between them.)
    """
    hf = zoo.build(model_type)
    factor = 16 if model_type == "glm4" else 8
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if any(projection in name for projection in PROJECTIONS):
                parameter *= factor
    return hf


@pytest.mark.parametrize("model_type", TYPES)
def test_a_saturated_softmax_is_no_fault(model_type: str) -> None:
    hf = saturated(model_type)
    expected = [(row.name, row.layer, row.status) for row in StandardizedTransformer(hf).validation]
    for dtype in HALVES:
        model = StandardizedTransformer(saturated(model_type).to(dtype))
        assert [(row.name, row.layer, row.status) for row in model.validation] == expected
    with torch.no_grad(), model.trace(zoo.ids(hf)):
        pattern = model.attention_probabilities[0]
    assert bool((pattern == 1).any())


def test_scores_that_an_ulp_of_is_more_than_1() -> None:
    hf = zoo.build("llama", attn_implementation="eager", attention_bias=True)
    for layer in hf.model.layers:
        bias = layer.self_attn.k_proj.bias
        bias.data = torch.linspace(-2000, 2000, len(bias))
    counts = StandardizedTransformer(hf).validation.counts
    assert StandardizedTransformer(hf.bfloat16()).validation.counts == counts


def off(model: Any, long: list[int], short: list[int]) -> float:
    """How far a prompt's last logits are from those it has alone, beside a longer one."""
    with torch.no_grad():
        alone, together = model([short]).logits[0, -1].double(), model([long, short]).logits[1, -1].double()
    return float((alone - together).abs().max() / alone.abs().max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "model_type", ["bart", "mbart", "falcon_h1", "lfm2", "roformer", "dots3_note_text", "deepseek_v4"]
)
def test_padding_that_shows_is_not_taken_for_rounding(model_type: str, dtype: torch.dtype) -> None:
    """A hundredth of the values, and more, where rounding is a hundredth."""
    model = StandardizedTransformer(zoo.build(model_type).to(dtype))
    assert not model.takes_padding
    assert model.validation["padding", None].status == "refused"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model_type", ["roberta", "camembert", "minimax", "moss_transcribe_diarize", "llama", "gpt2"])
def test_padding_that_does_not_show(model_type: str, dtype: torch.dtype) -> None:
    """RoBERTa counts positions from another number, which the model does by itself; MiniMax rounds otherwise."""
    hf = zoo.build(model_type).to(dtype)
    model = StandardizedTransformer(hf)
    assert model.validation["padding", None].status == "verified"
    ids = zoo.ids(hf)
    assert off(model, ids[0].tolist(), ids[1, :6].tolist()) < 4 * torch.finfo(dtype).eps


def test_that_a_difference_is_seen_when_it_is_as_large_as_rounding() -> None:
    """What pads on the left is given other numbers, a rounding of bfloat16 of the largest."""
    hf = zoo.build("llama").bfloat16()
    assert StandardizedTransformer(hf).takes_padding
    small = torch.linspace(-1, 1, 32).bfloat16()

    def shifted(_: Any, args: Any, kwargs: Any, output: Any) -> Tensor:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dtype != torch.bool or mask[:, :, -1].all():
            return output
        return output + small * 2**-6 * output.abs().max()

    hf.model.layers[0].register_forward_hook(shifted, with_kwargs=True)
    assert not StandardizedTransformer(hf).takes_padding
