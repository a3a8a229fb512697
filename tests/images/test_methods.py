"""Methods on prompts with images: the image goes with its prompt into every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_families import FAMILIES
from PIL import Image
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import activation_patching, attribution_patching, collect_activations, logit_lens
from nnatomy.standardized.media import image_token

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def picture(seed: int) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8))


def metric(logits: Tensor) -> Tensor:
    return logits[..., 5] - logits[..., 6]


@pytest.fixture(params=("llava", "gemma3", "qwen2_vl", "qwen3_vl", "idefics3"), scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[StandardizedTransformer, dict[str, Any], dict[str, Any]]:
    """A model, and one question of two images."""
    hf, processor = FAMILIES[request.param]()
    model = StandardizedTransformer(hf, processor=processor)
    prompt = image_token(processor) + " what is this ?"
    return model, model.prepare(prompt, images=picture(1)), model.prepare(prompt, images=picture(2))


def test_the_lens_ends_in_what_the_model_says(pair: Any) -> None:
    model, clean, _ = pair
    with torch.no_grad():
        says = model.hf_model(**clean).logits[:, -1].softmax(-1)
    lens = logit_lens(model, clean)
    torch.testing.assert_close(lens[:, -1], says, rtol=1e-4, atol=1e-5)


def test_one_images_patches_in_the_place_of_anothers(pair: Any) -> None:
    model, clean, corrupted = pair
    hf, layers = model.hf_model, [one.module for one in model.layers]
    found = activation_patching(model, clean=clean, corrupted=corrupted, metric=metric).effect.squeeze()

    def run(
        inputs: dict[str, Any], layer: int = -1, at: int = 0, put: Tensor | None = None
    ) -> tuple[float, list[Tensor]]:
        kept: list[Tensor] = []

        def hook(i: int, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            if i == layer:
                hidden = hidden.clone()
                hidden[:, at] = put
            kept.append(hidden)
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        handles = [one.register_forward_hook(lambda _, __, out, i=i: hook(i, out)) for i, one in enumerate(layers)]
        try:
            with torch.no_grad():
                return float(metric(hf(**inputs).logits[0, -1])), kept
        finally:
            for handle in handles:
                handle.remove()

    _, source = run(clean)
    for layer in (0, len(layers) - 2):
        for at in (1, clean["input_ids"].shape[1] - 2):
            patched, _ = run(corrupted, layer, at, source[layer][:, at])
            assert float(found[layer, at]) == pytest.approx(patched, rel=1e-3, abs=1e-3)
    assert (found[0] - run(corrupted)[0]).abs().max() > 1e-3


def test_the_same_question_of_the_same_image(pair: Any) -> None:
    model, clean, _ = pair
    with pytest.raises(InputError, match="are the same, so that there is nothing to tell apart"):
        activation_patching(model, clean=clean, corrupted=dict(clean), metric=metric)


def test_activations_are_collected_with_the_image(pair: Any) -> None:
    model, clean, corrupted = pair
    store = collect_activations(model, [clean, corrupted], points={"layers_output": [0]}, progress=False)
    for row, inputs in enumerate((clean, corrupted)):
        with torch.no_grad():
            last = model.hf_model(**inputs, output_hidden_states=True).hidden_states[1][0, -1]
        torch.testing.assert_close(store["layers_output", 0][row], last, rtol=1e-4, atol=1e-4)


def test_attribution_knows_another_image_from_the_same(pair: Any) -> None:
    model, clean, corrupted = pair
    found = attribution_patching(model, clean, corrupted, metric=metric)
    assert (found.effect.abs() > 0).any()
    with pytest.raises(InputError, match="are the same, so that there is nothing to tell apart"):
        attribution_patching(model, clean, {name: value.clone() for name, value in clean.items()}, metric=metric)
