"""The text side of models that read images too: with text alone, and with an image, against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from reference import hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError

_IMAGE = {"image_size": 16, "patch_size": 4}
#: Class -> type, changes to its config.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlavaForConditionalGeneration": ("llava", {"vision_config": _IMAGE}),
    "PaliGemmaForConditionalGeneration": (
        "paligemma",
        {
            "vision_config": {**_IMAGE, "projection_dim": 32},
            "projection_dim": 32,
        },
    ),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", {}),
}


def inputs_of(hf: nn.Module) -> dict[str, Tensor]:
    """Two prompts, each with an image: as many image tokens as the model's own vision side makes of it."""
    draw = torch.Generator().manual_seed(0)
    if hf.config.model_type == "qwen3_vl":
        vision = hf.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images = {
            "pixel_values": torch.randn((32, width), generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        }
        count = 16 // vision.spatial_merge_size**2
    else:
        images = {"pixel_values": torch.randn((2, 3, 16, 16), generator=draw)}
        count = 16
    ids = zoo.ids(hf, seq=count + 5)
    token = hf.config.image_token_id
    ids = torch.where(ids == token, token + 1, ids)
    ids[:, 1 : count + 1] = token
    if hf.config.model_type == "qwen3_vl":
        images["mm_token_type_ids"] = (ids == token).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


@pytest.mark.parametrize("name", CLASSES)
def test_layers_with_an_image_are_what_hooks_see(name: str) -> None:
    hf = zoo.build_class(name, *CLASSES[name][:1], **CLASSES[name][1])
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    layers = hf.model.language_model.layers
    assert [view.module for view in model.layers] == [*layers]
    points = {("layers_input", i): (layer, "input") for i, layer in enumerate(layers)}
    points |= {("layers_output", i): (layer, "output") for i, layer in enumerate(layers)}
    seen = hooked(hf, lambda: hf(**inputs), points)
    with torch.no_grad():
        plain = hf(**inputs).logits
        other = hf(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert not torch.allclose(plain, other, atol=1e-2), "the image does not matter"
    for accessor in ("layers_input", "layers_output"):
        with torch.no_grad(), model.trace(**inputs):
            values = getattr(model, accessor)[:]
            logits = model.logits
        assert torch.equal(logits, plain)
        assert all(torch.equal(value, seen[accessor, i]) for i, value in enumerate(values))


def test_a_layer_that_text_leaves_out_keeps_its_number() -> None:
    """Mllama's layer 1 is for images alone: without one, what layer 0 gives is what layer 2 is given."""
    hf = zoo.build_class("MllamaForConditionalGeneration", "mllama")
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    layers = hf.model.language_model.layers
    assert [view.module for view in model.layers] == [*layers]
    assert model.layer_kinds == ("attention", "not run", "attention", "attention")
    assert model.validation["layers", None].status == "verified"
    seen = hooked(hf, lambda: hf(input_ids=ids), {i: (layers[i], "output") for i in (0, 2, 3)})
    with torch.no_grad(), model.trace(ids):
        values = {0: model.layers_output[0], 2: model.layers_output[2], 3: model.layers_output[3]}
        logits = model.logits
    assert all(torch.equal(value, seen[i]) for i, value in values.items())
    with torch.no_grad():
        torch.testing.assert_close(model.project_on_vocab(values[3]), logits)
        torch.testing.assert_close(model._head.long_way(values[3]), logits, rtol=1e-4, atol=1e-4)
    for name in ("layers_input", "attentions_output", "layers_mid", "mixers_output", "routers_logits"):
        with pytest.raises(NotInThisModelError, match=rf"{name}\[1\]: .* it does not run on text alone"):
            getattr(model, name).module(1)
    for name in ("W_Q", "W_cross_Q", "W_cross_O"):
        with pytest.raises(NotInThisModelError, match=rf"{name}\[1\]: .* it does not run on text alone"):
            getattr(model, name)[1]
    with pytest.raises(NotInThisModelError, match=r"W_cross_V\[0\]: there is none: no layer attends to an encoder"):
        model.W_cross_V[0]
    with pytest.raises(NotInThisModelError, match="it does not run on text alone"), model.trace(ids):
        model.skip_layers(0, 2)


def test_with_an_image_it_runs_under_its_own_name() -> None:
    hf = zoo.build_class("MllamaForConditionalGeneration", "mllama")
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    states = torch.randn((2, 7, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = hf(input_ids=ids, cross_attention_states=states).logits
        with model.trace(ids, cross_attention_states=states):
            given = model.layers[1].output
            then = model.layers_input[2]
            logits = model.logits
    assert torch.equal(given, then)
    assert torch.equal(logits, plain)
