"""Path patching against the same with every part between frozen, and not by arithmetic on the stream."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import zoo
from architectures import PLACES, prompt_ids, shared
from reference import hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import logit_difference, path_patching

FEW = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "mixtral", "gptj", "falcon")
ZOO = ("falcon_h1", "jamba", "lfm2", "qwen3_next", "recurrent_gemma")
CLEAN, CORRUPTED = prompt_ids(seed=1), prompt_ids(seed=2)
METRIC = logit_difference([20, 30], [40, 50])

#: The module whose output is what is added to the stream, beside the attention's and MLP's own: norms behind these.
ADDED = {"gemma2": ("post_attention_layernorm", "post_feedforward_layernorm")}


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def put(stack: ExitStack, module: nn.Module, new: Tensor) -> None:
    """Have this be the module's output."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return new if isinstance(out, Tensor) else (new, *out[1:])

    stack.callback(module.register_forward_hook(hook).remove)


def run(hf: nn.Module) -> Tensor:
    with torch.no_grad():
        return METRIC(hf(CORRUPTED).logits[:, -1])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("sender", ["mlp", "attention", "head"])
def test_to_the_logits_by_hooks(model_type: str, sender: str) -> None:
    """Layer 1's part is the other run's, and whatever adds to the stream after it is frozen."""
    hf = shared(model_type)
    layers, *parts = PLACES[model_type]
    blocks = list(hf.get_submodule(layers))
    attentions, mlps = ([block.get_submodule(part) for block in blocks] for part in ADDED.get(model_type, parts))
    added = {("attention", i): (module, "output") for i, module in enumerate(attentions)}
    added |= {("mlp", i): (module, "output") for i, module in enumerate(mlps)}
    frozen = hooked(hf, lambda: hf(CORRUPTED), added)
    clean = hooked(hf, lambda: hf(CLEAN), added)
    name = {
        "mlp": "mlps_contribution[1]",
        "attention": "attentions_contribution[1]",
        "head": "heads_output[1][2]",
    }[sender]
    attention = blocks[1].get_submodule(parts[0])
    projection = attention.c_proj if model_type == "gpt2" else attention.o_proj
    inputs = hooked(hf, lambda: hf(CLEAN), {0: (projection, "input")})
    with ExitStack() as stack:
        for (part, i), (module, _) in added.items():
            if i > 1 or (i == 1 and part == "mlp" and sender != "mlp"):
                put(stack, module, frozen[part, i])
        if sender == "head":
            values = inputs[0]

            def replace_head(_: nn.Module, args: Any) -> Any:
                width = args[0].shape[-1] // 4
                value = args[0].clone()
                value[..., 2 * width : 3 * width] = values[..., 2 * width : 3 * width]
                return (value,)

            stack.callback(projection.register_forward_pre_hook(replace_head).remove)
        else:
            module = added[sender, 1][0]
            put(stack, module, clean[sender, 1])
        expected = run(hf)
    found = path_patching(
        StandardizedTransformer(hf),
        clean=CLEAN,
        corrupted=CORRUPTED,
        sender=name,
        receivers="logits",
        metric=METRIC,
        progress=False,
    )
    assert same(found.effect[:, 0], expected)
    assert not same(run(hf), expected), "the path has to matter"
    assert torch.allclose(found.corrupted, run(hf), rtol=1e-4)


def frozen_by_traces(model: StandardizedTransformer, ids: tuple[Tensor, Tensor], sender: Any, receivers: Any) -> Tensor:
    """With all contributions between assigned in traces; sender and receivers are (point, layer, head)."""
    source, base = ids
    mixers, mlps = model.mixers_contribution, model.mlps_contribution

    def has(accessor: Any, layer: int) -> bool:
        try:
            accessor.module(layer)
        except NotInThisModelError:
            return False
        return True

    own: dict[Any, Tensor] = {}
    point, at, head = sender
    with torch.no_grad(), model.trace(base):
        for layer in range(model.num_layers):
            for accessor in (mixers, mlps):
                if has(accessor, layer):
                    own[accessor.name, layer] = accessor[layer]
    with torch.no_grad(), model.trace(source):
        sent = getattr(model, point)[at]

    heard: dict[Any, Tensor] = {}
    with torch.no_grad(), model.trace(base):
        for layer in range(at, model.num_layers):
            if (point, layer) == ("heads_output", at):
                value = model.heads_output[layer].clone()
                value[:, :, head] = sent[:, :, head]
                model.heads_output[layer] = value
            for name in ("queries", "keys", "values"):
                if any(one[:2] == (name, layer) for one in receivers):
                    heard[name, layer] = getattr(model, name)[layer]
            if has(mixers, layer) and layer > at:
                mixers[layer] = own["mixers_contribution", layer]
            if has(mlps, layer):
                if ("mlps_contribution", layer, None) in receivers:
                    heard["mlps_contribution", layer] = mlps[layer].clone()
                mlps[layer] = sent if (point, layer) == ("mlps_contribution", at) else own["mlps_contribution", layer]
        if "logits" in receivers:
            heard["logits", 0] = model.layers_output[-1]
    with torch.no_grad(), model.trace(base):
        ends = [one for one in receivers if one != "logits"]
        for name, layer, which in sorted(
            ends, key=lambda one: (one[1], one[0] == "mlps_contribution", "qkvm".index(one[0][0]))
        ):
            value = getattr(model, name)[layer].clone()
            index = (slice(None), which) if which is not None else (slice(None),)
            value[index] = heard[name, layer][index]
            getattr(model, name)[layer] = value
        if "logits" in receivers and not ends:
            model.layers_output[-1] = heard["logits", 0]
        logits = model.logits[:, -1]
    return METRIC(logits)


def check(model: StandardizedTransformer, ids: tuple[Tensor, Tensor], sender: Any, receivers: list[Any]) -> None:
    def text(one: Any) -> str:
        if one == "logits":
            return one
        return f"{one[0]}[{one[1]}]" + (f"[{one[2]}]" if one[2] is not None else "")

    found = path_patching(
        model,
        clean=ids[0],
        corrupted=ids[1],
        sender=text(sender),
        receivers=[text(one) for one in receivers],
        metric=METRIC,
        progress=False,
    )
    expected = frozen_by_traces(model, ids, sender, receivers)
    assert same(found.effect[:, 0], expected), (sender, receivers, found.effect, expected)
    assert (found.effect[:, 0] - found.corrupted).abs().max() > 1e-5, "the path has to matter"


@pytest.mark.parametrize("model_type", FEW)
def test_every_other_part_is_frozen(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    ids = CLEAN, CORRUPTED
    check(model, ids, ("heads_output", 0, 1), [("queries", 2, 3)])
    check(model, ids, ("mlps_contribution", 0, None), [("keys", 2, 0), ("values", 1, None)])
    check(model, ids, ("heads_output", 0, 3), [("mlps_contribution", 2, None)])
    check(model, ids, ("mlps_contribution", 1, None), ["logits"])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "granite", "gpt_oss", "bloom", "mixtral"])
def test_an_mlp_hears_its_own_layers_heads(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    check(model, (CLEAN, CORRUPTED), ("heads_output", 1, 2), [("mlps_contribution", 1, None)])


@pytest.mark.parametrize("model_type", ZOO)
def test_layers_of_any_kind(model_type: str) -> None:
    hf = zoo.build(model_type)
    model = StandardizedTransformer(hf)
    ids = zoo.ids(hf, seed=1), zoo.ids(hf, seed=2)
    last = model.num_layers - 1
    check(model, ids, ("mlps_contribution", 0, None), [("mlps_contribution", last, None)])
    check(model, ids, ("mlps_contribution", 1, None), ["logits"])
    head, *_ = model.attention_layers
    if head < last:
        check(model, ids, ("heads_output", head, 1), [("mlps_contribution", last, None)])


def test_senders_are_patched_one_at_a_time() -> None:
    model = StandardizedTransformer(shared("llama"))
    senders = [f"heads_output[{layer}][{head}]" for layer in (0, 1) for head in range(4)] + ["mlps_contribution[1]"]
    options: dict[str, Any] = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "receivers": ["queries[2]", "logits"],
        "metric": METRIC,
        "progress": False,
    }
    together = path_patching(model, sender=senders, batch_size=8, **options)
    assert together.effect.shape == (2, 9)
    for i, sender in enumerate(senders):
        assert torch.allclose(
            path_patching(model, sender=sender, **options).effect[:, 0], together.effect[:, i], rtol=1e-4
        )
    noising = path_patching(model, sender=senders, mode="noising", **options)
    swapped = path_patching(model, sender=senders, **{**options, "clean": CORRUPTED, "corrupted": CLEAN})
    assert torch.allclose(noising.effect, swapped.effect, rtol=1e-4)
    assert torch.equal(noising.clean, swapped.corrupted)
    ends = together.clean[:, None], together.corrupted[:, None]
    assert torch.allclose(together.normalized, (together.effect - ends[1]) / (ends[0] - ends[1]))
    assert len(together.plot().data) >= 1


def test_positions_of_the_sender() -> None:
    model = StandardizedTransformer(shared("llama"))
    with torch.no_grad(), model.trace(CLEAN):
        clean = model.mlps_contribution[2]
    with torch.no_grad(), model.trace(CORRUPTED):
        value = model.mlps_contribution[2].clone()
        value[:, -1] = clean[:, -1]
        model.mlps_contribution[2] = value
        expected = METRIC(model.logits[:, -1])
    options: dict[str, Any] = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "progress": False}
    options |= {"sender": "mlps_contribution[2]", "receivers": "logits"}
    assert same(path_patching(model, positions=[-1], **options).effect[:, 0], expected)
    elsewhere = path_patching(model, positions=[0, 3], **options)
    assert torch.allclose(elsewhere.effect[:, 0], elsewhere.corrupted, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bloom"])
def test_padding_does_not_show(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    long, short = (
        [ids.tolist() for ids in prompt_ids(seed=3)],
        [ids.tolist() for ids in prompt_ids(seq=6, seed=4)],
    )
    options: dict[str, Any] = {
        "sender": ["heads_output[0][1]", "mlps_contribution[0]"],
        "receivers": ["queries[1][0]", "mlps_contribution[2]"],
        "metric": logit_difference(20, 30),
        "progress": False,
    }
    both = path_patching(model, clean=[long[0], short[0]], corrupted=[long[1], short[1]], **options)
    for pair, (clean, corrupted) in enumerate([long, short]):
        assert same(both.effect[pair], path_patching(model, clean=clean, corrupted=corrupted, **options).effect)


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_the_last_parts_say_the_answer_directly(name: str) -> None:
    """The last layer's MLP has no other way than the direct one; all direct paths of a layer are in the sum."""
    model = StandardizedTransformer(name)
    last = model.num_layers - 1
    clean, corrupted = "The capital of France is", "The capital of Japan is"
    metric = logit_difference(" Paris", " Tokyo", model)
    found = path_patching(
        model,
        clean=clean,
        corrupted=corrupted,
        sender=[f"mlps_contribution[{i}]" for i in range(last + 1)],
        receivers="logits",
        metric=metric,
        progress=False,
    )
    with torch.no_grad(), model.trace(clean):
        sent = model.mlps_contribution[last]
    with torch.no_grad(), model.trace(corrupted):
        model.mlps_contribution[last] = sent
        expected = metric(model.logits[:, -1])
    assert torch.allclose(found.effect[-1], expected, rtol=1e-4)
    assert found.normalized.argmax() > last // 2, "what names the answer is late"
    assert found.normalized[0] < 0.1


def test_a_stream_that_is_no_sum_is_refused() -> None:
    hf = zoo.build("minimax")
    ids = zoo.ids(hf)
    with pytest.raises(NotInThisModelError, match="the stream is normalised on its way through the layer"):
        path_patching(
            StandardizedTransformer(hf),
            clean=ids,
            corrupted=ids.flip(0),
            sender="heads_output[0]",
            receivers="logits",
            metric=METRIC,
            progress=False,
        )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"sender": "queries[0]"},
            InputError,
            "'queries[0]' is none of heads_output[layer][head], attentions_contribution[layer]",
        ),
        ({"receivers": "layers_output[2]"}, InputError, "mlps_contribution[layer], logits."),
        ({"sender": "mlps_contribution[0][1]"}, InputError, "'mlps_contribution[0][1]' is none of"),
        (
            {"receivers": "queries[1]", "sender": "mlps_contribution[1]"},
            InputError,
            "queries[1] comes before mlps_contribution[1]",
        ),
        (
            {"receivers": "queries[1]", "sender": "heads_output[1][0]"},
            InputError,
            "queries[1] comes before heads_output[1][0]",
        ),
        ({"sender": []}, InputError, "Give at least one sender and one receiver."),
        ({"sender": "heads_output[3]"}, LayerIndexError, "heads_output[3]: the model has 3 layers, 0 to 2."),
        ({"mode": "both"}, InputError, "mode='both'"),
    ],
)
def test_what_is_no_path_is_said(options: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"sender": "heads_output[0]", "receivers": "logits", **options}
    with pytest.raises(error) as raised:
        path_patching(
            StandardizedTransformer(shared("llama")),
            clean=CLEAN,
            corrupted=CORRUPTED,
            metric=METRIC,
            progress=False,
            **given,
        )
    assert text in str(raised.value)
