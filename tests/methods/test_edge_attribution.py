"""Edge scores against plain hooks and autograd; circuits against a forward written out by hand."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import zoo
from architectures import prompt_ids
from attribution_reference import (
    PLACES,
    TYPES,
    frozen,
    ids,
    inputs_and_outputs,
    matrix,
    metric,
    shared,
    with_gradients,
)
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.methods import circuit_faithfulness, edge_attribution
from nnatomy.methods.edge_attribution import EdgeAttribution

CLEAN, CORRUPTED = 0, 1


def attributed(model_type: str, **kwargs: Any) -> EdgeAttribution:
    model = StandardizedTransformer(shared(model_type))
    return edge_attribution(model, ids(model_type, CLEAN), ids(model_type, CORRUPTED), metric=metric, **kwargs)


def points_of(model_type: str) -> dict[Any, tuple[nn.Module, str]]:
    """The embeddings, what each MLP adds, and what each attention's heads give."""
    place, points = PLACES[model_type], {}
    layers = list(shared(model_type).get_submodule(place.layers))
    points["embeddings"] = (layers[0], "input")
    for i, layer in enumerate(layers):
        points[f"L{i}"] = (layer.get_submodule(place.projection), "input")
        points[f"L{i} mlp"] = (layer.get_submodule(place.after[1] if place.after else place.mlp), "output")
    return points


@pytest.mark.parametrize("model_type", TYPES)
def test_the_edges_of_a_source_add_up_to_its_gradient(model_type: str) -> None:
    """The chain rule: what a source does to the metric goes along its edges, and no other way."""
    hf, found = shared(model_type), attributed(model_type)
    clean, gradients, value = with_gradients(hf, ids(model_type, CLEAN), points_of(model_type))
    corrupted, _, other = with_gradients(hf, ids(model_type, CORRUPTED), points_of(model_type))
    totals = dict(zip(found.sources, found.effect.sum(-1).mT, strict=True))
    assert torch.allclose(found.clean, value, atol=1e-4)
    assert torch.allclose(found.corrupted, other, atol=1e-4)
    checked = 0
    for name in clean:
        product = (clean[name] - corrupted[name]) * gradients[name]
        if name in totals:
            expected = {name: product.flatten(1).sum(1)}
        elif PLACES[model_type].after or f"{name}H0" not in totals:  # a norm behind it is not linear; or no heads
            continue
        else:
            by_head = product.unflatten(-1, (hf.config.num_attention_heads, -1)).sum((1, 3))
            expected = {f"{name}H{h}": one for h, one in enumerate(by_head.mT)}
        for source, one in expected.items():
            checked += 1
            assert torch.allclose(totals[source], one, rtol=1e-3, atol=1e-4), source
    assert checked >= 4


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss"])
def test_edges_into_queries_keys_and_values(model_type: str) -> None:
    """The gradient at the projection's output, one head of it, taken back through projection and norm by autograd."""
    hf, found = shared(model_type), attributed(model_type)
    layers = list(hf.get_submodule(PLACES[model_type].layers))
    corrupted, _, _ = with_gradients(hf, ids(model_type, CORRUPTED), {"embeddings": (layers[0], "input")})
    heads = hf.config.num_attention_heads
    shares = heads // getattr(hf.config, "num_key_value_heads", heads)
    seen: dict[Any, Tensor] = {}

    def keep(name: Any) -> Any:
        return lambda _m, args, kwargs, output: seen.__setitem__(name, output)

    handles = []
    for i, layer in enumerate(layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _m, args, kwargs, i=i: seen.__setitem__(i, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        projections = (
            {"qkv": layer.attn.c_attn}
            if model_type == "gpt2"
            else {kind: getattr(layer.self_attn, f"{kind}_proj") for kind in "qkv"}
        )
        for kind, projection in projections.items():
            handles.append(projection.register_forward_hook(keep((i, kind)), with_kwargs=True))
    value = metric(hf(ids(model_type, CLEAN), use_cache=False).logits[:, -1])
    for handle in handles:
        handle.remove()
    change = seen[0].detach() - corrupted["embeddings"]
    scores = dict(zip(found.destinations, found.effect[:, 0].mT, strict=True))
    for (i, kinds), output in [(name, x) for name, x in seen.items() if not isinstance(name, int)]:
        (whole,) = torch.autograd.grad(value.sum(), output, retain_graph=True)
        for n, kind in enumerate(kinds):
            count = heads if kind == "q" else heads // shares
            for h in range(count):
                along = torch.zeros_like(whole).unflatten(-1, (len(kinds), count, -1))
                along[..., n, h, :] = whole.unflatten(-1, (len(kinds), count, -1))[..., n, h, :]
                (slope,) = torch.autograd.grad(output, seen[i], along.flatten(-3), retain_graph=True)
                name = f"L{i}H{h}" if count == heads else f"L{i}H{h * shares}-{h * shares + shares - 1}"
                expected = (change * slope).sum((1, 2))
                assert torch.allclose(scores[f"{name}.{kind}"], expected, rtol=1e-3, atol=1e-4), (name, kind)


@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "falcon_h1"])
def test_edges_of_heads_into_the_logits(model_type: str) -> None:
    """Each head by its share of the projection, a norm behind that with its scale as it is."""
    hf, place, found = shared(model_type), PLACES[model_type], attributed(model_type)
    layers, heads = list(hf.get_submodule(place.layers)), hf.config.num_attention_heads
    runs = [inputs_and_outputs(hf, ids(model_type, seed)) for seed in (CLEAN, CORRUPTED)]
    _, slopes, _ = with_gradients(hf, ids(model_type, CLEAN), {"last": (layers[-1], "output")})
    for i, layer in enumerate(layers):
        projection = layer.get_submodule(place.projection)
        for h, w in enumerate(matrix(projection).chunk(heads)):
            clean, corrupted = (given[projection].chunk(heads, -1)[h] @ w for given, _ in runs)
            if place.after is not None:
                norm = layer.get_submodule(place.after[0])
                clean, corrupted = (
                    frozen(norm, place.norm, gave[projection], part)
                    for part, (_, gave) in zip((clean, corrupted), runs, strict=True)
                )
            change = (clean - corrupted) * place.attention_scale(hf.config)
            score = found.effect[:, found.sources.index(f"L{i}H{h}"), -1]
            assert torch.allclose(score, (change * slopes["last"]).sum((1, 2)), rtol=1e-3, atol=1e-4), (i, h)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "falcon_h1"])
def test_more_steps_are_the_mean_over_embeddings_on_the_way(model_type: str) -> None:
    hf, found = shared(model_type), attributed(model_type, steps=3)
    first = next(iter(hf.get_submodule(PLACES[model_type].layers)))
    points = {"tokens": (hf.get_input_embeddings(), "output"), "embeddings": (first, "input")}
    clean, _, _ = with_gradients(hf, ids(model_type, CLEAN), points)
    corrupted, _, _ = with_gradients(hf, ids(model_type, CORRUPTED), points)
    total: Any = 0.0
    for k in (1, 2, 3):
        at = torch.lerp(corrupted["tokens"], clean["tokens"], k / 3)
        _, gradients, _ = with_gradients(
            hf,
            ids(model_type, CLEAN),
            points,
            put=lambda name, x, at=at: at.clone() + 0 * x if name == "tokens" else x,  # type: ignore[misc]
        )
        total = total + (gradients["embeddings"] * (clean["embeddings"] - corrupted["embeddings"])).sum((1, 2)) / 3
    assert torch.allclose(found.effect[:, 0].sum(-1), total, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(attributed(model_type).effect[:, 0].sum(-1), total, rtol=1e-2, atol=1e-2)


def names(found: EdgeAttribution) -> set[tuple[str, str]]:
    return {(found.sources[s], found.destinations[d]) for s, d in found.edges.nonzero().tolist()}


def test_an_edge_goes_forward_and_not_within_a_parallel_block() -> None:
    sequential, parallel = names(attributed("llama")), names(attributed("cohere"))
    assert ("L0H1", "L0 mlp") in sequential
    assert ("L0H1", "L0 mlp") not in parallel
    for edges in (sequential, parallel):
        assert {("embeddings", "L0H0.q"), ("L0 mlp", "L1H0-1.k"), ("L2 mlp", "logits")} <= edges
        assert not {("L1H0", "L1H1.q"), ("L1 mlp", "L1H1.q"), ("L1 mlp", "L1 mlp"), ("L2H0", "L1 mlp")} & edges
    found = attributed("llama")
    assert not found.effect[:, ~found.edges].any()
    assert len(sequential) == int(found.edges.sum())


@pytest.mark.parametrize(
    ("model_type", "sources"),
    [
        (
            "qwen3_next",
            ["embeddings", "L0 linear attention", "L0 mlp", "L1 attention", "L1 mlp"],
        ),  # with a gate
        ("falcon_h1", ["embeddings", "L0 mamba + attention", "L0 mlp", "L1 mamba + attention"]),
        ("jamba", ["embeddings", "L0 mamba", "L0 mlp", "L1H0", "L1H1", "L1H2", "L1H3", "L1 mlp"]),
        ("mamba", ["embeddings", "L0 mamba", "L1 mamba"]),
    ],
)
def test_what_is_not_by_heads_is_one_node(model_type: str, sources: list[str]) -> None:
    """And the chain rule holds for it as well."""
    hf = zoo.shared(model_type)
    clean, corrupted = zoo.ids(hf, seed=CLEAN), zoo.ids(hf, seed=CORRUPTED)
    found = edge_attribution(StandardizedTransformer(hf), clean, corrupted, metric=metric)
    assert list(found.sources[: len(sources)]) == sources
    layers = hf.backbone.layers if model_type == "mamba" else hf.model.layers
    for i in (0, 1):
        points = {"stream": (layers[i], "input")}
        values, gradients, _ = with_gradients(hf, clean, points)
        others, _, _ = with_gradients(hf, corrupted, points)
        expected = (gradients["stream"] * (values["stream"] - others["stream"])).sum((1, 2))
        before = [s for s, name in enumerate(found.sources) if name == "embeddings" or int(name[1]) < i]
        behind = [d for d, name in enumerate(found.destinations) if name == "logits" or int(name[1]) >= i]
        mine = found.effect[:, before][:, :, behind].sum((1, 2))
        assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-4)


def test_a_model_that_is_not_validated() -> None:
    hf = zoo.shared("jamba")
    clean, corrupted = zoo.ids(hf, seed=CLEAN), zoo.ids(hf, seed=CORRUPTED)
    one, other = (
        edge_attribution(StandardizedTransformer(hf, validate=check), clean, corrupted, metric=metric)
        for check in (True, False)
    )
    assert one.destinations == other.destinations
    assert torch.allclose(one.effect, other.effect, atol=1e-5)


def test_padding_does_not_show() -> None:
    model = StandardizedTransformer(shared("gemma2"))
    clean, corrupted = (prompt_ids(seed=seed).tolist() for seed in (CLEAN, CORRUPTED))
    short = [clean[0][:6]], [corrupted[0][:6]]
    both = [clean[0][:6], clean[1]], [corrupted[0][:6], corrupted[1]]
    alone, found = edge_attribution(model, *short, metric=metric), edge_attribution(model, *both, metric=metric)
    assert torch.allclose(found.effect[:1], alone.effect, rtol=1e-3, atol=1e-4)
    kept = [
        circuit_faithfulness(model, *given, metric=metric, attribution=alone, sizes=[40]).effect[0]
        for given in (short, both)
    ]
    assert torch.allclose(*kept, rtol=1e-3, atol=1e-4)


# Circuits.


def of_edges(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    measure: Any,
    found: EdgeAttribution,
    keep: Tensor,
) -> Tensor:
    """The metric of a circuit of given edges: those that have a score are the largest."""
    keep = keep & found.edges
    given = dataclasses.replace(found, effect=keep.float().expand_as(found.effect))
    return circuit_faithfulness(
        model, clean, corrupted, metric=measure, attribution=given, sizes=[int(keep.sum())]
    ).effect[:, 0]


@pytest.mark.parametrize("model_type", [*TYPES, "jamba", "qwen3_next", "mpt", "nanochat"])
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(model_type: str) -> None:
    hf = shared(model_type) if model_type in TYPES else zoo.shared(model_type)
    model = StandardizedTransformer(hf)
    clean, corrupted = (
        ids(model_type, seed) if model_type in TYPES else zoo.ids(hf, seed=seed) for seed in (CLEAN, CORRUPTED)
    )
    edges = edge_attribution(model, clean, corrupted, metric=metric)
    found = circuit_faithfulness(
        model, clean, corrupted, metric=metric, attribution=edges, sizes=[0, int(edges.edges.sum())]
    )
    with torch.no_grad():
        expected = torch.stack([metric(hf(x).logits[:, -1]) for x in (corrupted, clean)], 1)
    assert torch.allclose(found.effect, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.recovered, torch.tensor([0.0, 1.0]), atol=1e-3)


@torch.no_grad()
def gpt2_circuit(hf: Any, clean: Tensor, corrupted: Tensor, found: EdgeAttribution, keep: Tensor) -> Tensor:
    """GPT-2 written out: each head's queries, keys and values, each MLP and the head read a stream of their own."""
    heads, size = hf.config.n_head, hf.config.n_embd // hf.config.n_head
    sources, destinations = list(found.sources), list(found.destinations)

    def forward(tokens: Tensor, base: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        written = {"embeddings": hf.transformer.wte(tokens) + hf.transformer.wpe.weight[: tokens.shape[1]]}

        def stream(destination: str, biases: int) -> Tensor:
            """`biases`: the output biases of how many attentions have been added."""
            total = sum((block.attn.c_proj.bias for block in hf.transformer.h[:biases]), torch.zeros(()))
            before = found.edges[:, destinations.index(destination)]
            for s in before.nonzero()[:, 0].tolist():
                now = base is None or bool(keep[s, destinations.index(destination)])
                total = total + (written if now else base)[sources[s]]  # type: ignore[index]
            return total

        for i, block in enumerate(hf.transformer.h):
            for h in range(heads):
                parts = []
                for n, kind in enumerate("qkv"):
                    all_heads = block.attn.c_attn(block.ln_1(stream(f"L{i}H{h}.{kind}", i))).chunk(3, -1)[n]
                    parts.append(all_heads[..., h * size : (h + 1) * size])
                scores = parts[0] @ parts[1].mT / size**0.5
                mask = torch.ones(scores.shape[-2:]).tril().bool()
                z = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ parts[2]
                written[f"L{i}H{h}"] = z @ block.attn.c_proj.weight[h * size : (h + 1) * size]
            written[f"L{i} mlp"] = block.mlp(block.ln_2(stream(f"L{i} mlp", i + 1)))
        last = stream("logits", len(hf.transformer.h))
        return hf.lm_head(hf.transformer.ln_f(last))[:, -1], written

    return forward(clean, forward(corrupted, None)[1])[0]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_circuit_of_any_edges_is_the_forward_written_out(share: float) -> None:
    hf = shared("gpt2")
    model, clean, corrupted = StandardizedTransformer(hf), ids("gpt2", CLEAN), ids("gpt2", CORRUPTED)
    found = attributed("gpt2")
    keep = torch.rand(found.edges.shape, generator=torch.Generator().manual_seed(0)) < share
    expected = metric(gpt2_circuit(hf, clean, corrupted, found, keep))
    got = of_edges(model, clean, corrupted, metric, found, keep)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, found.clean, atol=1e-2)


@pytest.mark.parametrize("model_type", TYPES)
def test_of_edges_into_the_logits_alone_only_the_embeddings_count(model_type: str) -> None:
    """All other sources are as in the corrupted run, as nothing clean reaches them."""
    hf, place, found = shared(model_type), PLACES[model_type], attributed(model_type)
    layers = list(hf.get_submodule(place.layers))
    points = {"first": (layers[0], "input"), "last": (layers[-1], "output")}
    clean, _, _ = with_gradients(hf, ids(model_type, CLEAN), points)
    corrupted, _, _ = with_gradients(hf, ids(model_type, CORRUPTED), points)
    last = corrupted["last"] + clean["first"] - corrupted["first"]
    _, _, expected = with_gradients(
        hf, ids(model_type, CORRUPTED), {"last": points["last"]}, put=lambda _, x: last + 0 * x
    )
    keep = torch.zeros_like(found.edges)
    keep[:, -1] = True
    model = StandardizedTransformer(hf)
    got = of_edges(model, ids(model_type, CLEAN), ids(model_type, CORRUPTED), metric, found, keep)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_the_largest_are_kept_and_shown() -> None:
    found = attributed("llama")
    sizes = found.effect.mean(0).abs()
    kept = found.kept(10)
    assert int(kept.sum()) == 10
    assert float(sizes[kept].min()) >= float(sizes[~kept].max())
    top = found.top(10)
    assert [abs(score) for *_, score in top] == sorted(sizes[kept].tolist(), reverse=True)
    assert {(source, destination) for source, destination, _ in top} == {
        (found.sources[s], found.destinations[d]) for s, d in kept.nonzero().tolist()
    }
    assert int(found.kept(10**6).sum()) == int(found.edges.sum())


def test_what_cannot_be_is_said() -> None:
    model = StandardizedTransformer(shared("llama"))
    clean, corrupted = ids("llama", CLEAN), ids("llama", CORRUPTED)
    with pytest.raises(InputError, match="steps=0: it is a whole number, 1 or more"):
        edge_attribution(model, clean, corrupted, metric=metric, steps=0)
    with pytest.raises(InputError, match="The scores are of another model"):
        circuit_faithfulness(model, clean, corrupted, metric=metric, attribution=attributed("gpt2"))
    scores = attributed("llama")
    count = int(scores.edges.sum())
    for sizes in ([0, count + 1], [-1]):
        with pytest.raises(InputError, match=rf"{sizes[-1]} edges cannot be kept, there are {count} "):
            circuit_faithfulness(model, clean, corrupted, metric=metric, attribution=scores, sizes=sizes)
    with pytest.raises(InputError, match=r"compared token by token, but have \[9, 9\] and \[8, 8\] tokens"):
        edge_attribution(model, clean, corrupted[:, 1:], metric=metric)
    with pytest.raises(NotInThisModelError, match="the stream is normalised on its way through the layer"):
        edge_attribution(StandardizedTransformer(zoo.shared("bert")), clean, corrupted, metric=metric)


def test_the_plots_show_the_means() -> None:
    found = attributed("llama")
    few, edges = found.plot(k=3), found.top(3)
    drawn = [re.fullmatch(r"(.+) → (.+)<br>score: (.+)", trace.text) for trace in few.data if "→" in (trace.text or "")]
    assert [(edge[1], edge[2]) for edge in drawn] == [(source, destination) for source, destination, _ in edges]
    assert [float(edge[3]) for edge in drawn] == pytest.approx([score for *_, score in edges], rel=1e-2)
    every = found.plot(k=None)
    assert sum("→" in (trace.text or "") for trace in every.data) == int((found.effect.mean(0) != 0).sum())
    model = StandardizedTransformer(shared("llama"))
    curve = circuit_faithfulness(
        model, ids("llama", CLEAN), ids("llama", CORRUPTED), metric=metric, attribution=found, sizes=[0, 5]
    )
    assert torch.allclose(torch.tensor(curve.plot().data[0].y).float(), curve.recovered, atol=1e-6)


CAPITALS = {
    "France": " Paris",
    "Italy": " Rome",
    "Japan": " Tokyo",
    "Egypt": " Cairo",
    "Peru": " Lima",
    "Kenya": " Nairobi",
}


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_a_small_circuit_tells_capitals_apart_that_it_was_not_found_on(name: str) -> None:
    """64 of the 2188 or 2349 edges, found on three pairs of countries, on three others; against as many at random."""
    model = StandardizedTransformer(name)

    def pairs(countries: list[str]) -> dict[str, Any]:
        others = countries[1:] + countries[:1]
        right, wrong = (
            torch.tensor([model.tokenizer.encode(CAPITALS[country])[0] for country in one])[:, None]
            for one in (countries, others)
        )
        clean, corrupted = ([f"The capital of {country} is" for country in one] for one in (countries, others))
        metric = lambda logits: (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]  # noqa: E731
        return {"clean": clean, "corrupted": corrupted, "metric": metric}

    countries = list(CAPITALS)
    found = edge_attribution(model, **pairs(countries[:3]), steps=5)
    there = circuit_faithfulness(model, **pairs(countries[:3]), attribution=found, sizes=[64])
    elsewhere = circuit_faithfulness(model, **pairs(countries[3:]), attribution=found, sizes=[64])
    assert float(there.recovered[0]) > 0.9
    assert float(elsewhere.recovered[0]) > 0.8
    order = torch.rand(found.edges.shape, generator=torch.Generator().manual_seed(0)) * found.edges
    keep = order >= order.flatten().topk(64).values[-1]
    clean, corrupted, difference = pairs(countries[:3]).values()
    at_random = of_edges(model, clean, corrupted, difference, found, keep) - found.corrupted
    assert abs(float(at_random.mean())) < 0.1 * float((found.clean - found.corrupted).mean())
