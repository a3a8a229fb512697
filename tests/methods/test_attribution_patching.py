"""Attribution patching against plain hooks and autograd; where it is exact, against patching itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from architectures import build, prompt_ids
from attribution_reference import PLACES, TYPES, ids, metric, shared, with_gradients
from reference import edited
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import attribution_patching

CLEAN, CORRUPTED = 0, 1  # seeds


def layers_of(model_type: str) -> list[nn.Module]:
    return list(shared(model_type).get_submodule(PLACES[model_type].layers))


def naive(model_type: str, points: dict[Any, tuple[nn.Module, str]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """(clean - corrupted) · gradient, entry by entry; and the metric of both runs."""
    hf = shared(model_type)
    clean, _, one = with_gradients(hf, ids(model_type, CLEAN), points)
    corrupted, gradients, other = with_gradients(hf, ids(model_type, CORRUPTED), points)
    return [(clean[name] - corrupted[name]) * gradients[name] for name in points], one, other


@pytest.mark.parametrize("model_type", TYPES)
def test_the_map_of_the_stream(model_type: str) -> None:
    points = {i: (layer, "output") for i, layer in enumerate(layers_of(model_type))}
    products, clean, corrupted = naive(model_type, points)
    model = StandardizedTransformer(shared(model_type))
    found = attribution_patching(model, ids(model_type, CLEAN), ids(model_type, CORRUPTED), metric=metric)
    expected = torch.stack([product.sum(-1) for product in products], 1)
    assert found.layers == tuple(range(model.num_layers))
    assert torch.allclose(found.effect, expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.clean, clean, atol=1e-4)
    assert torch.allclose(found.corrupted, corrupted, atol=1e-4)
    whole = (clean - corrupted)[:, None, None]
    assert torch.allclose(found.normalized, expected / whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_map_of_the_heads(model_type: str) -> None:
    """What is given to the output projection, by heads."""
    layers, heads = layers_of(model_type), shared(model_type).config.num_attention_heads
    points = {i: (layer.get_submodule(PLACES[model_type].projection), "input") for i, layer in enumerate(layers)}
    products, _, _ = naive(model_type, points)
    expected = torch.stack([product.unflatten(-1, (heads, -1)).sum(-1) for product in products], 1)
    model = StandardizedTransformer(shared(model_type))
    found = attribution_patching(
        model, ids(model_type, CLEAN), ids(model_type, CORRUPTED), metric=metric, point="heads_output"
    )
    assert torch.allclose(found.effect, expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.heads, expected.sum(2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_dropping_gradients_through_each_layer(model_type: str) -> None:
    """The naive way: a hook that detaches what the layer has computed, but not its input."""
    hf, layers = shared(model_type), layers_of(model_type)
    projections = {i: (layer.get_submodule(PLACES[model_type].projection), "input") for i, layer in enumerate(layers)}
    clean, _, _ = with_gradients(hf, ids(model_type, CLEAN), projections)
    total: Any = 0.0
    for layer in layers:

        def drop(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            first = output if isinstance(output, Tensor) else output[0]
            first = first.detach() + stream - stream.detach()
            return first if isinstance(output, Tensor) else (first, *output[1:])

        handle = layer.register_forward_hook(drop, with_kwargs=True)
        corrupted, gradients, _ = with_gradients(hf, ids(model_type, CORRUPTED), projections)
        handle.remove()
        heads = hf.config.num_attention_heads
        each = [(clean[i] - corrupted[i]) * gradients[i] for i in projections]
        total = total + torch.stack([x.unflatten(-1, (heads, -1)).sum(-1).abs() for x in each], 1)
    model = StandardizedTransformer(hf)
    found = attribution_patching(
        model,
        ids(model_type, CLEAN),
        ids(model_type, CORRUPTED),
        metric=metric,
        point="heads_output",
        grad_drop=True,
    )
    assert torch.allclose(found.effect, total / (len(layers) - 1), rtol=1e-3, atol=1e-5)


def linear_at_the_end(model_type: str) -> StandardizedTransformer:
    """A model without a final norm: its logits are linear in what the last layer adds."""
    hf = build(model_type)
    path = PLACES.get(model_type, PLACES["gpt2"]).final
    owner, name = path.rsplit(".", 1)
    setattr(hf.get_submodule(owner), name, nn.Identity())
    return StandardizedTransformer(hf)


def really_patched(model: StandardizedTransformer, point: str, layer: int, where: Any) -> Tensor:
    """The metric's change by the patch itself."""
    clean, corrupted = prompt_ids(seed=CLEAN), prompt_ids(seed=CORRUPTED)
    with torch.no_grad():
        with model.trace(clean):
            new = getattr(model, point)[layer]
        with model.trace(corrupted):
            value = getattr(model, point)[layer].clone()
            value[where] = new[where]
            getattr(model, point)[layer] = value
            after = metric(model.logits[:, -1])
        return after - metric(model(corrupted).logits[:, -1])


@pytest.mark.parametrize(
    ("model_type", "point", "qk_fix"),
    [
        ("gpt2", "mlps_contribution", False),
        ("bloom", "mlps_contribution", False),
        ("cohere", "attentions_contribution", False),
        ("cohere", "heads_output", False),
        ("cohere", "values", False),
        ("cohere", "queries", True),
        ("cohere", "keys", True),
        ("gptj", "queries", True),
        ("gptj", "keys", True),
    ],
)
def test_it_is_exact_where_the_metric_is_linear(model_type: str, point: str, qk_fix: bool) -> None:
    """In the last layer; in a parallel block of the attention too, and with `qk_fix`, of queries and keys."""
    model = linear_at_the_end(model_type)
    last = model.num_layers - 1
    clean, corrupted = prompt_ids(seed=CLEAN), prompt_ids(seed=CORRUPTED)
    found = attribution_patching(model, clean, corrupted, metric=metric, point=point, layers=last, qk_fix=qk_fix)
    effects, by_head = found.effect[:, 0], point in ("queries", "keys", "values")
    for position in (2, 7, 8):
        for head in range(effects.shape[-1]) if effects.ndim == 3 else [slice(None)]:
            where = (slice(None), head, position) if by_head else (slice(None), position, head)
            expected = really_patched(model, point, last, where)
            mine = effects[:, position, head] if effects.ndim == 3 else effects[:, position]
            assert torch.allclose(mine, expected, rtol=1e-3, atol=2e-5), (position, head)
    assert float(effects.abs().max()) > 0.01


@pytest.mark.parametrize("point", ["queries", "keys"])
def test_without_the_fix_queries_and_keys_are_not_exact(point: str) -> None:
    model = linear_at_the_end("cohere")
    clean, corrupted = prompt_ids(seed=CLEAN), prompt_ids(seed=CORRUPTED)
    plain, fixed = (
        attribution_patching(model, clean, corrupted, metric=metric, point=point, qk_fix=fix).effect
        for fix in (False, True)
    )
    assert plain.shape == fixed.shape
    assert not torch.allclose(plain, fixed, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2", "qwen3_next"])
def test_the_fix_is_the_gradient_of_the_pattern_times_its_change(model_type: str) -> None:
    """Sinks, soft caps, a hybrid: each query and key is patched alone, and the pattern read."""
    model = StandardizedTransformer(zoo.build(model_type))
    hf = model.hf_model
    clean, corrupted = zoo.ids(hf, seed=0, seq=6), zoo.ids(hf, seed=1, seq=6)
    layer = model.attention_layers[-1]
    with model.trace(corrupted):
        pattern = model.attention_probabilities[layer]
        pattern.retain_grad()
        metric(model.logits[:, -1]).sum().backward()
    assert pattern.grad is not None
    for point in ("queries", "keys"):
        found = attribution_patching(model, clean, corrupted, metric=metric, point=point, layers=layer, qk_fix=True)
        with torch.no_grad(), model.trace(clean):
            new = getattr(model, point)[layer]
        for head in range(found.effect.shape[-1]):
            with torch.no_grad(), model.trace(corrupted):
                value = getattr(model, point)[layer].clone()
                value[:, head, 3] = new[:, head, 3]
                getattr(model, point)[layer] = value
                other = model.attention_probabilities[layer]
            expected = ((other - pattern) * pattern.grad).sum((1, 2, 3)).detach()
            assert torch.allclose(found.effect[:, 0, 3, head], expected, rtol=1e-3, atol=1e-6)


def test_dropping_gradients_with_the_fix() -> None:
    """The fix is linear in the gradient at the pattern: so it is the mean over passes here as well."""
    model = StandardizedTransformer(shared("llama"))
    clean, corrupted = ids("llama", CLEAN), ids("llama", CORRUPTED)
    found = attribution_patching(
        model, clean, corrupted, metric=metric, point="keys", layers=1, qk_fix=True, grad_drop=True
    )
    with torch.no_grad():
        with model.trace(clean):
            new = model.keys[1]
        patterns = []
        for t in (None, 4):
            with model.trace(corrupted):
                keys = model.keys[1].clone()
                if t is not None:
                    keys[:, :, t] = new[:, :, t]
                model.keys[1] = keys
                patterns.append(model.attention_probabilities[1])
    total = torch.zeros(2, 2)
    for dropped in range(model.num_layers):
        with model.trace(corrupted):
            pattern = None
            for i in range(model.num_layers):
                before = model.layers_input[i]
                if i == 1:
                    pattern = model.attention_probabilities[i]
                    pattern.retain_grad()
                if i == dropped:
                    model.layers_output[i] = model.layers_output[i].detach() + before - before.detach()
            value = metric(model.logits[:, -1]).sum()
        assert pattern is not None
        (gradient,) = torch.autograd.grad(value, pattern, allow_unused=True)
        if gradient is not None:
            total += ((patterns[1] - patterns[0]) * gradient).sum((2, 3)).unflatten(1, (2, 2)).sum(-1).abs()
    assert torch.allclose(found.effect[:, 0, 4], total / 2, rtol=1e-3, atol=1e-6)


def test_patterns_and_scores_by_query_and_key() -> None:
    model = StandardizedTransformer(shared("llama"))
    clean, corrupted = ids("llama", CLEAN), ids("llama", CORRUPTED)
    for point in ("attention_probabilities", "attention_scores"):
        found = attribution_patching(model, clean, corrupted, metric=metric, point=point)
        assert found.effect.shape == (2, 3, 4, 9, 9)
        assert torch.equal(found.effect, found.effect.tril())
        assert float(found.effect.abs().max()) > 1e-3
        assert torch.equal(found.heads, found.effect.sum((3, 4)))


@pytest.mark.parametrize(
    ("model_type", "point"), [("gpt2", "layers_output"), ("qwen3_next", "heads_output"), ("gemma2", "keys")]
)
def test_padding_does_not_show(model_type: str, point: str) -> None:
    model = StandardizedTransformer(zoo.shared(model_type))
    clean, corrupted = (zoo.ids(model.hf_model, seed=seed).tolist() for seed in (CLEAN, CORRUPTED))
    short = attribution_patching(model, [clean[0][:6]], [corrupted[0][:6]], metric=metric, point=point)
    both = attribution_patching(
        model, [clean[0][:6], clean[1]], [corrupted[0][:6], corrupted[1]], metric=metric, point=point
    )
    assert torch.allclose(both.effect[:1, :, 3:], short.effect, rtol=1e-3, atol=1e-4)
    assert not both.effect[0, :, :3].any()


def test_weights_without_gradients_do_as_well() -> None:
    hf = zoo.build("gpt2")
    model, clean, corrupted = StandardizedTransformer(hf), zoo.ids(hf, seed=0), zoo.ids(hf, seed=1)
    expected = attribution_patching(model, clean, corrupted, metric=metric)
    hf.requires_grad_(False)
    with torch.no_grad():
        found = attribution_patching(model, clean, corrupted, metric=metric)
    assert torch.equal(found.effect, expected.effect)
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_the_lasting_edits_of_a_model_are_in_it() -> None:
    model = StandardizedTransformer(shared("llama"))
    edited_model = model.edit(lambda: model.skip_layer(1))
    assert edited_model is not None
    clean, corrupted = ids("llama", CLEAN), ids("llama", CORRUPTED)
    found = attribution_patching(edited_model, clean, corrupted, metric=metric)
    assert torch.allclose(found.effect[:, 0], found.effect[:, 1])
    plain = attribution_patching(model, clean, corrupted, metric=metric)
    assert not torch.allclose(plain.effect[:, 0], plain.effect[:, 1])


def test_layers_of_a_hybrid() -> None:
    model = StandardizedTransformer(zoo.shared("jamba"))
    clean, corrupted = (zoo.ids(model.hf_model, seed=seed) for seed in (0, 1))
    assert attribution_patching(model, clean, corrupted, metric=metric, point="heads_output").layers == (1, 3)
    assert attribution_patching(model, clean, corrupted, metric=metric, layers=[-1, 0]).layers == (0, 3)
    with pytest.raises(NotInThisModelError, match=r"heads_output\[0\]: this layer has none: its token mixer is mamba"):
        attribution_patching(model, clean, corrupted, metric=metric, point="heads_output", layers=0)


def test_layers_of_another_number_of_heads_are_chosen() -> None:
    model = StandardizedTransformer(zoo.shared("dots3_note_text"))
    clean, corrupted = (zoo.ids(model.hf_model, seed=seed) for seed in (CLEAN, CORRUPTED))
    with pytest.raises(InputError, match=r"heads_output is not as large in each layer: \{0: \(9, 4\), 1: \(9, 2\)"):
        attribution_patching(model, clean, corrupted, metric=metric, point="heads_output")
    found = attribution_patching(model, clean, corrupted, metric=metric, point="heads_output", layers=[0])
    assert found.effect.shape == (2, 1, 9, 4)


@pytest.mark.parametrize("point", ["keys", "queries"])
def test_keys_that_are_no_positions_have_effects_too(point: str) -> None:
    """DeepSeek-V4 has keys of several positions each, behind the others: patched one by one."""
    model = StandardizedTransformer(zoo.shared("deepseek_v4"), validate=False)  # which refuses them
    clean, corrupted = (zoo.ids(model.hf_model, seed=seed) for seed in (CLEAN, CORRUPTED))
    found = attribution_patching(model, clean, corrupted, metric=metric, point=point, layers=1, qk_fix=True)
    assert found.effect.shape[2] == (11 if point == "keys" else 9)
    refused = {
        "keys": (InputError, "is not as large in each layer"),
        "queries": (NotInThisModelError, r"\[2\]: .* in pieces: what comes first has 8 positions"),
    }
    with pytest.raises(refused[point][0], match=refused[point][1]):
        attribution_patching(model, clean, corrupted, metric=metric, point=point, qk_fix=True)
    assert bool(found.effect.abs().sum((0, 1, 3)).bool().any())


def test_what_cannot_be_is_said() -> None:
    model = StandardizedTransformer(shared("llama"))
    clean, corrupted = ids("llama", CLEAN), ids("llama", CORRUPTED)
    with pytest.raises(InputError, match=r"compared token by token, but have \[9, 9\] and \[8, 8\] tokens"):
        attribution_patching(model, clean, corrupted[:, 1:], metric=metric)
    with pytest.raises(
        InputError, match="'logits' is no standard name of layers: give one of layers_input, layers_output"
    ):
        attribution_patching(model, clean, corrupted, metric=metric, point="logits")
    with pytest.raises(InputError, match="qk_fix is for point='queries' and 'keys', not for 'values'"):
        attribution_patching(model, clean, corrupted, metric=metric, point="values", qk_fix=True)
    with pytest.raises(InputError, match=r"a tensor of \(2,\). It returned a tensor of \(\)"):
        attribution_patching(model, clean, corrupted, metric=lambda logits: metric(logits).mean())
    with pytest.raises(LayerIndexError, match="the model has 3 layers"):
        attribution_patching(model, clean, corrupted, metric=metric, layers=3)
    found = attribution_patching(model, clean, corrupted, metric=metric)
    with pytest.raises(InputError, match="layers_output is not by heads"):
        found.heads


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_it_is_like_patching_itself_and_finds_where_the_country_is(name: str) -> None:
    """Each activation is really patched, by a plain hook. The figures are in docs/methods/attribution_patching.md."""
    model = StandardizedTransformer(name)
    hf, encode = model.hf_model, model.tokenizer.encode
    right, wrong = encode(" Paris")[0], encode(" Rome")[0]
    clean, corrupted = (torch.tensor([encode(f"The capital of {country} is")]) for country in ("France", "Italy"))
    found = attribution_patching(model, clean, corrupted, metric=lambda logits: logits[:, right] - logits[:, wrong])
    layers = list(hf.get_submodule("transformer.h" if name == "demo:gpt2" else "model.layers"))
    real = torch.zeros(len(layers), clean.shape[1])
    for i, layer in enumerate(layers):
        kept: list[Tensor] = []
        edited(lambda: hf(clean), layer, "output", lambda x, kept=kept: kept.append(x) or x)  # type: ignore[misc]
        for t in range(clean.shape[1]):

            def patch(x: Tensor, t: int = t, new: Tensor = kept[0]) -> Tensor:
                return torch.cat([x[:, :t], new[:, t : t + 1], x[:, t + 1 :]], 1)

            logits = edited(lambda: hf(corrupted), layer, "output", patch).logits[0, -1]
            real[i, t] = logits[right] - logits[wrong] - found.corrupted[0]
    correlation = torch.corrcoef(torch.stack([found.effect[0].flatten(), real.flatten()]))[0, 1]
    assert float(correlation) > 0.95
    assert int(real[0].argmax()) == int(found.effect[0, 0].argmax()) == 3
    assert int(real[-1].argmax()) == int(found.effect[0, -1].argmax()) == 4


def test_the_fix_is_nearer_to_patching_itself() -> None:
    """Of the keys of demo:llama, each head and position really patched."""
    model = StandardizedTransformer("demo:llama")
    right, wrong = (model.tokenizer.encode(token)[0] for token in (" Paris", " Rome"))
    clean, corrupted = "The capital of France is", "The capital of Italy is"

    def measure(logits: Tensor) -> Tensor:
        return logits[:, right] - logits[:, wrong]

    plain, fixed = (
        attribution_patching(model, clean, corrupted, metric=measure, point="keys", qk_fix=fix) for fix in (False, True)
    )
    real = torch.zeros_like(plain.effect[0])
    with torch.no_grad():
        with model.trace(clean):
            new = [model.keys[i] for i in range(model.num_layers)]
        for layer, position, head in torch.cartesian_prod(*map(torch.arange, real.shape)).tolist():
            with model.trace(corrupted):
                keys = model.keys[layer].clone()
                keys[:, head, position] = new[layer][:, head, position]
                model.keys[layer] = keys
                real[layer, position, head] = measure(model.logits[:, -1]) - plain.corrupted
    near, far = (
        float(torch.corrcoef(torch.stack([found.effect.flatten(), real.flatten()]))[0, 1]) for found in (fixed, plain)
    )
    assert near > 0.9
    assert far < 0.7


@pytest.mark.parametrize("point", ["layers_output", "heads_output"])
def test_the_plot_shows_the_mean(point: str) -> None:
    model = StandardizedTransformer(shared("llama"))
    found = attribution_patching(model, ids("llama", CLEAN), ids("llama", CORRUPTED), metric=metric, point=point)
    shown = torch.tensor(found.plot().data[0].z).float()
    expected = found.effect if point == "layers_output" else found.heads
    assert torch.allclose(shown, expected.mean(0), atol=1e-6)


@pytest.mark.parametrize("model_type", ["phi", "olmo2", "cohere", "falcon"])
@pytest.mark.parametrize("point", ["attentions_input", "mlps_input"])
def test_an_input_that_other_modules_are_given_too(model_type: str, point: str) -> None:
    """Against a finite difference of what is assigned there: neither a parallel MLP nor the residual has a share."""
    hf = build(model_type).double()
    model, (clean, corrupted) = (
        StandardizedTransformer(hf),
        (ids(model_type, seed) for seed in (CLEAN, CORRUPTED)),
    )
    accessor = getattr(model, point)

    def run(new: Tensor | None = None, prompt: Tensor = corrupted) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), model.trace(prompt, use_cache=False):
            value = accessor[1].clone()
            if new is not None:
                accessor[1] = new
            return value, metric(model.logits[:, -1])

    there, here = run(prompt=clean)[0], run()[0]
    up, down = (run(here + sign * 1e-2 * (there - here))[1] for sign in (1, -1))
    effects = attribution_patching(model, clean, corrupted, metric=metric, point=point, layers=1).effect
    expected = (up - down) / 2e-2  # norms are computed in float32
    assert torch.allclose(effects.sum((1, 2)).double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
