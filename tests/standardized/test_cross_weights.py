"""Weights of attentions to an encoder against the modules' own parameters, and against what those attentions do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build as build_decoder
from encoder_decoders import build, inputs_of
from reference import hooked

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError
from nnatomy.weights import FactoredMatrix

#: Class -> a layer's attention to the encoder, and its key projection.
CLASSES = {
    "T5ForConditionalGeneration": ("decoder.block.1.layer.1.EncDecAttention", "k"),
    "BartForConditionalGeneration": ("model.decoder.layers.1.encoder_attn", "k_proj"),
    "WhisperForConditionalGeneration": ("model.decoder.layers.1.encoder_attn", "k_proj"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_they_make_the_pattern_and_what_the_heads_add(name: str) -> None:
    hf = build(name)
    model, inputs, module = StandardizedTransformer(hf), inputs_of(hf), hf.get_submodule(CLASSES[name][0])
    read = hooked(hf, lambda: hf(**inputs), {"keys": (module.get_submodule(CLASSES[name][1]), "input")})["keys"]
    with torch.no_grad(), model.trace(**inputs):
        given = model.cross_attentions_input[1]
        pattern = model.cross_attention_probabilities[1]
        output = model.cross_attentions_output[1]
    with torch.no_grad():
        queries, keys, values = (
            torch.einsum("bsd,hde->bhse", stream, getattr(model, f"W_cross_{role}")[1])
            + getattr(model, f"b_cross_{role}")[1][:, None]
            for stream, role in ((given, "Q"), (read, "K"), (read, "V"))
        )
        scale = 1.0 if "T5" in name else queries.shape[-1] ** -0.5
        padding = inputs.get("attention_mask")
        scores = scale * queries @ keys.mT
        if padding is not None and padding.shape[-1] == scores.shape[-1]:
            scores = scores.masked_fill(padding[:, None, None] == 0, -torch.inf)
        assert torch.allclose(scores.softmax(-1), pattern, atol=1e-4)
        added = torch.einsum("bhqk,bhke,hed->bqd", pattern, values, model.W_cross_O[1]) + model.b_cross_O[1]
    assert torch.allclose(added, output, atol=1e-4)
    assert not torch.allclose(model.W_cross_Q[1], model.W_Q[1])
    assert FactoredMatrix(model.W_cross_V[1], model.W_cross_O[1]).shape[0] == model.num_heads


def test_they_are_views_of_the_parameters() -> None:
    hf: Any = build("BartForConditionalGeneration")
    model = StandardizedTransformer(hf)
    parameter = hf.model.decoder.layers[0].encoder_attn.k_proj.weight
    assert model.W_cross_K[0].untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def test_a_model_without_an_encoder_has_none() -> None:
    model = StandardizedTransformer(build_decoder("gpt2"))
    with pytest.raises(NotInThisModelError, match=r"^W_cross_Q\[0\]: there is none: no layer attends to an encoder\.$"):
        model.W_cross_Q[0]
