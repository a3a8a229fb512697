"""Causal tracing against the same by plain hooks, one forward pass for each state put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from architectures import PLACES, prompt_ids, shared
from reference import edited, first, hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import causal_tracing, log_probability, probability
from nnatomy.methods.causal_tracing import embedding_std, subject_positions

FEW = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "mixtral")
ZOO = ("falcon_h1", "zamba2", "gemma4_text", "recurrent_gemma")
SUBJECT, SAMPLES = [2, 3], 3


def naive(
    hf: nn.Module, modules: list[nn.Module], ids: Tensor, metric: Any, window: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The effect, and the metric without and with noise."""
    embedding = hf.get_input_embeddings()
    count = embedding.num_embeddings
    with torch.no_grad():
        std = embedding(torch.arange(count)).std()
    draws = torch.randn(SAMPLES, 2, hf.config.hidden_size, generator=torch.Generator().manual_seed(5))
    rows = ids.expand(SAMPLES, -1)
    clean = hooked(hf, lambda: hf(rows), {i: (module, "output") for i, module in enumerate(modules)})

    def drown(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, SUBJECT] += 2.5 * std * draws
        return value

    def run() -> Any:
        return edited(lambda: hf(rows), embedding, "output", drown)

    effect = torch.zeros(len(modules), ids.shape[-1])
    for i in range(len(modules)):
        for position in range(ids.shape[-1]):
            handles = []
            for j in range(max(0, i - window // 2), min(len(modules), i + (window + 1) // 2)):

                def put(_: nn.Module, __: Any, out: Any, j: int = j, position: int = position) -> Any:
                    value = first(out).clone()
                    value[:, position] = clean[j][:, position]
                    return value if isinstance(out, Tensor) else (value, *out[1:])

                handles.append(modules[j].register_forward_hook(put))
            effect[i, position] = metric(run().logits[:, -1]).mean()
            for handle in handles:
                handle.remove()
    with torch.no_grad():
        return effect, metric(hf(rows).logits[:, -1]).mean(), metric(run().logits[:, -1]).mean()


def check(hf: Any, modules: list[nn.Module], ids: Tensor, window: int = 1, **options: Any) -> Any:
    metric = log_probability(20)
    found = causal_tracing(
        StandardizedTransformer(hf),
        ids,
        subject=SUBJECT,
        metric=metric,
        noise=2.5,
        samples=SAMPLES,
        seed=5,
        window=window,
        progress=False,
        **options,
    )
    effect, clean, corrupted = naive(hf, modules, ids, metric, window)
    assert found.effect.shape == effect.shape
    assert (found.effect - effect).abs().max() <= 1e-4 * effect.abs().max()
    assert torch.allclose(torch.stack([found.clean, found.corrupted]), torch.stack([clean, corrupted]), rtol=1e-4)
    assert (clean - corrupted).abs() > 1e-2, "the noise has to show"
    return found


@pytest.mark.parametrize("model_type", FEW)
def test_each_state_put_back_is_one_noisy_run_with_it(model_type: str) -> None:
    hf = shared(model_type)
    check(hf, list(hf.get_submodule(PLACES[model_type][0])), prompt_ids()[0])


@pytest.mark.parametrize("model_type", ZOO)
def test_layers_of_any_kind(model_type: str) -> None:
    """Zamba and Gemma 4 read the embeddings again in later layers."""
    hf = zoo.build(model_type)
    found = check(hf, [layer.module for layer in StandardizedTransformer(hf).layers], zoo.ids(hf)[0])
    assert found.shortcut == (model_type != "gemma4_text")


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_oss"])
@pytest.mark.parametrize("window", [2, 3])
def test_several_layers_around_one(model_type: str, window: int) -> None:
    hf = shared(model_type)
    layers, _, mlp = PLACES[model_type]
    modules = [layer.get_submodule(mlp) for layer in hf.get_submodule(layers)]
    check(hf, modules, prompt_ids()[0], window, point="mlps_output")


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_a_fact_is_restored_at_its_country(name: str) -> None:
    model = StandardizedTransformer(name)
    prompt = "The capital of France is"
    found = causal_tracing(model, prompt, subject="France", progress=False)
    by_answer = causal_tracing(model, prompt, subject="France", metric=probability(" Paris", model), progress=False)
    assert torch.equal(found.effect, by_answer.effect), "by default the model's own prediction is followed"
    at = [i for i, text in enumerate(found.tokens[0]) if text.endswith("*")]
    assert [found.tokens[0][i].strip() for i in at] == ["France*"]
    assert found.clean > 0.9
    assert found.corrupted < 0.5
    assert found.normalized[0].argmax() == at[0], "early it is at the subject"
    assert found.normalized[0, at[0]] > 0.5
    assert (found.normalized[:, : at[0]].abs() < 1e-4).all(), "what comes before is as it was"
    assert abs(float(found.normalized[-1, -1]) - 1) < 1e-3, "in the end at the last token"
    assert torch.tensor(found.plot().data[0].z).shape == found.effect.shape


def test_the_subject_is_all_tokens_that_have_a_part_of_it() -> None:
    model = StandardizedTransformer("demo:gpt2")
    prompt = "The capital of France is"
    texts = [model.tokenizer.decode([i]) for i in model.tokenizer(prompt)["input_ids"]]
    found = subject_positions(model, prompt, "capital of F", len(texts))
    assert "".join(texts[i] for i in found).strip() == "capital of France"
    assert subject_positions(model, prompt, [-1, 0], 5) == [4, 0]


def test_the_noise_is_as_large_as_embeddings_are() -> None:
    """Gemma scales them in the module, and so in `token_embeddings`."""
    hf = shared("gemma2")
    expected = (hf.model.embed_tokens.weight * 32**0.5).std()
    assert torch.allclose(embedding_std(StandardizedTransformer(hf)), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"subject": "Spain"}, "subject='Spain' is no part of the prompt 'The capital of France is'."),
        ({"subject": [5]}, "subject=[5]: give some positions of the prompt's 5 tokens."),
        ({"subject": []}, "subject: give at least one"),
        ({"prompt": [1, 2, 3]}, "subject='France' is found in a prompt that is text"),
        ({"prompt": ["France", "France"]}, "Causal tracing takes one prompt; 2 were given."),
        ({"samples": 0}, "samples=0: it is a whole number, 1 or more."),
    ],
)
def test_what_cannot_be_traced_is_said(options: dict[str, Any], text: str) -> None:
    given = {"prompt": "The capital of France is", "subject": "France", "progress": False, **options}
    with pytest.raises(InputError) as raised:
        causal_tracing(StandardizedTransformer("demo:gpt2"), **given)
    assert text in str(raised.value)


def test_a_subject_may_be_one_position() -> None:
    model = StandardizedTransformer("demo:gpt2")
    assert subject_positions(model, "Japan is in", -3, 3) == [0]
