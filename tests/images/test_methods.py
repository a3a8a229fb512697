"""Methods on prompts with images: the image goes with its prompt into every run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_families import FAMILIES
from PIL import Image
from reference import hooked
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import (
    activation_patching,
    attribution_patching,
    collect_activations,
    image_lens,
    logit_lens,
    picture_patching,
)
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


# By the picture.


def test_arguments_of_other_kinds_are_read_or_refused() -> None:
    """In a process of its own, as in the tests' the runtime checks of types come first."""
    script = Path(__file__).with_name("other_kinds.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def question(name: str) -> tuple[StandardizedTransformer, str, Any]:
    """A model whose image is a grid of patches, a prompt, and the image's tokens."""
    hf, processor = FAMILIES[name]()
    model = StandardizedTransformer(hf, processor=processor)
    prompt = f"the {image_token(processor)} what is this ?"
    (photo,) = model.image_tokens(prompt, images=picture(1))
    return model, prompt, photo


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_the_lens_at_patches(name: str) -> None:
    model, prompt, photo = question(name)
    found = image_lens(model, prompt, picture(1), words=["what", 6])
    hf, inputs = model.hf_model, model.prepare(prompt, images=picture(1))
    layers = [one.module for one in model.layers]
    with torch.no_grad():
        kept = hooked(hf, lambda: hf(**inputs), {i: (one, "output") for i, one in enumerate(layers)})
        last = hf(**inputs).logits[0].softmax(-1)
        for layer in (0, len(layers) - 1):
            for row, column in ((0, 0), (photo.patch_grid[0] - 1, 0), (0, photo.patch_grid[1] - 1)):
                state = kept[layer][0, photo.position_of(row, column)]
                probs = model.project_on_vocab(state).softmax(-1)
                if layer == len(layers) - 1:
                    torch.testing.assert_close(probs, last[photo.position_of(row, column)], rtol=1e-4, atol=1e-5)
                assert int(found.best[layer, row, column]) == int(probs.argmax())
                torch.testing.assert_close(found.best_probs[layer, row, column], probs.max(), rtol=1e-4, atol=1e-5)
                ids = [model.tokenizer.convert_tokens_to_ids("what"), 6]
                torch.testing.assert_close(found.effect[:, layer, row, column], probs[ids], rtol=1e-4, atol=1e-5)
                assert found.said(layer)[row][column] == model.tokenizer.decode([int(probs.argmax())])
    figure = found.plot("what", layers=[0, 2])
    assert [one.type for one in figure.data] == ["image", "image", "heatmap", "image", "heatmap"]
    torch.testing.assert_close(torch.tensor(figure.data[4].z), found.effect[0, 2].double())
    with pytest.raises(InputError, match=r"word='user': the lens has been asked for 'what', "):
        found.plot("user")
    with pytest.raises(InputError, match="image=1: the prompt has 1, 0 to 0"):
        image_lens(model, prompt, picture(1), image=1)
    with pytest.raises(InputError, match=r"words='what': give a list of them, words=\['what'\]"):
        image_lens(model, prompt, picture(1), words="what")
    with pytest.raises(InputError, match="The answer True is neither a token id nor a text"):
        image_lens(model, prompt, picture(1), words=[True])
    with pytest.raises(InputError, match="There is no layer True: the lens has "):
        found.said(True)
    with pytest.raises(InputError, match="There is no layer 50: the lens has "):
        found.said(50)
    with pytest.raises(InputError, match="There is no layer 77: the lens has "):
        found.plot("what", layers=[77])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_region_in_the_place_of_anothers(name: str) -> None:
    model, prompt, photo = question(name)
    clean, corrupted = (model.prepare(prompt, images=picture(i)) for i in (1, 2))
    rows, columns = photo.patch_grid
    size = (rows // 2, columns)
    found = picture_patching(model, clean, corrupted, image=photo, metric=metric, region=size, layers=[0, 2])
    assert found.effect.shape == (2, 2, 1)
    hf, layers = model.hf_model, [one.module for one in model.layers]
    with torch.no_grad():
        source = hooked(hf, lambda: hf(**clean), {i: (one, "output") for i, one in enumerate(layers)})
        for place, layer in enumerate((0, 2)):
            for half in (0, 1):
                at = photo.positions.unflatten(0, photo.patch_grid)[half * size[0] : (half + 1) * size[0]].flatten()
                assert torch.equal(at, photo.region(slice(half * size[0], (half + 1) * size[0]), slice(None)))

                def put(_: Any, __: Any, output: Any, layer: int = layer, at: Tensor = at) -> Any:
                    hidden = output if isinstance(output, Tensor) else output[0]
                    hidden[:, at] = source[layer][:, at]
                    return output

                handle = layers[layer].register_forward_hook(put)
                patched = float(metric(hf(**corrupted).logits[0, -1]))
                handle.remove()
                assert float(found.effect[place, half, 0]) == pytest.approx(patched, rel=1e-3, abs=1e-3)
    assert (found.effect - found.corrupted).abs().max() > 1e-3
    each = picture_patching(model, clean, corrupted, image=photo, metric=metric, layers=[1])
    plain = activation_patching(model, clean, corrupted, metric=metric, layers=[1], positions=photo.positions.tolist())
    torch.testing.assert_close(each.effect.flatten(), plain.effect.flatten(), rtol=1e-4, atol=1e-4)
    figure = found.plot()
    torch.testing.assert_close(torch.tensor(figure.data[2].z), found.normalized[0].double())
    for wrong in ((3, 1) if name == "llava" else (1, 2), (0, 1)):
        with pytest.raises(InputError, match=r"it is rows and columns of patches that divide the image's \d rows"):
            picture_patching(model, clean, corrupted, image=photo, metric=metric, region=wrong)


def test_what_the_model_sees() -> None:
    """LLaVA's processor cuts off the sides of a wide picture: maps are of what is left."""
    model, prompt, _ = question("llava")
    exact = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (photo,) = model.image_tokens(prompt, images=exact)
    assert photo.picture is not None
    assert np.array_equal(photo.picture.numpy(), exact)
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = exact
    (photo,) = model.image_tokens(prompt, images=Image.fromarray(wide))
    assert photo.picture is not None
    assert np.array_equal(photo.picture.numpy(), exact)
    model, prompt, _ = question("qwen2_vl")  # which reads all of it
    (photo,) = model.image_tokens(prompt, images=Image.fromarray(wide))
    assert photo.picture is not None
    assert np.array_equal(photo.picture.numpy(), wide)


def test_patterns_by_text_and_image() -> None:
    model, prompt, photo = question("llava")
    prompts = [prompt, f"{image_token(model.processor)} what is this ? a user"]
    images = [picture(1), picture(2)]
    first, second = model.prompt_parts(prompts, images=images)
    ids, mask = (model.prepare(prompts, images=images)[name] for name in ("input_ids", "attention_mask"))
    for i, parts in enumerate((first, second)):
        assert (ids[i, parts["image 0"]] == model.config.image_token_id).all()
        assert sorted([*parts["text"].tolist(), *parts["image 0"].tolist()]) == mask[i].nonzero().flatten().tolist()
    with torch.no_grad(), model.trace(prompt, images=picture(1)):
        pattern = model.attention_probabilities[1][0]
    seen = photo.arranged(pattern[:, -1])
    assert seen.shape == (4, 4, 4)
    assert torch.equal(seen[:, 2, 3], pattern[:, -1, photo.position_of(2, 3)])
    assert torch.equal(photo.arranged(pattern, axis=1)[:, 2, 3], pattern[:, photo.position_of(2, 3)])
    with pytest.raises(InputError, match=r"values of shape \(4, 3\) have no axis -1 with a place for each position"):
        photo.arranged(pattern[:, -1, :3])
    with pytest.raises(InputError, match=r"axis=True: give the number of the axis of positions"):
        photo.arranged(pattern, axis=True)
    with pytest.raises(InputError, match=r"rows=slice\(None, None, -1\): give a slice of whole numbers, not backwards"):
        photo.region(slice(None, None, -1))
    with pytest.raises(InputError, match="none is in rows slice"):
        photo.region(slice(9, 12), slice(None))
    assert torch.equal(photo.region(columns=slice(0, 1)), photo.positions.view(4, 4)[:, 0])
