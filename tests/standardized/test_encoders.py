"""Encoders without a head: bidirectional, of text and of images, against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from reference import edited, hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError

_IMAGE = {"image_size": 16, "patch_size": 4}
#: Class -> type, changes to its config, layers and attention by hand, whether it is causal.
CLASSES: dict[str, tuple[str, dict[str, Any], str, str, bool]] = {
    "BertModel": ("bert", {"is_decoder": False}, "encoder.layer", "attention", False),
    "RobertaModel": ("roberta", {"is_decoder": False}, "encoder.layer", "attention", False),
    "ElectraModel": ("electra", {"is_decoder": False}, "encoder.layer", "attention", False),
    "ModernBertModel": ("modernbert", {}, "layers", "attn", False),
    "DistilBertModel": ("distilbert", {}, "transformer.layer", "attention", False),
    "DebertaV2Model": ("deberta-v2", {}, "encoder.layer", "attention", False),
    "T5EncoderModel": ("t5", {"is_decoder": False}, "encoder.block", "layer.0.SelfAttention", False),
    "LlamaModel": ("llama", {}, "layers", "self_attn", True),
    "CLIPTextModel": ("clip_text_model", {}, "encoder.layers", "self_attn", True),
    "CLIPTextModelWithProjection": ("clip_text_model", {}, "text_model.encoder.layers", "self_attn", True),
    "ViTModel": ("vit", _IMAGE, "layers", "attention", False),
    "Dinov2Model": ("dinov2", _IMAGE, "encoder.layer", "attention", False),
    "CLIPVisionModel": ("clip_vision_model", _IMAGE, "encoder.layers", "self_attn", False),
    "CLIPVisionModelWithProjection": ("clip_vision_model", _IMAGE, "vision_model.encoder.layers", "self_attn", False),
    "SiglipVisionModel": ("siglip_vision_model", _IMAGE, "encoder.layers", "self_attn", False),
}
VISION = [name for name, row in CLASSES.items() if row[1] is _IMAGE]


def build(name: str, **changes: Any) -> nn.Module:
    model_type, own = CLASSES[name][:2]
    return zoo.build_class(name, model_type, **{**own, **changes})


def inputs_of(hf: nn.Module) -> dict[str, Tensor]:
    if hf.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))}
    return {"input_ids": zoo.ids(hf)}


@pytest.mark.parametrize("name", CLASSES)
def test_names_are_what_hooks_see_and_do(name: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    layers = [*hf.get_submodule(CLASSES[name][2])]
    attentions = [layer.get_submodule(CLASSES[name][3]) for layer in layers]
    assert list(model.attentions_output.modules) == attentions
    points = {("layers_input", i): (layer, "input") for i, layer in enumerate(layers)}
    points |= {("layers_output", i): (layer, "output") for i, layer in enumerate(layers)}
    seen = hooked(hf, lambda: hf(**inputs), points)
    with torch.no_grad():
        plain = hf(**inputs)[0]
    for accessor in ("layers_input", "layers_output"):
        with torch.no_grad(), model.trace(**inputs) as tracer:
            values = getattr(model, accessor)[:]
            result = tracer.result[0]
        assert torch.equal(result, plain)
        assert len(values) == len(layers)
        assert all(torch.equal(value, seen[accessor, i]) for i, value in enumerate(values))
    change = lambda hidden: 0.5 * hidden + torch.linspace(-1, 1, hidden.shape[-1])  # noqa: E731
    expected = edited(lambda: hf(**inputs)[0], layers[1], "output", change)
    with torch.no_grad(), model.trace(**inputs) as tracer:
        model.layers_output[1] = change(model.layers_output[1])
        result = tracer.result[0]
    assert torch.equal(result, expected)
    assert not torch.allclose(result, plain, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in VISION])
def test_the_embedding_is_the_one_that_is_called(name: str) -> None:
    """T5's encoder has two of one weight: the one it names is never called."""
    hf = build(name)
    called = [
        one for one in hf.modules() if isinstance(one, nn.Embedding) and one.num_embeddings == hf.config.vocab_size
    ]
    points = {("embedding", i): (one, "output") for i, one in enumerate(called)}
    seen = hooked(hf, lambda: hf(input_ids=zoo.ids(hf)), points)
    model = StandardizedTransformer(hf)
    with torch.no_grad(), model.trace(input_ids=zoo.ids(hf)):
        embedded = model.token_embeddings
    assert any(torch.equal(embedded, one) for one in seen.values())


@pytest.mark.parametrize("name", CLASSES)
def test_whether_it_is_causal_is_seen(name: str) -> None:
    model = StandardizedTransformer(build(name))
    assert model.causal == CLASSES[name][4]
    assert set(model.layer_kinds) == {"attention"}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("DebertaV2Model", "T5EncoderModel")])
def test_patterns_are_those_that_the_model_returns(name: str) -> None:
    hf = build(name, attn_implementation="eager")
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    with torch.no_grad():
        own = hf(**inputs, output_attentions=True).attentions
    with torch.no_grad(), model.trace(**inputs):
        patterns = model.attention_probabilities[:]
    assert len(own) == len(patterns)
    for one, other in zip(patterns, own, strict=True):
        torch.testing.assert_close(one, other)
        assert (float(one.triu(1).sum()) == 0) == CLASSES[name][4]


@pytest.mark.parametrize("name", CLASSES)
def test_what_needs_a_head_is_refused(name: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    with pytest.raises(NotInThisModelError, match="logits: the model has no head"), model.trace(**inputs):
        model.logits
    with pytest.raises(NotInThisModelError, match="lm_head: the model has no head"):
        model.lm_head
    with pytest.raises(NotInThisModelError, match="project_on_vocab: the model has no head"):
        model.project_on_vocab(torch.zeros(model.hidden_size))
    refused = {row.name for row in model.validation if row.layer is None and row.status == "refused"}
    assert {"logits", "lm_head", "project_on_vocab"} <= refused


@pytest.mark.parametrize("name", VISION)
def test_images_are_no_tokens(name: str) -> None:
    model = StandardizedTransformer(build(name))
    with pytest.raises(InputError, match="no tokens but pixel_values: give pixel_values="):
        model.prepare([1, 2, 3])
    with pytest.raises(InputError, match="There is no prompt: give pixel_values="):
        model.prepare()
    with pytest.raises(NotInThisModelError, match="vocab_size: the config of"):
        model.vocab_size
    with pytest.raises(NotInThisModelError, match="token_embeddings: the model reads no tokens but pixel_values"):
        with model.trace(**inputs_of(model.hf_model)):
            model.token_embeddings


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "ModernBertModel", "DistilBertModel", "T5EncoderModel"])
def test_padding_does_not_show_where_it_is_said_not_to(name: str) -> None:
    hf = build(name)
    model = StandardizedTransformer(hf)
    ids = zoo.ids(hf).tolist()
    if not model.takes_padding:
        with pytest.raises(InputError, match="padding is no way to one length"):
            model.prepare([ids[0], ids[1][:5]])
        return
    with torch.no_grad():
        alone = hf(input_ids=torch.tensor([ids[1][:5]]))[0]
        both = model([ids[0], ids[1][:5]])[0]
    torch.testing.assert_close(both[1:, -5:], alone, rtol=1e-4, atol=1e-4)


def test_a_masked_language_model_has_its_head_and_looks_ahead() -> None:
    hf = zoo.build_class("BertForMaskedLM", "bert", is_decoder=False)
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    assert not model.causal
    with torch.no_grad(), model.trace(ids):
        last, logits = model.layers_output[-1], model.logits
    with torch.no_grad():
        assert torch.equal(logits, hf(input_ids=ids).logits)
        torch.testing.assert_close(model.project_on_vocab(last), logits, rtol=1e-4, atol=1e-4)


def test_what_generates_is_no_less_causal_for_being_bidirectional() -> None:
    """BERT says whether it is a decoder; both hold."""
    assert StandardizedTransformer(zoo.build("bert")).causal
    assert not StandardizedTransformer(zoo.build("bert", is_decoder=False)).causal
