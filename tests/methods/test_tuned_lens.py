"""The tuned lens: one step against a naive one, what training gains, and what is written to a file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PLACES, build, prompt_ids
from architectures import shared as shared_tiny
from reference import edited, hooked
from safetensors.torch import save_file
from torch import Tensor
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import Prompt, TunedLens, lens_statistics, logit_lens

HYBRID = "qwen3_next"
SOME = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "opt", HYBRID)
demo = functools.cache(lambda name: StandardizedTransformer(f"demo:{name}"))
COUNTRIES = (
    "France",
    "Italy",
    "Spain",
    "Germany",
    "Poland",
    "Egypt",
    "Kenya",
    "Peru",
    "Japan",
    "China",
    "India",
    "Norway",
)
HELD_OUT = [f"The capital of {country} is" for country in ("Sweden", "Greece", "Hungary", "Portugal")]


def texts() -> list[str]:
    phrases = (
        "The capital of {} is",
        "The language of {} is",
        "The currency of {} is the",
        "The continent of {} is",
    )
    return [phrase.format(country) for country in COUNTRIES for phrase in phrases]


def shared(model_type: str) -> Any:
    return zoo_shared(model_type) if model_type == HYBRID else shared_tiny(model_type)


def layers_of(model_type: str) -> list[Any]:
    path = "model.layers" if model_type == HYBRID else PLACES[model_type][0]
    return list(shared(model_type).get_submodule(path))


def some_lens(layers: list[Any]) -> TunedLens:
    torch.manual_seed(0)
    return TunedLens(0.1 * torch.randn(len(layers) - 1, 32, 32), 0.1 * torch.randn(len(layers) - 1, 32))


def naive_step(model_type: str, prompts: list[list[int]], weight: Tensor, bias: Tensor, lr: float) -> list[Tensor]:
    """One step of gradient descent: each prompt alone, each layer's stream in the last layer's place, by plain hooks."""
    hf = shared(model_type)
    layers = layers_of(model_type)
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    total, tokens = torch.zeros(()), sum(map(len, prompts))
    for prompt in prompts:
        ids = torch.tensor([prompt])
        hidden = hooked(hf, lambda i=ids: hf(i), {j: (m, "output") for j, m in enumerate(layers)})  # type: ignore[misc]
        with torch.no_grad():
            p = hf(ids).logits.softmax(-1)
        for j in range(len(layers) - 1):
            moved = hidden[j] + hidden[j] @ weight[j].T + bias[j]
            handle = layers[-1].register_forward_hook(
                lambda _, __, out, moved=moved: moved if isinstance(out, Tensor) else (moved, *out[1:])
            )
            q = hf(ids).logits.log_softmax(-1)
            handle.remove()
            total = total + (p * (p.log() - q)).sum() / tokens
    gradients = torch.autograd.grad(total, [weight, bias])
    return [(one - lr * gradient).detach() for one, gradient in zip((weight, bias), gradients, strict=True)]


@pytest.mark.parametrize("model_type", SOME)
def test_one_step_is_the_naive_one(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    prompts = [prompt_ids(1, n, seed=n)[0].tolist() for n in (5, 8)]
    model.hf_model.zero_grad()  # what other tests have left on the model they share
    start = some_lens(layers_of(model_type))
    expected = naive_step(model_type, prompts, start.weight, start.bias, 0.5)
    lens = TunedLens.train(
        model, prompts, steps=1, batch_size=2, start=start, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )
    torch.testing.assert_close(lens.weight, expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lens.bias, expected[1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(lens.weight, start.weight)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


@pytest.mark.parametrize("model_type", SOME)
def test_what_the_lens_shows_is_the_translated_stream(model_type: str) -> None:
    hf, ids, layers = shared(model_type), prompt_ids(), layers_of(model_type)
    lens = some_lens(layers)
    probs = logit_lens(StandardizedTransformer(hf), ids, lens=lens)
    hidden = hooked(hf, lambda: hf(ids), {i: (layer, "output") for i, layer in enumerate(layers)})
    for i in range(len(layers)):
        h = hidden[i] if i == len(layers) - 1 else hidden[i] + hidden[i] @ lens.weight[i].T + lens.bias[i]
        logits = edited(lambda: hf(ids), layers[-1], "output", lambda _, h=h: h).logits  # type: ignore[misc]
        torch.testing.assert_close(probs[:, i], logits[:, -1].softmax(-1), rtol=1e-3, atol=2e-5)


def test_untrained_it_is_the_logit_lens() -> None:
    model = demo("gpt2")
    assert torch.equal(logit_lens(model, HELD_OUT, lens=TunedLens.identity(model)), logit_lens(model, HELD_OUT))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_is_nearer_to_the_models_prediction_than_the_logit_lens(name: str) -> None:
    """On facts about countries that the lens was not trained on."""
    model = demo(name)
    lens = TunedLens.train(model, texts(), steps=60, batch_size=16)
    plain = lens_statistics(model, HELD_OUT).kl[:, :-1].nanmean((0, 2))
    tuned = lens_statistics(model, HELD_OUT, lens=lens).kl[:, :-1].nanmean((0, 2))
    assert (tuned < plain).all()
    assert tuned.mean() < 0.7 * plain.mean()
    assert lens.history is not None
    assert lens.history.shape == (60, model.num_layers - 1)
    assert (lens.history[-1] < lens.history[0]).all()


def test_training_is_drawn() -> None:
    lens = TunedLens(torch.zeros(2, 4, 4), torch.zeros(2, 4), torch.tensor([[3.0, 1.0], [2.0, 0.5]]))
    assert [(list(line.x), list(line.y)) for line in lens.plot().data] == [
        ([0, 1], [3, 2]),
        ([0, 1], [1, 0.5]),
    ]
    with pytest.raises(InputError, match=r"not been trained"):
        TunedLens(lens.weight, lens.bias).plot()


def test_the_same_seed_gives_the_same_lens() -> None:
    model = demo("gpt2")
    train: Any = functools.partial(TunedLens.train, model, [Prompt(text, {}) for text in texts()[:8]], steps=3)
    one, two, three = train(batch_size=4), train(batch_size=4), train(batch_size=4, seed=1)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, three.weight)
    more = train(batch_size=20, start=one)  # more than there are texts: they are taken over and over
    assert not torch.equal(one.weight, more.weight)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = demo("gpt2")
    lens = TunedLens.train(model, texts()[:4], steps=2)
    lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(tmp_path / "lens.safetensors", model)
    for name in ("weight", "bias", "history"):
        assert torch.equal(getattr(again, name), getattr(lens, name))
    TunedLens.identity(model).save(tmp_path / "untrained.safetensors")
    assert TunedLens.load(tmp_path / "untrained.safetensors").history is None


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model = StandardizedTransformer(build("llama", hidden_size=48, num_hidden_layers=4))
    path = tmp_path / "lens.safetensors"
    lens = TunedLens.identity(StandardizedTransformer(shared("llama")))
    lens.save(path)
    text = (
        "This tuned lens is for a model of 3 layers and width 32; this one has 4 layers and width 48. Train one for it: "
        "TunedLens.train(model, texts)."
    )
    for call in (
        lambda: TunedLens.load(path, model),
        lambda: logit_lens(model, [3, 4], lens=lens),
        lambda: TunedLens.train(model, [[3, 4]], start=lens),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == text
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors holds no tuned lens"):
        TunedLens.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"no texts"):
        TunedLens.train(model, [])
    with pytest.raises(InputError, match=r"steps=0: it is a whole number, 1 or more"):
        TunedLens.train(model, [[3, 4]], steps=0)


def test_one_text_is_a_text_not_its_letters() -> None:
    model = StandardizedTransformer("demo:gpt2")
    one, listed = (TunedLens.train(model, texts, steps=2) for texts in ("Japan is in", ["Japan is in"]))
    assert torch.equal(one.weight, listed.weight)
