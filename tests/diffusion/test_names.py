"""What each name gives, against plain hooks on the pipeline's own modules, naive attention, and runs of the pipeline by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusion_pipelines import PIPELINES, arguments, loaded, quiet
from torch import Tensor

from nnatomy.diffusion import DiffusionTransformer
from nnatomy.diffusion.names import OF_LAYERS
from nnatomy.errors import NotInThisModelError

NAMES = list(PIPELINES)
#: The names in the order in which a block computes them.
IN_ORDER = (
    *("layers_input", "image_layers_input", "text_layers_input", "modulation", "text_modulation"),
    *("queries", "keys", "values", "attention_probabilities", "heads_output"),
    *("cross_keys", "cross_values", "cross_attention_probabilities", "cross_heads_output"),
    *("layers_output", "image_layers_output", "text_layers_output"),
)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> DiffusionTransformer:
    return loaded(name)


@contextmanager
def hooked(modules: Any, hook: Any) -> Iterator[None]:
    """Plain hooks of PyTorch's, within."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_outputs(model: DiffusionTransformer, **kwargs: Any) -> list[tuple[Any, Any, Any, Any]]:
    """(block, args, kwargs, output) of each call of a block, in a run without this library."""
    calls: list[Any] = []
    modules = [view.module for view in model.layers]
    with hooked(modules, lambda module, args, kwargs, output: calls.append((module, args, kwargs, output))):
        model.pipeline(**arguments(model, **kwargs))
    return calls


def test_every_name_is_tested() -> None:
    assert sorted(IN_ORDER) == sorted(OF_LAYERS)


def test_reading_every_name_in_every_step_leaves_the_picture_as_it_was(model: DiffusionTransformer) -> None:
    expected = model.pipeline(**arguments(model)).images
    half = model.conditional
    count = 0
    with model.generate(**arguments(model)) as tracer:
        for step in tracer.iter[:]:
            if step or model.pipeline.__class__.__name__ != "DiTPipeline":
                assert model.latents.isfinite().all()
            assert half.timestep is not None
            for i in range(model.num_layers):
                for one in IN_ORDER:
                    accessor = getattr(half, one)
                    if i in accessor.layers:
                        assert accessor[i].isfinite().all()
                        count += 1
            assert model.noise_prediction.isfinite().all()
            assert model.steps == 3
        result = tracer.result
    assert count >= 3 * 8 * model.num_layers
    assert torch.equal(result.images, expected)


def test_streams_are_what_hooks_see(model: DiffusionTransformer) -> None:
    """The last of what a block returns is the picture's stream, in all of these; the first is the text's where there are two."""
    calls = blocks_outputs(model, guided=False)
    found: list[tuple[Tensor, Tensor | None]] = []
    with model.generate(**arguments(model, guided=False)) as tracer:
        for _ in tracer.iter[:]:
            for i in range(model.num_layers):
                image = model.image_layers_output[i]
                found.append((image, model.text_layers_output[i] if i in model.text_layers_output.layers else None))
    assert len(found) == len(calls) == 3 * model.num_layers
    for (image, text), (_, _, _, output) in zip(found, calls, strict=True):
        outputs = output if isinstance(output, tuple) else (output,)
        assert torch.equal(image, outputs[-1])
        if text is not None:
            assert torch.equal(text, outputs[0])


def test_patterns_are_those_of_naive_attention(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[Tensor] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def naive(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        expected.append(scores.softmax(-1))
        return sdpa(query, key, value, attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", naive)
        inside: list[list[Tensor]] = []

        def keep(*_: Any) -> None:
            inside.append(expected.copy())
            expected.clear()

        with hooked([view.module for view in model.layers], keep):
            handles = [view.module.register_forward_pre_hook(lambda *_: expected.clear()) for view in model.layers]
            model.pipeline(**arguments(model, steps=1, guided=False))
        for handle in handles:
            handle.remove()
    with model.generate(**arguments(model, steps=1, guided=False)):
        for i in range(model.num_layers):
            own = [model.attention_probabilities[i]]
            if i in model.cross_attention_probabilities.layers:
                own.append(model.cross_attention_probabilities[i])
            assert len(own) == len(inside[i])
            for one, other in zip(own, inside[i], strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_patterns_are_those_of_diffusers_processor_without_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AttnProcessor` computes them itself; on such a pipeline the names find them in its own products."""
    sdpa = loaded("stable_diffusion")
    eager = DiffusionTransformer(quiet(PIPELINES["stable_diffusion"]()))
    eager.pipeline.unet.set_attn_processor(AttnProcessor())
    eager = DiffusionTransformer(eager.pipeline)
    weights: dict[Any, Tensor] = {}
    own = Attention.get_attention_scores

    def kept(self: Attention, *args: Any) -> Tensor:
        weights[self] = own(self, *args)
        return weights[self]

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "get_attention_scores", kept)
        eager.pipeline(**arguments(eager, steps=1))
    read = {}
    for one in (sdpa, eager):
        with one.generate(**arguments(one, steps=1)):
            read[one] = [
                (one.attention_probabilities[i], one.cross_attention_probabilities[i]) for i in range(one.num_layers)
            ]
    for i, view in enumerate(eager.layers):
        for j, attention in enumerate((view.module.attn1, view.module.attn2)):
            expected = weights[attention].unflatten(0, (-1, attention.heads))
            torch.testing.assert_close(read[eager][i][j], expected)
            torch.testing.assert_close(read[sdpa][i][j], expected, atol=1e-5, rtol=1e-4)


def test_halves_are_what_the_denoiser_says_with_the_prompt_and_without(model: DiffusionTransformer) -> None:
    """In the first step, where all runs have the same latents: without guidance the prediction is that of one prompt alone."""
    found: dict[str, Tensor] = {}
    with model.generate(**arguments(model)):
        for half in model.halves.order:
            found[half] = getattr(model, half).noise_prediction
        guided = model.noise_prediction
    channels = guided.shape[1]
    u, c = found["unconditional"][:, :channels], found["conditional"][:, :channels]
    torch.testing.assert_close(guided[:1], u + 4.0 * (c - u), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(u, c, atol=1e-3)

    def alone(**more: Any) -> Tensor:
        if model.halves.how == "calls":
            more["guidance_scale"] = 4.0  # this one is told to the denoiser, in both calls
        with model.generate(**arguments(model, guided=False, **more)):
            return model.noise_prediction

    torch.testing.assert_close(c, alone(), atol=1e-4, rtol=1e-3)
    if "prompt" in arguments(model):
        torch.testing.assert_close(
            u, alone(prompt="two birds" if model.halves.how == "calls" else ""), atol=1e-4, rtol=1e-3
        )


def test_latents_are_what_the_pipelines_callback_is_given() -> None:
    for name in ("stable_diffusion", "sd3", "flux"):
        model = loaded(name)
        seen: list[Tensor] = []

        def note(_: Any, step: int, timestep: Any, values: dict[str, Any], seen: Any = seen) -> dict[str, Any]:
            seen.append(values["latents"])
            return values

        model.pipeline(**arguments(model), callback_on_step_end=note)
        with model.generate(**arguments(model)) as tracer:
            latents = [model.latents for _ in tracer.iter[:]]
        assert len(latents) == len(seen) == 3
        for mine, theirs in zip(latents[1:], seen, strict=False):
            assert torch.equal(mine, theirs)


def test_modulation_is_what_its_linear_gives() -> None:
    model = loaded("flux")
    found: dict[Any, Tensor] = {}
    linears = [
        view.module.norm1.linear if hasattr(view.module, "norm1") else view.module.norm.linear for view in model.layers
    ]
    texts = [view.module.norm1_context.linear for view in model.layers[:2]]
    with hooked([*linears, *texts], lambda module, _, __, output: found.update({module: output})):
        model.pipeline(**arguments(model, steps=1, guided=False))
    with model.generate(**arguments(model, steps=1, guided=False)):
        for i, linear in enumerate(linears):
            image = model.modulation[i]
            assert image.shape[1:] == (6 if i < 2 else 3, 32)
            assert torch.equal(image.flatten(1), found[linear])
            if i < 2:
                assert torch.equal(model.text_modulation[i].flatten(1), found[texts[i]])


@pytest.mark.parametrize("name", ["sd3", "flux"], ids=["picture first", "text first"])
def test_text_tokens_are_where_the_text_stands_in_the_joint_pattern(name: str) -> None:
    model = loaded(name)
    with model.generate(**arguments(model, steps=1, guided=False)):
        image, text = model.image_layers_input[0].shape[1], model.text_layers_input[0].shape[1]
        pattern = model.attention_probabilities[0]
        found = model.text_tokens(0)
    assert pattern.shape[-1] == image + text
    assert found == (slice(image, image + text) if name == "sd3" else slice(0, text))


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_halves_of_pipelines_that_guide_by_another_formula(name: str) -> None:
    """Qwen-Image gives the guided prediction the length of that with the prompt; Z-Image's denoiser gives a list of predictions."""
    model = loaded(name)
    negative = {"negative_prompt": "two birds"}
    outputs: list[Any] = []
    with hooked([model.denoiser], lambda *seen: outputs.append(seen[-1][0])):
        expected = model.pipeline(**arguments(model, steps=1, **negative)).images
    c, u = outputs if name == "qwen_image" else [one[None] for one in outputs[0]]
    with model.generate(**arguments(model, steps=1, **negative)) as tracer:
        prompted = model.conditional.noise_prediction
        without = model.unconditional.noise_prediction
        guided = model.noise_prediction
        assert torch.equal(tracer.result.images, expected)
    assert torch.equal(prompted, c)
    assert torch.equal(without, u)
    assert not torch.allclose(c, u, atol=1e-3)
    naive = u + 4.0 * (c - u)
    naive = naive * c.norm(dim=-1, keepdim=True) / naive.norm(dim=-1, keepdim=True)
    if name == "z_image":
        naive = -(c + 4.0 * (c - u)).squeeze(2)
    torch.testing.assert_close(guided, naive, atol=1e-5, rtol=1e-4)

    with model.generate(**arguments(model, steps=1, **negative)) as tracer:
        model.unconditional.noise_prediction = c  # so that there is nothing to guide away from
        guided = model.noise_prediction
    torch.testing.assert_close(guided, c if name == "qwen_image" else -c.squeeze(2), atol=1e-5, rtol=1e-4)


def test_a_stream_is_the_pictures_only_where_that_shows() -> None:
    """Z-Image's blocks have one stream each: of the picture, of the text, of both. Its text has a name of its own."""
    model = loaded("z_image")
    assert model.layers_output.layers == (0, 1, 2, 3)
    with pytest.raises(
        NotInThisModelError, match="picture and text are in one stream, or nothing shows whose it is: layers_o"
    ):
        model.image_layers_output[1]
