"""Ablating a direction, against projections taken out by plain hooks, and by what is left in the stream."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from architectures import PLACES, prompt_ids, shared
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import ablate_direction, activation_patching, logit_difference

TYPES = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "gptj", "falcon", "olmo2")
ZOO = ("falcon_h1", "jamba", "qwen3_next", "nemotron_h")


def build(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo.build(model_type) if model_type in ZOO else shared(model_type))


def random_direction(model: StandardizedTransformer) -> Tensor:
    return 3 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))


def without(unit: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden - (hidden @ unit)[..., None] * unit


@pytest.mark.parametrize("model_type", [*TYPES, *ZOO])
@torch.no_grad()
def test_nothing_in_the_stream_lies_along_it_in_any_layer(model_type: str) -> None:
    model = build(model_type)
    direction = random_direction(model)
    unit = direction / direction.norm()
    ids = prompt_ids() % 40 + 16
    edited = model.edit(lambda: ablate_direction(model, direction))
    assert (edited(ids).logits - model(ids).logits).abs().max() > 0.01
    with edited.trace(ids):
        left = [
            (value @ unit).abs().max() / value.norm(dim=-1).max()
            for pair in zip(model.layers_input, model.layers_output, strict=True)
            for value in pair
        ]
    assert len(left) == 2 * model.num_layers
    assert max(left) < 1e-6


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_it_is_what_plain_hooks_do_at_each_layers_input_and_output(model_type: str) -> None:
    model, hf = build(model_type), shared(model_type)
    unit = random_direction(model) / random_direction(model).norm()
    ids, take_out = prompt_ids(), without(unit)

    def pre(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (take_out(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": take_out(kwargs["hidden_states"])}

    def post(_: nn.Module, __: Any, output: Any) -> Any:
        return take_out(output) if isinstance(output, Tensor) else (take_out(output[0]), *output[1:])

    handles = []
    for layer in hf.get_submodule(PLACES[model_type][0]):
        handles += [layer.register_forward_pre_hook(pre, with_kwargs=True), layer.register_forward_hook(post)]
    expected = hf(ids).logits
    for handle in handles:
        handle.remove()
    with model.trace(ids):
        ablate_direction(model, random_direction(model), points=("layers_input", "layers_output"))
        logits = model.logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_the_mlp_reads_has_nothing_of_it_either() -> None:
    """Written out for GPT-2: the embedding, each attention and each MLP write nothing along it."""
    model, hf = build("gpt2"), shared("gpt2")
    unit = random_direction(model) / random_direction(model).norm()
    take_out, ids = without(unit), prompt_ids()
    handles = [hf.transformer.drop.register_forward_hook(lambda _, __, output: take_out(output))]
    for layer in hf.transformer.h:
        handles.append(layer.mlp.register_forward_hook(lambda _, __, output: take_out(output)))
        handles.append(layer.attn.register_forward_hook(lambda _, __, output: (take_out(output[0]), *output[1:])))
    expected = hf(ids).logits
    for handle in handles:
        handle.remove()
    with model.trace(ids):
        ablate_direction(model, random_direction(model))
        logits = model.logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_some_layers_and_while_generating() -> None:
    model = build("llama")
    direction = random_direction(model)
    unit = direction / direction.norm()
    steps = []
    edited = model.edit(lambda: ablate_direction(model, direction, layers=[-1, 0]))
    with edited.generate(prompt_ids(), max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            steps.append([float((value @ unit).abs().max()) for value in model.layers_output[:]])
    assert len(steps) == 3
    for one, other, last in steps:
        assert one < 1e-5
        assert last < 1e-5
        assert other > 0.01


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
@torch.no_grad()
def test_without_what_asks_for_the_continent_the_capital_is_known_still(name: str) -> None:
    """On a demo model: the direction from one question to the other is what asks for a continent."""
    model = StandardizedTransformer(name)
    countries = ("France", "Italy", "Spain", "Germany", "Poland", "Egypt", "Kenya", "Peru", "Japan", "China")
    capitals, continents = (
        [f"The {what} of {country} is" for country in countries] for what in ("capital", "continent")
    )

    def right(prompts: list[str], edited: Any) -> float:
        return float(
            (edited(prompts).logits[:, -1].argmax(-1) == model(prompts).logits[:, -1].argmax(-1)).float().mean()
        )

    with model.trace(continents):
        direction = model.layers_output[2][:, -1].mean(0)
    with model.trace(capitals):
        direction = direction - model.layers_output[2][:, -1].mean(0)
    edited = model.edit(lambda: ablate_direction(model, direction))
    assert (right(continents, edited), right(capitals, edited)) == (0, 1)
    edited = model.edit(lambda: ablate_direction(model, random_direction(model)))
    assert (right(continents, edited), right(capitals, edited)) == (1, 1)


def test_errors() -> None:
    model = build("llama")
    text = "The direction is of shape (16,), the model's residual stream of width 32."
    with pytest.raises(InputError, match=re.escape(text)), model.trace(prompt_ids()):
        ablate_direction(model, torch.ones(16))
    with pytest.raises(InputError, match=re.escape("The direction is zero.")), model.trace(prompt_ids()):
        ablate_direction(model, torch.zeros(32))
    with (
        pytest.raises(LayerIndexError, match=re.escape("the model has 3 layers, 0 to 2.")),
        model.trace(prompt_ids()),
    ):
        ablate_direction(model, torch.ones(32), layers=[3])
    lfm2 = StandardizedTransformer(zoo.build("lfm2"))
    with pytest.raises(NotInThisModelError, match="this layer has none"), lfm2.trace(prompt_ids()):
        ablate_direction(lfm2, torch.ones(lfm2.hidden_size), points=["attentions_contribution"])


def test_one_layer_may_be_given_as_a_number() -> None:
    model, logits = StandardizedTransformer(shared("llama")), []
    direction = torch.linspace(-1, 1, 32)
    for layers in (1, [1], None):
        with torch.no_grad(), model.trace([[3, 5, 7]]):
            ablate_direction(model, direction, layers=layers)
            logits.append(model.logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_patching_in_a_view_without_a_direction() -> None:
    """Layers before the patched one cannot be skipped there: the edit asks for what they add."""
    model = StandardizedTransformer("demo:llama")
    edited = model.edit(lambda: ablate_direction(model, random_direction(model)))
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    metric = logit_difference([" Paris"], [" Rome"], model)
    for point in ("layers_output", "mlps_contribution", "layers_input"):
        found = activation_patching(
            edited, clean=clean, corrupted=corrupted, metric=metric, point=point, progress=False
        )
        accessor = getattr(edited, point)
        with torch.no_grad():
            with edited.trace(clean):
                value = accessor[3][:, 3].clone()
            with edited.trace(corrupted):
                new = accessor[3].clone()
                new[:, 3] = value
                accessor[3] = new
                logits = edited.logits[:, -1]
        assert torch.allclose(found.effect[3, 3], metric(logits), atol=1e-3)
