"""What an edit does: against forward hooks, the pipeline's own callback, and the formula of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusion_pipelines import ALL, PIPELINES, arguments, loaded, quiet
from PIL import Image
from torch import Tensor

from nnatomy.diffusion import DiffusionTransformer
from nnatomy.errors import (
    AssignmentError,
    InputError,
    NotInThisModelError,
    NotReachedError,
    OutOfOrderError,
    UsageError,
)


@pytest.fixture(params=list(PIPELINES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> DiffusionTransformer:
    return loaded(name)


def images(model: DiffusionTransformer, **kwargs: Any) -> Tensor:
    return model.pipeline(**arguments(model, **kwargs)).images


def test_an_edit_at_one_step_is_that_of_a_hook_in_that_call(model: DiffusionTransformer) -> None:
    layer = model.num_layers - 1
    block, calls = model.layers[layer].module, 0

    def hook(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 2:
            return None
        return (*output[:-1], 2 * output[-1]) if isinstance(output, tuple) else 2 * output

    handle = block.register_forward_hook(hook)
    expected = images(model, guided=False)
    handle.remove()
    with model.generate(**arguments(model, guided=False)) as tracer:
        for _ in tracer.iter[1]:
            model.image_layers_output[layer] = 2 * model.image_layers_output[layer]
        found = tracer.result.images
    assert torch.equal(found, expected)
    assert not torch.equal(found, images(model, guided=False))


def test_an_edit_of_a_half_leaves_the_other(model: DiffusionTransformer) -> None:
    """The unconditional prediction is the same; the guided one moves as the conditional one does, times the scale."""
    both = {}
    for shift in (0, 1):
        with model.generate(**arguments(model)) as tracer:
            for _ in tracer.iter[0]:
                conditional, unconditional = model.conditional, model.unconditional
                last = model.num_layers - 1
                stream = conditional.image_layers_output[last]  # (its size alone would be lost in the last norm)
                conditional.image_layers_output[last] = stream.roll(shift, -1)
                if model.halves.order[0] == "conditional":
                    c = conditional.noise_prediction
                    u = unconditional.noise_prediction
                else:
                    u = unconditional.noise_prediction
                    c = conditional.noise_prediction
                both[shift] = u, c, model.noise_prediction
    (u, c, n), (u2, c2, n2) = both.values()
    channels = n.shape[1]
    assert torch.equal(u, u2)
    assert not torch.allclose(c, c2, atol=1e-3)
    torch.testing.assert_close((n2 - n)[:1], 4.0 * (c2 - c)[:, :channels], atol=1e-4, rtol=1e-3)


def test_latents_assigned_are_those_of_the_pipelines_callback() -> None:
    for name in ("stable_diffusion", "sd3", "flux"):
        model = loaded(name)

        def flip(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            return {"latents": values["latents"].flip(1)} if step == 0 else values

        expected = model.pipeline(**arguments(model), callback_on_step_end=flip).images
        with model.generate(**arguments(model)) as tracer:
            for _ in tracer.iter[1]:
                model.latents = model.latents.flip(1)
            assert torch.equal(tracer.result.images, expected), name


def test_the_first_latents_are_those_that_a_pipeline_is_given() -> None:
    model = loaded("stable_diffusion")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    with model.generate(**arguments(model)) as tracer:
        model.latents = latents
        found = tracer.result.images
    assert torch.equal(found, images(model, latents=latents))


def test_a_pattern_assigned_is_what_multiplies_the_values(model: DiffusionTransformer) -> None:
    """Every query attends to the first key alone: each head gives that key's value."""
    with model.generate(**arguments(model, steps=1, guided=False)):
        values = model.values[0]
        pattern = torch.zeros_like(model.attention_probabilities[0])
        pattern[..., 0] = 1
        model.attention_probabilities[0] = pattern
        heads = model.heads_output[0]
    torch.testing.assert_close(heads, values[:, :, :1].transpose(1, 2).expand_as(heads))


def test_lasting_edits_are_made_in_every_step(model: DiffusionTransformer) -> None:
    def edit() -> None:
        half = model.conditional
        half.heads_output[1] = torch.zeros_like(half.heads_output[1])

    edited = model.edit(edit)
    with model.generate(**arguments(model)) as tracer:
        for _ in tracer.iter[:]:
            edit()
        expected = tracer.result.images
    assert torch.equal(edited(**arguments(model)).images, expected)
    assert not torch.equal(expected, images(model))
    assert torch.equal(edited.without_edits()(**arguments(model)).images, images(model))


def test_stopping_early_makes_no_more_calls(model: DiffusionTransformer) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.denoiser.register_forward_hook(count)
    with model.generate(**arguments(model, guided=False)) as tracer:
        for step in tracer.iter[:]:
            prediction = model.noise_prediction
            if step == 1:
                tracer.stop()
                break
    handle.remove()
    assert calls == 2
    assert prediction.isfinite().all()
    with pytest.raises(NotReachedError, match="The forward pass was stopped"):
        tracer.result


def test_the_pipeline_is_left_as_it_was(model: DiffusionTransformer) -> None:
    pipeline = model.pipeline
    hooks = [dict(module._forward_hooks) for module in model.module.modules()]
    before, timesteps = dict(pipeline.__dict__), pipeline.scheduler.timesteps.clone()
    with model.generate(**arguments(model, steps=2)) as tracer:
        for _ in tracer.iter[:]:
            model.noise_prediction = 0 * model.noise_prediction
    assert pipeline.__dict__ == before
    assert torch.equal(pipeline.scheduler.timesteps, timesteps)
    assert "step" not in vars(pipeline.scheduler)
    assert [dict(module._forward_hooks) for module in model.module.modules()] == hooks


def test_text_encoders_belong_to_the_first_step_and_the_decoder_to_the_last() -> None:
    model = loaded("stable_diffusion")
    decoded: list[Tensor] = []
    handle = model.pipeline.vae.decoder.register_forward_hook(lambda *args: decoded.append(args[-1]))
    expected = images(model, output_type="pt")
    handle.remove()
    with model.generate(**arguments(model, output_type="pt")) as tracer:
        prompt = model.text_encoder.output.last_hidden_state
        negative = model.text_encoder.calls[1].output.last_hidden_state
        for step in tracer.iter[:]:
            if step == model.steps - 1:
                pixels = model.vae.decoder.output
        assert torch.equal(tracer.result.images, expected)
    assert torch.equal(pixels, decoded[0])
    ids = model.pipeline.tokenizer("a photo of a cat", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(prompt, model.pipeline.text_encoder(ids).last_hidden_state)
    assert not torch.equal(prompt, negative)


def test_several_prompts_and_pictures_of_each() -> None:
    model = loaded("stable_diffusion")
    given = arguments(model, num_images_per_prompt=2)
    given["prompt"] = ["a photo of a cat", "two birds"]
    with model.generate(**given):
        conditional = model.conditional.layers_output[0]
        whole = model.layers_output[1]
    assert (len(conditional), len(whole)) == (4, 8)
    with pytest.raises(UsageError, match="give them as a list"), model.generate(**given) as tracer:
        tracer.invoke("another")


def test_what_is_asked_too_late_or_does_not_fit_is_refused() -> None:
    model = loaded("stable_diffusion")
    with model.generate(**arguments(model)) as tracer:
        for _ in tracer.iter[0]:
            model.layers_output[2]
            with pytest.raises(OutOfOrderError, match=r"layers_output\[0\] was asked for at .*test_edits.py"):
                model.layers_output[0]
            with pytest.raises(AssignmentError, match="give it the shape"):
                model.layers_output[3] = torch.zeros(1, 2)
            with pytest.raises(AssignmentError, match="is one for each layer"):
                model.layers_output = torch.zeros(1)  # type: ignore[assignment]
            with pytest.raises(NotInThisModelError, match=r"text_layers_output\[0\]: the block has one stream"):
                model.text_layers_output[0]


def test_a_half_that_is_not_there_is_refused() -> None:
    model = loaded("stable_diffusion")
    with model.generate(**arguments(model, guided=False)):
        assert torch.equal(model.conditional.layers_input[0], model.layers_input[0])
    with (
        pytest.raises(NotReachedError, match="this run has no guidance.*guidance_scale above 1"),
        model.generate(**arguments(model, guided=False)),
    ):
        model.unconditional.layers_output[0]


def test_a_step_as_a_whole_is_refused_where_the_halves_are_calls_of_their_own() -> None:
    model = loaded("flux")
    with (
        pytest.raises(Exception, match="model.conditional or model.unconditional"),
        model.generate(**arguments(model)) as tracer,
    ):
        for _ in tracer.iter[:]:
            model.image_layers_output[0]


def test_the_halves_of_several_videos_of_a_prompt() -> None:
    model = loaded("ltx")
    size = {"height": 32, "width": 32, "num_frames": 9, "steps": 1, "num_videos_per_prompt": 2}
    for guided in (True, False):
        given: list[Tensor] = []
        handle = model.layers[0].module.register_forward_hook(lambda *args, given=given: given.append(args[-1]))
        images_of(model, guided=guided, **size)
        handle.remove()
        with model.generate(**arguments(model, guided=guided, **size)):
            found = model.conditional.layers_output[0]
        assert len(given[0]) == (4 if guided else 2)
        assert torch.equal(found, given[0][-2:])


def images_of(model: DiffusionTransformer, **kwargs: Any) -> Any:
    return model.pipeline(**arguments(model, **kwargs))


def test_latents_that_a_callback_changes_are_those_of_the_next_step() -> None:
    """As the denoiser is given them; and the picture is the pipeline's own."""
    for name in ("stable_diffusion", "flux"):
        model = loaded(name)

        def flip(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            return {"latents": values["latents"].flip(1)} if step == 0 else {}

        given: list[Tensor] = []
        handle = model.denoiser.register_forward_pre_hook(
            lambda _, args, kwargs, given=given: given.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        expected = images(model, guided=False, callback_on_step_end=flip)
        handle.remove()
        with model.generate(**arguments(model, guided=False), callback_on_step_end=flip) as tracer:
            found = [model.latents for _ in tracer.iter[:]]
            result = tracer.result.images
        assert torch.equal(result, expected)
        assert len(found) == len(given) == 3
        assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))


def test_callbacks_of_diffusers_own_and_those_that_give_nothing() -> None:
    model = loaded("stable_diffusion")

    def cutoff() -> Any:
        return SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)

    expected = images(model, callback_on_step_end=cutoff())
    with model.generate(**arguments(model), callback_on_step_end=cutoff()) as tracer:
        rows = [len(model.layers_output[0]) for _ in tracer.iter[:]]
        assert torch.equal(tracer.result.images, expected)
    assert rows == [2, 2, 1]
    with pytest.raises(
        InputError, match=r"^callback_on_step_end gives a NoneType, .* return the one that it is given, or \{\}"
    ):
        model.generate(**arguments(model), callback_on_step_end=lambda *_: None).run()


def test_what_both_halves_have_is_not_assigned_on_one() -> None:
    model = loaded("stable_diffusion")
    with model.generate(**arguments(model)):
        with pytest.raises(
            AssignmentError, match=r"conditional\.latents is the other half's, too.*assign model\.latents"
        ):
            model.conditional.latents = torch.zeros_like(model.latents)
        with pytest.raises(
            AssignmentError, match=r"unconditional\.timestep is the other half's, too.* model\.timestep"
        ):
            model.unconditional.timestep = model.unconditional.timestep + 1
    with model.generate(**arguments(model, guided=False)):
        with pytest.raises(NotReachedError, match=r"unconditional\.timestep: this run has no guidance"):
            model.unconditional.timestep
        model.conditional.timestep = model.conditional.timestep + 0


def test_how_many_steps_there_are_where_a_pipeline_begins_with_a_picture() -> None:
    """It takes the last of the timesteps alone, which nobody knows before it has cut them off."""
    parts = {**ALL["stable_diffusion"]().components, "requires_safety_checker": False}
    model = DiffusionTransformer(quiet(StableDiffusionImg2ImgPipeline(**parts)), validate=False)
    given = {"image": Image.new("RGB", (16, 16)), "num_inference_steps": 4, "strength": 0.5}
    with model.generate("a cat", **given) as tracer:
        for step in tracer.iter[:]:
            model.latents
            if step == 0:
                with pytest.raises(NotReachedError, match="behind a value of the denoiser's"):
                    model.steps
            model.layers_output[0]
            assert model.steps == 2


def test_where_the_text_stands_in_halves_with_texts_of_different_lengths() -> None:
    model = loaded("qwen_image")
    given = arguments(model, negative_prompt="two birds in the sky on the big red table")
    lengths: list[int] = []
    handle = model.layers[0].module.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    model.pipeline(**given)
    handle.remove()
    found: list[int] = []
    with model.generate(**arguments(model, negative_prompt=given["negative_prompt"])) as tracer:
        for _ in tracer.iter[:]:
            for half in (model.conditional, model.unconditional):
                before = half.text_tokens(1)
                half.attention_probabilities[1]
                assert half.text_tokens(1) == before
                found.append(before.stop - before.start)
    assert found == lengths
    assert len(set(lengths)) == 2
    with (
        pytest.raises(InputError, match=r"^text_tokens\(1\) was asked for, and the halves .* of different lengths"),
        model.generate(**given) as tracer,
    ):
        for _ in tracer.iter[:]:
            model.text_tokens(1)
            model.unconditional.attention_probabilities[1]
