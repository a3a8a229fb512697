"""Direct logit attribution against the algebra of each model's own code, by plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from attribution_reference import PLACES, TYPES, frozen, ids, inputs_and_outputs, matrix, shared
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.methods import direct_logit_attribution

ANSWER, WRONG = 20, 31


def naive(model_type: str, token_ids: Tensor) -> dict[str, Tensor]:
    """What each part adds to logit 20 less logit 31 at the last position, with all norms' scales as they are."""
    hf, place = shared(model_type), PLACES[model_type]
    config = hf.config
    given, gave = inputs_and_outputs(hf, token_ids)
    layers: list[Any] = list(hf.get_submodule(place.layers))
    final, unembedding = hf.get_submodule(place.final), hf.get_submodule(place.unembedding)
    difference = (unembedding.weight[ANSWER] - unembedding.weight[WRONG]) * place.logit_scale(config)
    logits = gave[unembedding][:, -1] * place.logit_scale(config)
    slopes = torch.ones(len(token_ids), 2)
    if (cap := place.cap(config)) is not None:
        slopes = 1 - (logits[:, [ANSWER, WRONG]] / cap).tanh() ** 2

    def adds(part: Tensor) -> Tensor:
        normed = frozen(final, place.norm, gave[layers[-1]][:, -1], part[:, -1])
        if cap is None:
            return normed @ difference
        both = normed @ unembedding.weight[[ANSWER, WRONG]].mT * slopes
        return both[:, 0] - both[:, 1]

    def behind(layer: nn.Module, which: int, at: Tensor, part: Tensor) -> Tensor:
        if place.after is None:
            return part
        return frozen(layer.get_submodule(place.after[which]), place.norm, at, part)

    parts = {"embeddings": adds(given[layers[0]])}
    for i, layer in enumerate(layers):
        projection, mlp = layer.get_submodule(place.projection), layer.get_submodule(place.mlp)
        weights, heads = matrix(projection), config.num_attention_heads
        for h, (z, w) in enumerate(zip(given[projection].chunk(heads, -1), weights.chunk(heads), strict=True)):
            part = behind(layer, 0, gave[projection], z @ w) * place.attention_scale(config)
            parts[f"L{i}H{h}"] = adds(part)
        if getattr(projection, "bias", None) is not None:
            bias = projection.bias.expand_as(gave[projection]) * place.attention_scale(config)
            parts[f"L{i} attention rest"] = adds(bias)
        if hasattr(layer, "mamba"):
            parts[f"L{i} mamba"] = adds(gave[layer.mamba] * config.ssm_out_multiplier)
        added = behind(layer, 1, gave[mlp], gave[mlp]).view_as(given[layer])
        parts[f"L{i} mlp"] = adds(added * place.mlp_scale(config))
    return {name: part.detach() for name, part in parts.items()}


def logit_difference(model_type: str, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = shared(model_type)(token_ids).logits[:, -1]
    return logits[:, ANSWER] - logits[:, WRONG]


@pytest.mark.parametrize("model_type", TYPES)
def test_each_part_adds_what_the_models_own_algebra_says(model_type: str) -> None:
    token_ids = ids(model_type)
    found = direct_logit_attribution(
        StandardizedTransformer(shared(model_type)), token_ids, answer=ANSWER, wrong=WRONG, by="head"
    )
    reference = naive(model_type, token_ids)
    values = dict(zip(found.parts, found.effect.mT, strict=True))
    assert set(reference) <= set(values)
    for name, value in values.items():
        if name != "rest":
            expected = reference.get(name, torch.zeros(len(token_ids)))
            assert torch.allclose(value, expected, rtol=1e-3, atol=2e-4), name
    assert torch.allclose(found.effect.sum(-1), logit_difference(model_type, token_ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_components_and_layers_are_sums_of_the_finer_parts(model_type: str) -> None:
    model, token_ids = StandardizedTransformer(shared(model_type)), ids(model_type)
    tables = {}
    for by in ("layer", "component", "head"):
        found = direct_logit_attribution(model, token_ids, answer=ANSWER, wrong=WRONG, by=by)
        tables[by] = dict(zip(found.parts, found.effect.mT, strict=True))
    for i in range(model.num_layers):
        for finer in ("component", "head"):
            mine = [value for name, value in tables[finer].items() if name.startswith((f"L{i} ", f"L{i}H"))]
            assert torch.allclose(torch.stack(mine).sum(0), tables["layer"][f"L{i}"], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("model_type", "rest"), [("llama", 0.0), ("gpt2", None)])
def test_the_rest_is_the_bias_of_the_final_norm(model_type: str, rest: float | None) -> None:
    hf = shared(model_type)
    found = direct_logit_attribution(StandardizedTransformer(hf), ids(model_type), answer=ANSWER)
    if rest is None:
        rest = float((hf.transformer.ln_f.bias @ hf.lm_head.weight[ANSWER]).detach())
        assert abs(rest) > 0.1
    assert found.parts[-1] == "rest"
    assert torch.allclose(found.effect[:, -1], torch.full((2,), rest), atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "qwen3_next"])
def test_padding_does_not_show(model_type: str) -> None:
    """(Of the hybrids, Qwen3-Next's own logits do not depend on it.)"""
    model = StandardizedTransformer(zoo.shared(model_type))
    token_ids = zoo.ids(model.hf_model)
    short, long = token_ids[0, :5].tolist(), token_ids[1].tolist()
    both = direct_logit_attribution(model, [short, long], answer=[ANSWER, WRONG], wrong=WRONG + 1, by="head")
    alone = direct_logit_attribution(model, [short], answer=ANSWER, wrong=WRONG + 1, by="head")
    assert both.parts == alone.parts
    assert torch.allclose(both.effect[:1], alone.effect, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_weights_without_gradients_and_no_grad_do_as_well(grad: bool) -> None:
    hf = zoo.build("llama")
    model = StandardizedTransformer(hf)
    expected = direct_logit_attribution(model, zoo.ids(hf), answer=ANSWER, by="head")
    hf.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        found = direct_logit_attribution(model, zoo.ids(hf), answer=ANSWER, by="head")
    assert torch.equal(found.effect, expected.effect)
    assert not found.effect.requires_grad


def test_a_layer_of_a_hybrid_is_named_for_what_mixes_its_tokens() -> None:
    model = StandardizedTransformer(zoo.shared("jamba"))
    found = direct_logit_attribution(model, zoo.ids(model.hf_model), answer=ANSWER, by="head")
    assert found.parts[:4] == ("embeddings", "L0 mamba", "L0 mlp", "L1H0")


def test_where_the_stream_is_no_sum_by_layer_alone_is_there() -> None:
    model = StandardizedTransformer(zoo.shared("bert"))
    token_ids = zoo.ids(model.hf_model)
    with pytest.raises(NotInThisModelError, match="the stream is normalised on its way through the layer"):
        direct_logit_attribution(model, token_ids, answer=ANSWER)
    found = direct_logit_attribution(model, token_ids, answer=ANSWER, by="layer")
    with torch.no_grad():
        logits = model.hf_model(token_ids).logits[:, -1, ANSWER]
    assert torch.allclose(found.effect.sum(-1), logits, atol=1e-5)


def test_a_model_that_is_not_validated() -> None:
    hf = zoo.shared("jamba")
    one, other = (
        direct_logit_attribution(StandardizedTransformer(hf, validate=check), zoo.ids(hf), answer=ANSWER, by="head")
        for check in (True, False)
    )
    assert one.parts == other.parts
    assert torch.allclose(one.effect, other.effect, atol=1e-5)


def test_what_cannot_be_is_said() -> None:
    model = StandardizedTransformer("demo:gpt2")
    with pytest.raises(InputError, match=r"The answer ' Paris Rome' is 2 tokens, .*Give one token"):
        direct_logit_attribution(model, "The capital of France is", answer=" Paris Rome")
    with pytest.raises(InputError, match="3 answers for 1 row of logits: give one, or one for each"):
        direct_logit_attribution(model, "The capital of France is", answer=[1, 2, 3])
    prompts = ["The capital of France is", "Japan is in"]
    with pytest.raises(InputError, match=r"prompt 1 has 3 tokens, at 0 to 2 \(or -3 to -1\); there is no position -5"):
        direct_logit_attribution(model, prompts, answer=1, position=-5)
    with pytest.raises(InputError, match="by='neuron': take 'layer', 'component' or 'head'"):
        direct_logit_attribution(model, prompts, answer=1, by="neuron")
    with pytest.raises(InputError, match="The answer ' Paris' is text: give the model whose tokenizer"):
        direct_logit_attribution(StandardizedTransformer(shared("llama")), [[3, 4]], answer=" Paris")


COUNTRIES = {"France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "Egypt": " Cairo", "Peru": " Lima"}


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_without_the_part_that_adds_most_the_answer_is_lost(name: str) -> None:
    """Taken out of the last stream, the scale of the final norm as it was or not, it takes the answer with it."""
    model = StandardizedTransformer(name)
    prompts = [f"The capital of {country} is" for country in COUNTRIES]
    answers = list(COUNTRIES.values())
    found = direct_logit_attribution(model, prompts, answer=answers, wrong=answers[1:] + answers[:1])
    best, value = found.top(1)[0]
    assert value > 0
    with torch.no_grad(), model.trace(prompts):
        for i in range(model.num_layers):
            for kind in ("mixers", "mlps"):
                added = getattr(model, f"{kind}_contribution")[i]
                if best == f"L{i} {'attention' if kind == 'mixers' else 'mlp'}":
                    part = added[:, -1]
        hidden = model.layers_output[-1][:, -1]
    ids_ = torch.tensor([model.tokenizer.encode(answer)[0] for answer in answers])
    whole, without = (model.project_on_vocab(h).detach().softmax(-1) for h in (hidden, hidden - part))
    assert bool((whole.argmax(-1) == ids_).all())
    assert bool((without.gather(1, ids_[:, None]) < whole.gather(1, ids_[:, None])).all())


def test_the_plot_shows_the_mean() -> None:
    found = direct_logit_attribution(StandardizedTransformer(shared("llama")), ids("llama"), answer=ANSWER)
    assert torch.allclose(torch.tensor(found.plot().data[0].x).float(), found.effect.mean(0), atol=1e-6)
    assert found.top(1)[0][1] == pytest.approx(float(found.effect.mean(0)[found.parts.index(found.top(1)[0][0])]))
