"""Integrated gradients against plain hooks and autograd, and by what they must add up to."""

from __future__ import annotations

import pytest
import torch
from architectures import prompt_ids
from attribution_reference import PLACES, TYPES, ids, metric, shared, with_gradients
from reference import edited
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import attribution_patching, integrated_gradients

CLEAN, CORRUPTED = 0, 1


@pytest.mark.parametrize("point", ["layers_output", "heads_output"])
@pytest.mark.parametrize("model_type", TYPES)
def test_each_is_the_mean_gradient_on_the_way(model_type: str, point: str) -> None:
    hf, place = shared(model_type), PLACES[model_type]
    layers = list(hf.get_submodule(place.layers))
    steps, expected = 4, []
    for layer in layers[:2]:
        where: tuple[nn.Module, str] = (layer, "output")
        if point == "heads_output":
            where = layer.get_submodule(place.projection), "input"
        points = {"here": where}
        clean = with_gradients(hf, ids(model_type, CLEAN), points)[0]["here"]
        corrupted = with_gradients(hf, ids(model_type, CORRUPTED), points)[0]["here"]
        total = torch.zeros_like(clean)
        for k in range(steps):
            share = (k + 0.5) / steps
            at = torch.lerp(corrupted, clean, share)
            _, gradients, _ = with_gradients(
                hf,
                ids(model_type, CORRUPTED),
                points,
                put=lambda _, x, at=at: x * 0 + at,  # type: ignore[misc]
            )
            total += gradients["here"] * (clean - corrupted) / steps
        if point == "heads_output":
            total = total.unflatten(-1, (hf.config.num_attention_heads, -1))
        expected.append(total.sum(-1))
    found = integrated_gradients(
        StandardizedTransformer(hf),
        ids(model_type, CLEAN),
        ids(model_type, CORRUPTED),
        metric=metric,
        point=point,
        layers=[0, 1],
        steps=steps,
    )
    assert torch.allclose(found.effect, torch.stack(expected, 1), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("point", ["layers_output", "mlps_output"])
def test_the_effects_add_up_to_what_patching_the_whole_layer_does(point: str) -> None:
    """Completeness; of the stream it is all that is between the two runs."""
    hf = shared("gpt2")
    model = StandardizedTransformer(hf)
    clean, corrupted = prompt_ids(seed=CLEAN), prompt_ids(seed=CORRUPTED)
    few, many = (integrated_gradients(model, clean, corrupted, metric=metric, point=point, steps=n) for n in (2, 200))
    for i, layer in enumerate(hf.transformer.h):
        module = layer if point == "layers_output" else layer.mlp
        kept: list[Tensor] = []
        edited(lambda: hf(clean), module, "output", lambda x, kept=kept: kept.append(x) or x)  # type: ignore[misc]
        patched = edited(lambda: hf(corrupted), module, "output", lambda _, kept=kept: kept[0])  # type: ignore[misc]
        change = metric(patched.logits[:, -1]) - few.corrupted
        if point == "layers_output":
            assert torch.allclose(change, few.clean - few.corrupted, atol=1e-4)
        errors = [float((found.effect[:, i].sum(-1) - change).abs().max()) for found in (few, many)]
        assert errors[1] < 1e-3
        assert errors[1] < errors[0] / 5


def test_for_a_metric_that_is_linear_one_step_is_attribution_patching() -> None:
    """The last stream without the final norm: its scale is held by the metric, which reads nothing of the head."""
    model = StandardizedTransformer(shared("llama"))
    kept: list[Tensor] = []
    handle = model.hf_model.model.norm.register_forward_hook(lambda _m, args, _o: kept.append(args[0]))

    def first_entry(_: Tensor) -> Tensor:
        return kept[-1][:, -1, 0]

    clean, corrupted = prompt_ids(seed=CLEAN), prompt_ids(seed=CORRUPTED)
    last = model.num_layers - 1
    one = integrated_gradients(model, clean, corrupted, metric=first_entry, layers=last, steps=1)
    other = attribution_patching(model, clean, corrupted, metric=first_entry, layers=last)
    handle.remove()
    assert torch.allclose(one.effect, other.effect, atol=1e-6)
    assert torch.allclose(one.effect.sum((1, 2)), one.clean - one.corrupted, atol=1e-5)


def test_scores_that_are_masked() -> None:
    model = StandardizedTransformer(shared("llama"))
    clean, corrupted = prompt_ids(seed=CLEAN), prompt_ids(seed=CORRUPTED)
    found = integrated_gradients(model, clean, corrupted, metric=metric, point="attention_scores", layers=1, steps=2)
    assert bool(found.effect.isfinite().all())
    assert float(found.effect.abs().max()) > 1e-3


def test_no_steps_are_refused() -> None:
    model = StandardizedTransformer(shared("llama"))
    with pytest.raises(InputError, match="steps=0: it is a whole number, 1 or more"):
        integrated_gradients(model, prompt_ids(), prompt_ids(), metric=metric, steps=0)


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_the_country_counts_early_and_the_last_token_late(name: str) -> None:
    model = StandardizedTransformer(name)
    right, wrong = (model.tokenizer.encode(token)[0] for token in (" Tokyo", " Cairo"))
    found = integrated_gradients(
        model,
        "The capital of Japan is",
        "The capital of Egypt is",
        metric=lambda logits: logits[:, right] - logits[:, wrong],
        steps=32,
    )
    share = found.normalized[0]
    assert torch.allclose(share.sum(-1), torch.ones(model.num_layers), atol=0.05)
    assert int(share[0].argmax()) == 3
    assert float(share[0, 3]) > 0.75
    assert float(share[-1, 4]) > 0.99
