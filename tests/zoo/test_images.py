"""Every image-text class with images: what the standard names are is what plain hooks see, when the model is given the same."""

from __future__ import annotations

import pytest
import releases
import torch
from reference import edited, hooked
from torch import Tensor

import zoo
from nnatomy import StandardizedTransformer
from zoo import images
from zoo.other_classes import CLASSES, READ_IMAGES
from zoo.support import NAMES
from zoo.test_names import MODULES, close, place, there
from zoo.test_other_classes import rows

LOADED = [name for name, line in rows().items() if name in READ_IMAGES and "| yes |" in line]


@pytest.mark.parametrize("name", LOADED)
def test_with_an_image(name: str) -> None:
    hf = zoo.build_class(name, CLASSES[name])
    model, inputs = StandardizedTransformer(hf), images.inputs(hf, CLASSES[name])
    with torch.no_grad():
        plain = hf(**inputs).logits
        other = hf(**inputs | {n: v.flip(-1) for n, v in inputs.items() if n in images.NOISE}).logits
    assert moved(other, plain), "the image does not matter"
    points = {(names, i): place(model, names, i) for names in MODULES for i in there(model, names)}
    seen = hooked(hf, lambda: hf(**inputs), points)
    for names in NAMES:
        with torch.no_grad(), model.trace(**inputs):
            values = {i: getattr(model, names)[i] for i in there(model, names)}
            assert torch.equal(model.logits, plain), names
        for i, value in values.items():
            assert names not in MODULES or torch.equal(value, seen[names, i]), (names, i)

    def change(value: Tensor) -> Tensor:
        return 0.5 * value + torch.linspace(-1, 1, value.shape[-1])

    for names in ("layers_output", "attentions_output", "mlps_output"):
        for i in there(model, names)[1:2]:
            expected = edited(lambda: hf(**inputs).logits, *place(model, names, i), change)
            with torch.no_grad(), model.trace(**inputs):
                getattr(model, names)[i] = change(getattr(model, names)[i])
                logits = model.logits
            assert torch.equal(logits, expected), (names, i)
            assert moved(logits, plain), (names, i)


#: Positions of three axes (the first six), learned ones, and of one axis.
PADDED = (
    "CohereCompassForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "HunYuanVLForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "GitForCausalLM",
    "LlavaForConditionalGeneration",
)


@pytest.mark.parametrize("name", PADDED)
def test_padding_does_not_show_beside_an_image(name: str) -> None:
    hf = zoo.build_class(name, CLASSES[name])
    model, both = StandardizedTransformer(hf), images.inputs(hf, CLASSES[name])
    now = both["input_ids"].shape[1]
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    one, other = ({n: v.chunk(2)[i] for n, v in both.items()} for i in (0, 1))
    padded = {n: torch.cat([v[:, :3], v], 1) if v.shape[1:] == (now,) else v for n, v in both.items()}
    longer = {n: torch.cat([v[:, :3], v], 1) if v.shape[1:] == (now,) else v for n, v in other.items()}
    padded["input_ids"][:, :3] = longer["input_ids"][:, :3] = torch.tensor([20, 21, 22])
    padded["attention_mask"][0, :3] = 0
    for given in (padded, longer):
        for types in ("mm_token_type_ids", "token_type_ids"):
            given.get(types, torch.ones(1, 3))[:, :3] = 0
    with torch.no_grad():
        alone = hf(**one).logits[:, -images.AFTER :]
        with model.trace(**padded):
            in_batch = model.logits[:1, -images.AFTER :]
        with model.trace() as tracer:
            with tracer.invoke(**one):
                in_block = model.logits[:, -images.AFTER :]
            with tracer.invoke(**longer):
                model.logits
    assert close(in_batch, alone)
    assert close(in_block, alone)


#: Image tokens, positions of three axes, cross-attention, and an encoder that reads the image.
GENERATING = (
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Florence2ForConditionalGeneration",
)


@pytest.mark.parametrize("name", GENERATING)
def test_each_step_after_an_image_can_be_edited(name: str) -> None:
    hf = zoo.build_class(name, CLASSES[name])
    model, inputs = StandardizedTransformer(hf), images.inputs(hf, CLASSES[name])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    i = there(model, "layers_output")[-1]

    def change(value: Tensor) -> Tensor:
        return value.flip(-1)

    expected = edited(lambda: hf.generate(**inputs, **options), *place(model, "layers_output", i), change)
    with torch.no_grad(), model.generate(**inputs, **options) as tracer:
        for _ in tracer.iter[:]:
            model.layers_output[i] = change(model.layers_output[i])
        assert torch.equal(tracer.result, expected)
    assert not torch.equal(expected, hf.generate(**inputs, **options))


def moved(logits: Tensor, plain: Tensor) -> bool:
    return not close(logits.clamp(min=-100), plain.clamp(min=-100))  # Chameleon's are the least number, of image tokens


def test_what_is_given_no_image_is_in_the_table() -> None:
    assert releases.missing(images.NOT_TRIED, READ_IMAGES) == set()
    assert not images.NOT_TRIED.keys() & {*LOADED}
    types = {CLASSES[name] for name in READ_IMAGES - images.NOT_TRIED.keys()}
    assert releases.missing(images.GIVEN, types) == set()
