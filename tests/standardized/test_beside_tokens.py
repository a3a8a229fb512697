"""Models that have to be given images, sound or boxes beside tokens, against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from reference import edited, hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError, NotReachedError

#: Class -> type, and its layers and their self-attention by hand.
CLASSES: dict[str, tuple[str, str, str]] = {
    "BlipForConditionalGeneration": ("blip", "text_decoder.bert.encoder.layer", "attention"),
    "Blip2ForConditionalGeneration": ("blip-2", "language_model.model.decoder.layers", "self_attn"),
    "InstructBlipForConditionalGeneration": (
        "instructblip",
        "language_model.model.decoder.layers",
        "self_attn",
    ),
    "InstructBlipVideoForConditionalGeneration": (
        "instructblipvideo",
        "language_model.model.decoder.layers",
        "self_attn",
    ),
    "IdeficsForVisionText2Text": ("idefics", "model.layers", "self_attn"),
    "VoxtralRealtimeForConditionalGeneration": (
        "voxtral_realtime",
        "model.language_model.layers",
        "self_attn",
    ),
    "UdopForConditionalGeneration": ("udop", "decoder.block", "layer.0.SelfAttention"),
    "Pix2StructForConditionalGeneration": ("pix2struct", "decoder.layer", "self_attention.attention"),
    "PPFormulaNetForConditionalGeneration": ("pp_formulanet", "model.decoder.layers", "self_attn"),
    "VisionEncoderDecoderModel": ("vision-encoder-decoder", "decoder.bert.encoder.layer", "attention"),
}
NO_TEXT = (
    "Pix2StructForConditionalGeneration",
    "PPFormulaNetForConditionalGeneration",
    "VisionEncoderDecoderModel",
)
SEQ = 6


def build(name: str, **changes: Any) -> nn.Module:
    return zoo.build_class(name, CLASSES[name][0], **changes)


def beside(name: str, hf: nn.Module) -> dict[str, Tensor]:
    """What two prompts are given beside tokens, by hand."""
    draw = torch.Generator().manual_seed(3)
    image = torch.randn((2, 3, 16, 16), generator=draw)
    if name == "IdeficsForVisionText2Text":
        return {"pixel_values": image[:, None], "image_attention_mask": torch.ones(2, SEQ, 1)}
    if name == "VoxtralRealtimeForConditionalGeneration":
        return {"input_features": torch.randn((2, 128, 8 * SEQ), generator=draw)}
    if name == "UdopForConditionalGeneration":
        return {"bbox": torch.rand((2, SEQ, 4), generator=draw)}
    if name == "Pix2StructForConditionalGeneration":
        places = torch.tensor([[0.0, 0], [0, 1], [1, 0]]).expand(2, 3, 2)
        return {"flattened_patches": torch.cat([places, torch.randn((2, 3, 12), generator=draw)], -1)}
    if name == "PPFormulaNetForConditionalGeneration":
        return {"pixel_values": torch.randn((2, 3, 64, 64), generator=draw)}
    if name.startswith("InstructBlip"):
        frames = image[:, None] if "Video" in name else image
        return {"pixel_values": frames, "qformer_input_ids": torch.tensor([[20, 21], [22, 23]])}
    return {"pixel_values": image}


def inputs_of(name: str, hf: nn.Module) -> dict[str, Tensor]:
    inputs = beside(name, hf)
    if name not in NO_TEXT:
        inputs["input_ids"] = zoo.ids(hf, seq=SEQ)
    if hf.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = zoo.ids(hf, seq=5, seed=1)
    return inputs


@pytest.mark.parametrize("name", CLASSES)
def test_names_are_what_hooks_see_and_do(name: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(name, hf)
    layers = [*hf.get_submodule(CLASSES[name][1])]
    assert list(model.layers_input.modules) == layers
    assert list(model.attentions_output.modules) == [layer.get_submodule(CLASSES[name][2]) for layer in layers]
    points = {("layers_input", i): (layer, "input") for i, layer in enumerate(layers)}
    points |= {("layers_output", i): (layer, "output") for i, layer in enumerate(layers)}
    seen = hooked(hf, lambda: hf(**inputs), points)
    with torch.no_grad():
        plain = hf(**inputs).logits
        given = next(iter(beside(name, hf)))
        other = hf(**{**inputs, given: inputs[given].flip(0)}).logits
        with model.trace(**inputs):
            stream = model.layers_input[:]
            logits = model.logits
        with model.trace(**inputs):
            last = model.layers_output[-1]
    assert torch.equal(logits, plain)
    assert all(torch.equal(one, seen["layers_input", i]) for i, one in enumerate(stream))
    assert torch.equal(last, seen["layers_output", len(layers) - 1])
    if not name.startswith(("Blip2", "InstructBlip")):  # these put them where there are image tokens
        assert not torch.allclose(plain, other, atol=1e-2), f"{given} does not matter"

    change = lambda hidden: 0.5 * hidden + torch.linspace(-1, 1, hidden.shape[-1])  # noqa: E731
    expected = edited(lambda: hf(**inputs).logits, layers[-1], "output", change)
    with torch.no_grad(), model.trace(**inputs):
        model.layers_output[-1] = change(model.layers_output[-1])
        logits = model.logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, plain, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model.project_on_vocab(last), plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model._head.long_way(last), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("Blip2ForConditionalGeneration", "pixel_values beside tokens: give pixel_values=..., a row"),
        (
            "InstructBlipForConditionalGeneration",
            "pixel_values and qformer_input_ids beside tokens: give pixel_values=..., qformer_input_ids=...",
        ),
        ("UdopForConditionalGeneration", "bbox beside tokens: give bbox="),
    ],
)
def test_without_it_there_is_nothing_to_run(name: str, missing: str) -> None:
    hf = build(name)
    model = StandardizedTransformer(hf)
    with pytest.raises(InputError, match=f"The model reads {missing}"):
        model.prepare(zoo.ids(hf))


def test_image_tokens_are_filled_in() -> None:
    hf = build("Blip2ForConditionalGeneration", num_query_tokens=4, image_token_index=3)
    model, images = StandardizedTransformer(hf), beside("Blip2ForConditionalGeneration", hf)
    ids = torch.cat([torch.full((2, 4), 3), zoo.ids(hf, seq=SEQ)], 1)
    with torch.no_grad():
        plain = hf(input_ids=ids, **images).logits
        assert not torch.allclose(plain, hf(input_ids=ids, pixel_values=-images["pixel_values"]).logits, atol=1e-2)
        with model.trace(ids, **images):
            logits = model.logits
    assert torch.equal(logits, plain)


def test_what_runs_between_the_layers_is_said() -> None:
    """Cross-attentions to the images, which are a list of their own."""
    model = StandardizedTransformer(build("IdeficsForVisionText2Text"))
    with pytest.raises(NotInThisModelError, match=r"is not layers_input\[1\], off by"):
        model.layers_output.module(0)


def test_a_generation_of_a_module_within_has_no_steps() -> None:
    hf = build("Blip2ForConditionalGeneration")
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    with pytest.raises(NotReachedError, match="Blip2ForConditionalGeneration itself is not called in this generation"):
        with model.generate(ids, **beside("Blip2ForConditionalGeneration", hf), max_new_tokens=2) as tracer:
            for _ in tracer.iter[:]:
                pass


@pytest.mark.parametrize("name", ["Blip2ForConditionalGeneration", "UdopForConditionalGeneration"])
def test_shapes_alone(name: str) -> None:
    model = StandardizedTransformer(build(name), validate="shapes")
    assert model.validation.counts["failed"] == 0


def test_positions_of_three_axes_are_padded() -> None:
    """Qwen2.5-VL: prompts of two lengths are as each alone."""
    hf = zoo.build_class("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl")
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    assert model.takes_padding
    with torch.no_grad():
        alone = hf(input_ids=ids[1:, :5]).logits
        both = model([ids[0].tolist(), ids[1, :5].tolist()]).logits
    torch.testing.assert_close(both[1:, -5:], alone, rtol=1e-4, atol=1e-4)


def test_blocks_with_an_image_each() -> None:
    """One prompt has as many tokens as an image channels."""
    hf = build("Blip2ForConditionalGeneration", num_query_tokens=2, image_token_index=3)
    model, image = StandardizedTransformer(hf), beside("Blip2ForConditionalGeneration", hf)["pixel_values"]
    prompts = [3, 3, 22], [3, 3, 24, 25, 26]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompts[0], pixel_values=image[:1]):
            one = model.logits
        with tracer.invoke(prompts[1], pixel_values=image[1:]):
            other = model.logits
    for logits, prompt, own in zip((one, other), prompts, image, strict=True):
        with torch.no_grad():
            alone = hf(input_ids=torch.tensor([prompt]), pixel_values=own[None]).logits
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
