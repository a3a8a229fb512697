"""Steering vectors against their formulas, steering against plain hooks, and what it does to models that know facts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from architectures import PLACES, prompt_ids, shared
from reference import edited as hook_edited
from reference import hooked
from safetensors.torch import save_file
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError
from nnatomy.methods import SteeringVector
from nnatomy.methods.directions import logistic_probe, mean_difference, pca

ZOO = ("qwen3_next", "jamba")
TYPES = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", *ZOO)
COUNTRIES = ("France", "Italy", "Spain", "Germany", "Poland", "Egypt", "Kenya", "Peru")
CAPITALS = [f"The capital of {country} is" for country in COUNTRIES]
LANGUAGES = [f"The language of {country} is" for country in COUNTRIES]
LENGTHS = (4, 9, 2)
PROMPTS = [prompt_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


def vector_of(width: int = 32, layers: tuple[int, ...] = (1,), seed: int = 0, **changes: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(width, generator=generator) for layer in layers}
    fields = {"point": "layers_output", "model_type": "gpt2", "method": "random", **changes}
    return SteeringVector(directions, **fields)


def build(model_type: str) -> tuple[Any, list[Any]]:
    if model_type in ZOO:
        hf = zoo.shared(model_type)
        return hf, list(hf.model.layers)
    hf = shared(model_type)
    return hf, list(hf.get_submodule(PLACES[model_type][0]))


# The directions.


def examples(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    negative = torch.randn(30, 8, generator=generator)
    return negative + torch.randn(30, 8, generator=generator) + torch.linspace(-1, 2, 8), negative


def test_mean_difference() -> None:
    positive, negative = examples()
    expected = sum(positive) / 30 - sum(negative[:20]) / 20
    torch.testing.assert_close(mean_difference(positive, negative[:20]), expected)


def test_pca_is_the_first_component_of_differences_in_both_orders() -> None:
    positive, negative = examples()
    differences = (positive - negative).double().numpy()
    both = np.concatenate([differences, -differences])
    _, vectors = np.linalg.eigh(np.cov(both.T))
    expected = torch.tensor(vectors[:, -1] * (vectors[:, -1] @ differences.mean(0))).float()
    found = pca(positive, negative)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(found @ (positive - negative).mean(0)) > 0
    torch.testing.assert_close(pca(negative, positive), -found)
    text = "pca takes pairs; there are 30 positive and 4 negative examples."
    with pytest.raises(InputError, match=re.escape(text)):
        pca(positive, negative[:4])


@pytest.mark.parametrize("hidden", [8, 200])
def test_the_probe_is_where_its_loss_is_flat(hidden: int) -> None:
    """By the gradient written out, in numpy; with 200 entries a plane parts the examples whatever they are."""
    generator = torch.Generator().manual_seed(3)
    positive, negative = (torch.randn(n, hidden, generator=generator).double() for n in (20, 31))
    positive[:, 0] += 1
    found = logistic_probe(positive, negative, l2=0.05)
    x = np.concatenate([positive, negative])
    x = x - x.mean(0)
    x = x / math.sqrt((x**2).sum(1).mean())
    y = np.array([1.0] * 20 + [-1.0] * 31)
    unit = found.numpy() / np.linalg.norm(found.numpy())
    # Its length is another: the length and the bias of the least loss along it, by Newton's method.
    z, length, bias = x @ unit, 0.0, 0.0
    for _ in range(100):
        p = 1 / (1 + np.exp(y * (length * z + bias)))
        gradient = np.array([(-y * p * z).mean() + 0.05 * length, (-y * p).mean()])
        w = p * (1 - p)
        hessian = np.array([[(w * z * z).mean() + 0.05, (w * z).mean()], [(w * z).mean(), w.mean()]])
        length, bias = np.array([length, bias]) - np.linalg.solve(hessian, gradient)
    p = 1 / (1 + np.exp(y * (length * z + bias)))
    assert length > 0
    assert np.abs(-(y * p) @ x / len(x) + 0.05 * length * unit).max() < 1e-7
    torch.testing.assert_close(found @ torch.tensor(unit), torch.tensor(unit) @ (positive.mean(0) - negative.mean(0)))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_vector_is_made_of_what_hooks_see_of_each_prompt_alone(model_type: str) -> None:
    hf, layers = build(model_type)
    model = StandardizedTransformer(hf)
    prompts = [[16 + token % 40 for token in ids] for ids in PROMPTS] * 2
    prompts = [[*ids[:-1], 20 + i] for i, ids in enumerate(prompts)]

    def at(ids: list[int], position: int) -> Tensor:
        return hooked(hf, lambda: hf(torch.tensor([ids])), {0: (layers[1], "output")})[0][0, position]

    def mean(prompts: list[list[int]], position: int) -> Tensor:
        return torch.stack([at(ids, position) for ids in prompts]).mean(0)

    vector = SteeringVector.from_pairs(
        model, list(zip(prompts[:3], prompts[3:], strict=True)), layers=[-1, 1], progress=False
    )
    expected = mean(prompts[:3], -1) - mean(prompts[3:], -1)
    torch.testing.assert_close(vector.directions[1], expected, rtol=1e-4, atol=1e-4)
    others = [[17, *ids[1:]] for ids in prompts[3:5]]
    vector = SteeringVector.from_prompts(model, prompts[:3], others, positions=-2, progress=False)
    expected = mean(prompts[:3], -2) - mean(others, -2)
    torch.testing.assert_close(vector.directions[1], expected, rtol=1e-4, atol=1e-4)
    assert list(vector.directions) == list(range(model.num_layers))
    assert vector.point == "layers_output"
    assert vector.model_type == model_type


# Steering.


@pytest.mark.parametrize("model_type", TYPES)
def test_steering_is_what_a_hook_that_adds_does(model_type: str) -> None:
    hf, layers = build(model_type)
    model = StandardizedTransformer(hf)
    vector = vector_of(model.hidden_size)
    ids = prompt_ids() % 40 + 16
    expected = hook_edited(lambda: hf(ids), layers[1], "output", lambda h: h + 1.5 * vector.directions[1]).logits
    with torch.no_grad(), model.trace(ids):
        vector.apply(model, 1.5)
        logits = model.logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    edited = model.edit(lambda: vector.apply(model, factor=1.5))
    with torch.no_grad():
        torch.testing.assert_close(edited(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("positions", "of"),
    [
        (None, lambda n: range(n)),
        (-1, lambda n: [n - 1]),
        (1, lambda n: [1]),
        ([0, -1], lambda n: [0, n - 1]),
        (slice(1, None), lambda n: range(1, n)),
        (slice(-3, None), lambda n: range(max(0, n - 3), n)),
        (slice(1, -1), lambda n: range(1, n - 1)),
        (slice(3), lambda n: range(min(n, 3))),
        (slice(3, 5), lambda n: range(3, min(n, 5))),
    ],
)
@torch.no_grad()
def test_positions_are_each_prompts_own(positions: Any, of: Any) -> None:
    """Of a padded batch, in a plain trace and in blocks of their own: as a hook does on each prompt alone."""
    hf, vector = shared("llama"), vector_of()
    model = StandardizedTransformer(hf)

    def expected(ids: list[int]) -> Tensor:
        def edit(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            for at in of(len(ids)):
                hidden[0, at] += vector.directions[1]
            return hidden

        return hook_edited(lambda: hf(torch.tensor([ids])), hf.model.layers[1], "output", edit).logits[0]

    with model.trace(PROMPTS):
        vector.apply(model, positions=positions)
        logits = model.logits
    blocks: list[Any] = []
    with model.trace() as tracer:
        for ids in PROMPTS:

            def block() -> Tensor:
                vector.apply(model, positions=positions)
                return model.logits

            blocks.append(tracer.invoke(ids, block))
    for row, ids, one in zip(logits, PROMPTS, blocks, strict=True):
        torch.testing.assert_close(row[-len(ids) :], expected(ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.value[0], expected(ids), rtol=1e-4, atol=1e-4)


FROM_4 = {"positions": slice(4, None)}, lambda length, at: at >= 4
FROM_11 = {"positions": slice(11, None)}, lambda length, at: at >= 11


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "alone"])  # alone, generate gives no mask
@pytest.mark.parametrize(
    ("arguments", "chosen", "cached"),
    [
        ({"from_step": 2}, lambda length, at: at >= length + 1, True),
        ({"positions": -1}, lambda length, at: at >= length - 1, True),
        (*FROM_4, True),
        (*FROM_4, False),
        (*FROM_11, True),
        (*FROM_11, False),
    ],
)
@torch.no_grad()
def test_while_generating_it_is_one_pass_in_which_these_positions_are_steered(
    arguments: dict[str, Any], chosen: Any, cached: bool, prompts: list[list[int]]
) -> None:
    """docs/generation.md: each position is steered once, and stays so. Without a cache -1 is another one in each step."""
    hf, vector = shared("llama"), vector_of()
    model = StandardizedTransformer(hf)
    found = []
    edited = model.edit(lambda: vector.apply(model, 3.0, **arguments))
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": cached, "eos_token_id": None}
    with edited.generate(prompts, **options) as tracer:
        for _ in tracer.iter[:]:
            found.append(model.logits[:, -1])
        tokens = tracer.result
    for b, ids in enumerate(prompts):
        whole = tokens[b, max(map(len, prompts)) - len(ids) :]

        def edit(hidden: Tensor, ids: list[int] = ids) -> Tensor:
            where = torch.tensor([chosen(len(ids), at) for at in range(hidden.shape[1])])
            return hidden + 3.0 * where[None, :, None] * vector.directions[1]

        logits = hook_edited(lambda whole=whole: hf(whole[None]), hf.model.layers[1], "output", edit).logits[0]
        for step, one in enumerate(found):
            torch.testing.assert_close(one[b], logits[len(ids) - 1 + step], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
@pytest.mark.parametrize("method", ["mean_difference", "logistic_probe", "pca"])
@torch.no_grad()
def test_a_question_for_the_language_becomes_one_for_the_capital(name: str, method: str) -> None:
    """On countries that the vector was not made from."""
    model = StandardizedTransformer(name)
    pairs = list(zip(CAPITALS, LANGUAGES, strict=True))
    vector = SteeringVector.from_pairs(model, pairs, method=method, progress=False)
    layer = model.num_layers // 3
    one = SteeringVector({layer: vector.directions[layer]}, vector.point, vector.model_type, method)
    others = ("Japan", "Russia", "China", "Greece", "Hungary")
    for factor, word in ((1.5, "capital"), (0.0, "language")):
        edited = model.edit(lambda factor=factor: one.apply(model, factor, positions=-1))
        found = edited([f"The language of {country} is" for country in others]).logits[:, -1].argmax(-1)
        asked = model([f"The {word} of {country} is" for country in others]).logits[:, -1].argmax(-1)
        assert (found == asked).float().mean() >= 0.8, (factor, model.tokenizer.batch_decode(found[:, None]))


# The vector itself.


def test_arithmetic() -> None:
    one, other = vector_of(layers=(0, 1)), vector_of(layers=(1, 2), seed=5, method="pca")
    total = 2 * one - other
    assert list(total.directions) == [0, 1, 2]
    torch.testing.assert_close(total.directions[0], 2 * one.directions[0])
    torch.testing.assert_close(total.directions[1], 2 * one.directions[1] - other.directions[1])
    torch.testing.assert_close(total.directions[2], -other.directions[2])
    assert total.method == "random, pca"
    assert (one * 3).norms[0] == pytest.approx(3 * float(one.directions[0].square().sum().sqrt()), rel=1e-5)
    assert list((one * 3).normalized().norms.values()) == pytest.approx([1, 1])
    text = (
        "Vectors of different kinds cannot be added: ('gpt2', 'layers_output', 32) and "
        "('gpt2', 'layers_output', 16) (model type, point, width)."
    )
    with pytest.raises(InputError, match=re.escape(text)):
        one + vector_of(16)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    vector = vector_of(layers=(2, 0), point="mlps_output")
    vector.save(tmp_path / "vector.safetensors")
    loaded = SteeringVector.load(tmp_path / "vector.safetensors")
    assert (loaded.point, loaded.model_type, loaded.method) == ("mlps_output", "gpt2", "random")
    assert list(loaded.directions) == [2, 0]
    assert all(torch.equal(loaded.directions[i], one) for i, one in vector.directions.items())
    save_file({"0": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors")
    for name in ("other.safetensors", "text"):
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name} is no file that SteeringVector.save wrote")):
            SteeringVector.load(tmp_path / name)


def test_projections_and_their_plot() -> None:
    model = StandardizedTransformer("demo:gpt2")
    prompt = "The capital of France is"
    vector = vector_of(model.hidden_size, (1, 3))
    found = vector.projections(model, prompt)
    layers = model.hf_model.transformer.h
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    seen = hooked(model.hf_model, lambda: model.hf_model(ids), {i: (layers[i], "output") for i in (1, 3)})
    for row, layer in zip(found, (1, 3), strict=True):
        unit = vector.directions[layer] / vector.directions[layer].norm()
        torch.testing.assert_close(row, seen[layer][0] @ unit, rtol=1e-4, atol=1e-4)
    figure = vector.plot(model, prompt)
    torch.testing.assert_close(torch.tensor(np.array(figure.data[0].z)).float(), found, rtol=1e-4, atol=1e-4)
    assert len(figure.data[0].z[0]) == 5


def test_errors() -> None:
    model = StandardizedTransformer(shared("llama"))
    text = "The vector is of width 16 (from a gpt2), the model's residual stream of width 32 (llama)."
    with pytest.raises(InputError, match=re.escape(text)), model.trace(prompt_ids()):
        vector_of(16).apply(model)
    text = "positions: prompt 2 has 2 tokens, at 0 to 1 (or -2 to -1); there is no position -3."
    with pytest.raises(InputError, match=re.escape(text)), model.trace(PROMPTS):
        vector_of().apply(model, positions=-3)
    with pytest.raises(InputError, match=re.escape("a slice has no stride.")), model.trace(PROMPTS):
        vector_of().apply(model, positions=slice(None, None, 2))
    with (
        pytest.raises(LayerIndexError, match=re.escape("the model has 3 layers, 0 to 2.")),
        model.trace(PROMPTS),
    ):
        vector_of(layers=(3,)).apply(model)
    text = "There is no method 'svm'; there are mean_difference, pca, logistic_probe."
    with pytest.raises(InputError, match=re.escape(text)):
        SteeringVector.from_prompts(model, PROMPTS, PROMPTS, method="svm")
    text = "heads_output is of (4, 8) at each position, the residual stream of (32): steer at another point."
    with pytest.raises(InputError, match=re.escape(text)):
        SteeringVector.from_prompts(model, [[5]], [[6]], point="heads_output", progress=False)
    text = "layers_input[0]: the positive and the negative examples do not differ there"
    for method in ("mean_difference", "pca", "logistic_probe"):
        with pytest.raises(InputError, match=re.escape(text)):
            SteeringVector.from_prompts(
                model,
                [[5, 6]] * 2,
                [[4, 6]] * 2,
                method=method,
                point="layers_input",
                layers=[0],
                progress=False,
            )


def test_the_page_runs_and_says_what_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "methods" / "steering.md"
    exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)), {})
    *_, steered, capital, continent = capsys.readouterr().out.splitlines()
    assert (steered, capital) == (" Tokyo", " Nairobi")
    assert continent not in (" Africa", " Asia", " Europe")
