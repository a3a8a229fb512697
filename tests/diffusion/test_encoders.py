"""The standard names of a pipeline's text encoders, against what the encoders themselves give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion_pipelines import arguments, clip, loaded, quiet, stable_diffusion
from torch import Tensor

from nnatomy.diffusion import DiffusionTransformer
from nnatomy.errors import AssignmentError, LayerIndexError, NoSuchModuleError, NotInThisModelError, OutOfOrderError

ENCODERS = [
    ("stable_diffusion", "text_encoder"),  # CLIP's
    ("sd3", "text_encoder_2"),  # CLIP's with a projection
    ("flux", "text_encoder_2"),  # T5's
    ("sana", "text_encoder"),  # Gemma 2's
    ("cogview4", "text_encoder"),  # GLM's
]


@pytest.mark.parametrize(("pipeline", "name"), ENCODERS)
def test_the_stream_is_the_encoders_own(pipeline: str, name: str) -> None:
    model = loaded(pipeline)
    side = 32 if pipeline == "sana" else 16
    with model.generate(**arguments(model, height=side, width=side)):
        encoder = model[name]
        args, kwargs = encoder.inputs
        embedded = encoder.token_embeddings
        states = [encoder.layers_output[i] for i in range(len(encoder.layers_output))]
    module = model.module.get_submodule(name)
    last: list[Any] = []
    layers = next(one for one in module.modules() if isinstance(one, torch.nn.ModuleList))
    handle = layers[-1].register_forward_hook(lambda *given: last.append(given[-1]))
    with torch.no_grad():
        hidden = module(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True}).hidden_states
    handle.remove()
    of_last = last[0] if isinstance(last[0], Tensor) else last[0][0]
    expected = [*hidden[1:-1], of_last]
    assert len(states) == len(layers) == len(expected)
    assert all(torch.equal(state, one) for state, one in zip(states, expected, strict=True))
    assert embedded.shape == hidden[0].shape
    assert {row.status for row in encoder.validation if row.name == "layers_output"} == {"verified"}


def test_the_negative_prompt_is_the_second_call() -> None:
    model = loaded("stable_diffusion")
    given = arguments(model, negative_prompt="two birds in sky")
    with model.generate(**given):
        positive = model.text_encoder.layers_output[0]
        pattern = model.text_encoder.calls[1].attention_probabilities[0]
        negative = model.text_encoder.calls[1].layers_output[:]
    encoder, tokenizer = model.pipeline.text_encoder, model.pipeline.tokenizer
    for text, found in ((given["prompt"], [positive]), (given["negative_prompt"], negative)):
        ids = tokenizer(text, padding="max_length", max_length=12, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = encoder(ids, output_hidden_states=True).hidden_states
        assert torch.equal(found[0], hidden[1])
    assert not torch.equal(positive, negative[0])
    assert (pattern.sum(-1) - 1).abs().max() < 1e-5


def test_an_edit_is_what_a_hook_does() -> None:
    model = loaded("stable_diffusion")
    mlp = model.pipeline.text_encoder.encoder.layers[1].mlp
    calls: list[int] = []

    def hook(_: Any, __: Any, output: Tensor) -> Tensor | None:
        calls.append(1)
        return 0.5 * output if len(calls) == 1 else None  # the prompt's call alone

    handle = mlp.register_forward_hook(hook)
    expected = model.pipeline(**arguments(model)).images
    handle.remove()
    with model.generate(**arguments(model)) as tracer:
        model.text_encoder.mlps_output[1] = 0.5 * model.text_encoder.mlps_output[1]
        found = tracer.result.images
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.pipeline(**arguments(model)).images)

    with model.generate(**arguments(model)) as tracer:
        model.text_encoder.token_embeddings = model.text_encoder.token_embeddings.flip(1)
        flipped = tracer.result.images
    assert not torch.equal(flipped, model.pipeline(**arguments(model)).images)


def test_what_is_wrong_is_said_at_the_line() -> None:
    model = loaded("stable_diffusion")
    with pytest.raises(
        AssignmentError, match=r"text_encoder.layers_output is one for each layer: assign text_encoder.layers"
    ):
        model.text_encoder.layers_output = 3
    with pytest.raises(LayerIndexError, match=r"text_encoder.layers_output\[2\]: the model has 2 layers, 0 to 1"):
        model.text_encoder.layers_output[2]
    with pytest.raises(NoSuchModuleError, match=r"text_encoder \(CLIPTextModel\) has no submodule 'layer'"):
        model.text_encoder.layer
    with pytest.raises(NotInThisModelError, match=r"text_encoder.routers_logits\[0\]: this layer has none"):
        model.text_encoder.routers_logits[0]
    with (
        model.generate(**arguments(model)),
        pytest.raises(OutOfOrderError, match=r"text_encoder.layers_output\[0\] was asked"),
    ):
        model.latents
        model.text_encoder.layers_output[0]


def test_an_encoder_whose_names_are_not_found() -> None:
    pipeline = stable_diffusion()
    pipeline.text_encoder.encoder.layers[1] = torch.nn.Identity()
    encoder: Any = clip()
    encoder.encoder.layers = torch.nn.ModuleList()
    pipeline.register_modules(text_encoder=encoder)
    model = DiffusionTransformer(quiet(pipeline))
    with pytest.raises(
        NoSuchModuleError, match=r"text_encoder.layers_output: the encoder's names could not be found: "
    ):
        model.text_encoder.layers_output
    with model.generate(**arguments(model)):
        assert model.text_encoder.output.last_hidden_state.shape == (1, 12, 32)
