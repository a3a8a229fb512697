"""A mixture of experts' routing: against plain hooks on the router and on the experts, written down by hand for each type."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from architectures import build, prompt_ids, shared
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, NotInThisModelError
from nnatomy.names import ROUTERS
from nnatomy.standardized import shown as inside
from nnatomy.standardized.record import Record, Result, Value


class Place(NamedTuple):
    """In a sparse layer: the router and the experts, which are given (hidden, indices, weights)."""

    layer: str
    router: str
    experts: str


_MLP = Place("model.layers.1", "mlp.gate", "mlp.experts")
_ZOO_MLP = _MLP._replace(layer="model.layers.2")
PLACE = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"), _MLP),
    "gpt_oss": _MLP._replace(router="mlp.router"),
    "zoo granitemoe": Place("model.layers.1", "block_sparse_moe.router", "block_sparse_moe.experts"),
    "zoo jamba": Place("model.layers.3", "feed_forward.router", "feed_forward.experts"),
    "zoo lfm2_moe": Place("model.layers.2", "feed_forward.gate", "feed_forward.experts"),
    "zoo phimoe": _ZOO_MLP._replace(router="mlp.router"),
    "zoo aria_text": _ZOO_MLP._replace(router="mlp.router"),
    "zoo afmoe": _ZOO_MLP._replace(router="mlp.router"),
    "zoo dbrx": Place("transformer.blocks.1", "ffn.router.layer", "ffn.experts"),
    **dict.fromkeys(
        (
            "zoo olmoe",
            "zoo flint",
            "zoo zaya",
            "zoo ernie4_5_moe",
            "zoo minimax_m2",
            "zoo glm4_moe",
            "zoo flex_olmo",
        ),
        _ZOO_MLP,
    ),
}
#: Types that choose the experts of the largest logits (others add a bias first, or choose among groups).
BY_LOGITS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "zoo granitemoe",
    "zoo jamba",
    "zoo olmoe",
    "zoo flint",
    "zoo dbrx",
]


@functools.cache
def loaded(name: str) -> StandardizedTransformer:
    zoo_type = name.removeprefix("zoo ")
    return StandardizedTransformer(shared(name)) if name == zoo_type else zoo.loaded(zoo_type)


def ids_of(name: str, **sizes: int) -> Tensor:
    return zoo.ids(loaded(name).hf_model, **sizes) if name.startswith("zoo ") else prompt_ids(**sizes)


def parts(name: str) -> tuple[int, nn.Module, nn.Module]:
    """The layer's number, its router, its experts."""
    place = PLACE[name]
    layer = loaded(name).hf_model.get_submodule(place.layer)
    assert isinstance(layer, nn.Module)
    number = int(place.layer.rpartition(".")[2])
    return number, layer.get_submodule(place.router), layer.get_submodule(place.experts)


def run(name: str, call: Callable[[], Any], edit: Callable[..., tuple[Tensor, Tensor]] | None = None) -> Any:
    """What `call` gives, and logits, experts and weights as plain hooks see them; `edit` takes and gives the last two."""
    _, router, experts = parts(name)
    seen: dict[str, Tensor] = {}

    def routed(_module: nn.Module, _args: Any, output: Any) -> None:
        found = (output,) if isinstance(output, Tensor) else output
        is_first = found[0].is_floating_point()  # else the experts are: GraniteMoe's, in older releases
        seen["routers_logits"] = found[0 if is_first else -1].clone()

    def given(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert not kwargs
        hidden, indices, weights = args
        seen["routers_experts"], seen["routers_weights"] = indices.clone(), weights.clone()
        return ((hidden, *edit(indices, weights)), kwargs) if edit else None

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        indices, weights = type(experts).route_tokens_to_experts(experts, logits)
        seen["routers_experts"], seen["routers_weights"] = indices.clone(), weights.clone()
        return edit(indices, weights) if edit else (indices, weights)

    handles = [router.register_forward_hook(routed)]
    if chooses := hasattr(experts, "route_tokens_to_experts"):  # Aria's in older releases, given the logits
        experts.route_tokens_to_experts = choose
    else:
        handles.append(experts.register_forward_pre_hook(given, with_kwargs=True))
    try:
        with torch.no_grad():
            return call(), seen
    finally:
        if chooses:
            del experts.route_tokens_to_experts
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", PLACE)
def test_they_are_what_the_router_gives_and_the_experts_are_given(name: str) -> None:
    model, ids = loaded(name), ids_of(name)
    i, _, _ = parts(name)
    logits, expected = run(name, lambda: model.hf_model(ids).logits)
    with torch.no_grad(), model.trace(input_ids=ids):
        seen = {one: getattr(model, one)[i] for one in ROUTERS}
        assert torch.equal(model.logits, logits)
    for one, value in seen.items():
        assert value.shape[:2] == ids.shape, one
        assert torch.equal(value.to(expected[one].dtype), expected[one].reshape(value.shape)), one
    assert seen["routers_experts"].shape == seen["routers_weights"].shape
    assert not seen["routers_experts"].is_floating_point()
    if name in BY_LOGITS:
        k = seen["routers_experts"].shape[-1]
        best = seen["routers_logits"].topk(k).indices
        assert torch.equal(best.sort(-1).values, seen["routers_experts"].sort(-1).values)


@pytest.mark.parametrize("name", PLACE)
def test_writing_them_is_what_a_hook_does(name: str) -> None:
    model, ids = loaded(name), ids_of(name)
    i, _, _ = parts(name)
    logits, routing = run(name, lambda: model.hf_model(ids).logits)
    count = routing["routers_logits"].shape[-1]
    for one, edit in (
        ("routers_experts", lambda indices, weights: ((indices + 1) % count, weights)),
        ("routers_weights", lambda indices, weights: (indices, weights * 0.25)),
    ):
        expected, _ = run(name, lambda: model.hf_model(ids).logits, edit)
        with torch.no_grad(), model.trace(input_ids=ids):
            old = getattr(model, one)[i]
            getattr(model, one)[i] = (old + 1) % count if one == "routers_experts" else old * 0.25
            if one == "routers_experts" and name in _GATHERED:
                continue  # the weights are taken for these experts then: see below
            new = model.logits
        assert torch.equal(new, expected), one
        # FlexOlmo has a norm behind its experts: as large as one likes, the weights give the same.
        assert torch.allclose(new, logits, atol=1e-3) == (name == "zoo flex_olmo" and one == "routers_weights")


@pytest.mark.parametrize("name", PLACE)
def test_writing_them_back_changes_nothing(name: str) -> None:
    model, ids = loaded(name), ids_of(name)
    i, _, _ = parts(name)
    with torch.no_grad(), model.trace(input_ids=ids):
        for one in ROUTERS:
            getattr(model, one)[i] = getattr(model, one)[i].clone()
        logits = model.logits
    with torch.no_grad():
        assert torch.equal(logits, model.hf_model(ids).logits)


#: Types that look the weights up for the experts chosen.
_GATHERED = {
    *(
        "deepseek_v3",
        "zoo lfm2_moe",
        "zoo phimoe",
        "zoo afmoe",
        "zoo zaya",
        "zoo ernie4_5_moe",
        "zoo minimax_m2",
        "zoo glm4_moe",
    ),
}


def test_weights_are_looked_up_for_the_experts_that_are_written() -> None:
    model, ids = loaded("deepseek_v3"), prompt_ids()
    _, router, _ = parts("deepseek_v3")
    with torch.no_grad(), model.trace(ids):
        logits = model.routers_logits[1]
        model.routers_experts[1] = (model.routers_experts[1] + 1) % 4
        experts, weights = model.routers_experts[1], model.routers_weights[1]
    gathered = logits.sigmoid().gather(-1, experts)
    assert torch.allclose(weights, gathered / gathered.sum(-1, keepdim=True) * router.routed_scaling_factor)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_writing_logits_chooses_anew(name: str) -> None:
    model, ids = loaded(name), ids_of(name)
    with torch.no_grad(), model.trace(ids):
        logits = -3 * model.routers_logits[1]
        model.routers_logits[1] = logits
        experts, weights, after = model.routers_experts[1], model.routers_weights[1], model.logits
    top = logits.softmax(-1).topk(2)
    norm = top.values.sum(-1, keepdim=True) if name == "mixtral" else 1
    assert torch.equal(experts, top.indices)
    assert torch.allclose(weights, top.values / norm)
    chosen, _ = run(name, lambda: model.hf_model(ids).logits, lambda *_: (experts.flatten(0, 1), weights.flatten(0, 1)))
    assert torch.allclose(after, chosen, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "zoo granitemoe"])
def test_other_prompts_and_padding_do_not_show(name: str) -> None:
    model = loaded(name)
    i = 1
    names = [one for one in ROUTERS if getattr(model, one).modules[i] is not None]
    assert set(names) >= {"routers_logits", "routers_experts"}
    long, short = ids_of(name, batch=1, seq=9)[0].tolist(), ids_of(name, batch=1, seq=4, seed=1)[0].tolist()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(long):
            first = [getattr(model, one)[i] for one in names]
            unedited = model.logits
        with tracer.invoke([short, short]):
            pair = [getattr(model, one)[i] for one in names]
            last = getattr(model, names[-1])
            last[i] = last[i].flip(-1)
            edited = model.logits
    with torch.no_grad():
        with model.trace(long):
            first_alone = [getattr(model, one)[i] for one in names]
            logits = model.logits
        with model.trace([short, short]):
            pair_alone = [getattr(model, one)[i] for one in names]
            last = getattr(model, names[-1])
            last[i] = last[i].flip(-1)
            edited_alone = model.logits
        with model.trace([short, short]):
            plain = model.logits
    for one, other in zip(
        (*first, *pair, unedited, edited), (*first_alone, *pair_alone, logits, edited_alone), strict=True
    ):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(edited, plain, atol=1e-3)


def test_steps_of_a_generation() -> None:
    model, ids = loaded("mixtral"), prompt_ids()
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected, _ = run("mixtral", lambda: model.hf_model.generate(ids, **options), lambda i, w: (i, w.flip(-1)))
    shapes = []
    with torch.no_grad(), model.generate(ids, **options) as tracer:
        for _ in tracer.iter[:]:
            weights = model.routers_weights[1]
            shapes.append(tuple(weights.shape))
            model.routers_weights[1] = weights.flip(-1)
        assert torch.equal(tracer.result, expected)
    assert shapes == [(2, 9, 2), (2, 1, 2), (2, 1, 2)]


def test_gradients_reach_logits_and_weights() -> None:
    model = loaded("mixtral")
    with model.trace(prompt_ids()):
        logits = model.routers_logits[1]
        logits.retain_grad()
        weights = model.routers_weights[1]
        weights.retain_grad()
        model.logits[0, -1].max().backward()
    assert weights.grad is not None
    assert logits.grad is not None
    assert weights.grad[0].abs().max() > 0
    assert weights.grad[1].abs().max() == 0
    assert logits.grad[0].abs().max() > 0


def test_several_layers_at_once_and_without_validation() -> None:
    ids = prompt_ids()
    validated = loaded("mixtral")
    model = StandardizedTransformer(shared("mixtral"), validate=False)
    with torch.no_grad(), model.trace(ids):
        several = model.routers_experts[:]
    with torch.no_grad(), validated.trace(ids):
        one_by_one = [validated.routers_experts[i] for i in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(several, one_by_one, strict=True))


@pytest.mark.parametrize("one", ROUTERS)
def test_a_dense_layer_is_refused(one: str) -> None:
    model = loaded("deepseek_v3")
    with pytest.raises(NotInThisModelError) as caught, model.trace(prompt_ids()):
        getattr(model, one)[0]
    assert str(caught.value) == f"{one}[0]: this layer has none: it has no experts to choose from."


def test_weights_on_what_experts_are_given_are_refused() -> None:
    model = loaded("zoo llama4")
    assert model.routers_weights.refusals() == {
        "it has no experts to choose from": (0, 2),
        "nothing of (batch, seq, choice) multiplies what its experts give": (1, 3),
    }


def test_what_does_not_fit() -> None:
    model = loaded("mixtral")
    with pytest.raises(AssignmentError, match="torch.int64"), model.trace(prompt_ids()):
        model.routers_experts[1] = torch.zeros(2, 9, 2)


# The proof at load.


def broken(monkeypatch: pytest.MonkeyPatch, name: str, choose: Callable[[Record, Value], Value], **changes: Any) -> Any:
    """What a model refuses with something else in the place of what was found."""
    find = inside.find_routers

    def other(anatomy: Any, i: int, record: Record, output: Value) -> Any:
        findings = find(anatomy, i, record, output)
        value = choose(record, findings.shown[name][0])
        findings.shown[name] = value, Result(value.leaf)
        return findings

    monkeypatch.setattr(inside, "find_routers", other)
    return getattr(StandardizedTransformer(shared("mixtral")), name).refusals()


def _of_function(function: str) -> Callable[[Record, Value], Value]:
    return lambda record, _: next(one for one in record.order if one.function == function)


@pytest.mark.parametrize(
    ("name", "choose", "why"),
    [
        ("routers_logits", _of_function("sum"), "there are 1, and expert 3 is chosen"),
        ("routers_weights", lambda record, found: found.inputs[1], "they are 1 a position, and experts 2"),
    ],
)
def test_what_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, choose: Any, why: str) -> None:
    reasons = broken(monkeypatch, name, choose)
    assert len(reasons) == 1
    assert why in next(iter(reasons))


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_however_the_experts_are_run(how: str) -> None:
    hf = build("mixtral")
    hf.set_experts_implementation(how)
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        seen = [getattr(model, one)[1] for one in ROUTERS]
        model.routers_weights[1] = 0 * model.routers_weights[1]
        nothing = model.mlps_output[1]
    with torch.no_grad(), loaded("mixtral").trace(ids):
        expected = [getattr(loaded("mixtral"), one)[1] for one in ROUTERS]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(seen, expected, strict=True))
    assert nothing.abs().max() == 0
