"""Caches, against plain hooks."""

from __future__ import annotations

import pytest
import torch
from helpers import Calls, hooks, net, no_leaks, outputs, x
from torch import Tensor, nn

from nnatomy.core import Cache
from nnatomy.errors import CacheError
from nnatomy.tracing import Traceable


def test_all_modules() -> None:
    model = net()
    view = Traceable(model)
    seen = outputs(model, lambda: model(x()))
    with no_leaks(model), view.trace(x()) as tracer:
        cache = tracer.cache()
    assert isinstance(cache, Cache)
    assert set(cache.keys()) == set(cache) == set(seen)
    assert len(cache) == len(seen)
    for path, values in seen.items():
        assert path in cache
        assert len(cache[path]) == len(values)
        for k, (entry, value) in enumerate(zip(cache[path], values, strict=True)):
            assert (entry.step, entry.call, entry.inputs) == (0, k, None)
            if isinstance(value, Tensor):
                assert torch.equal(entry.output, value)
            else:
                assert torch.equal(entry.output[0], value[0])
                assert entry.output[1] == value[1]
    assert torch.equal(tracer.result, model(x()))
    assert "modules: embed" in repr(cache)


def test_some_modules_by_view_path_or_module() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        cache = tracer.cache([view.embed, "layers.1", model.head])
    assert list(cache) == ["embed", "layers.1", "head"]
    assert cache[view.layers[1]].output is cache["layers.1"].output
    assert view.embed in cache
    assert view.layers[0] not in cache
    assert "never" not in cache


def test_inputs() -> None:
    model = net()
    view = Traceable(model)
    got = {}
    with hooks((model.layers[2], "input", lambda value: got.update(value=value))):
        model(x())
    with view.trace(x()) as tracer:
        cache = tracer.cache(["layers.2", "head"], include_inputs=True, include_output=False)
    args, kwargs = cache["layers.2"].inputs
    assert torch.equal(args[0], got["value"][0][0])
    assert kwargs == {"scale": 0.5}
    assert cache["layers.2"].output is None
    assert list(cache["head"].inputs[1]) == ["input"]


def test_conversion() -> None:
    model = Calls(lambda self, v: self.child(v), child=Calls(lambda self, v: {"f": v, "i": v.long(), "s": "s"}))
    view = Traceable(model)
    value = torch.ones(2)
    with view.trace(value) as tracer:
        plain = tracer.cache(["child"])
        half = tracer.cache(["child"], dtype=torch.float16)
        meta = tracer.cache(["child"], device="meta")
        copy = tracer.cache(["child"], clone=True, include_inputs=True)
    assert plain["child"].output["f"] is value
    assert half["child"].output["f"].dtype is torch.float16
    assert half["child"].output["i"].dtype is torch.int64
    assert meta["child"].output["i"].is_meta
    assert copy["child"].output["f"] is not value
    assert torch.equal(copy["child"].output["f"], value)
    assert copy["child"].inputs[0][0] is not value
    assert copy["child"].output["s"] == "s"


def test_a_cache_sees_what_the_block_has_put_there() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        cache = tracer.cache(["embed", "layers.0.mlp", "layers.0.mlp.0"], include_inputs=True, clone=True)
        view.embed.output = view.embed.output * 0
        view.layers[0].mlp.skip(torch.ones(2, 4))
    assert not cache["embed"].output.any()
    assert torch.equal(cache["layers.0.mlp"].output, torch.ones(2, 4))
    assert cache["layers.0.mlp"].inputs is not None
    assert "layers.0.mlp.0" not in cache


def test_from_here_on() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        view.layers[1].output
        cache = tracer.cache(["embed", "layers.0", "layers.2", "shared"])
    assert list(cache) == ["layers.2", "shared"]
    assert cache["shared"][0].call == 1


def test_every_step_of_a_generation() -> None:
    model = net()
    view = Traceable(model)

    def generate():
        t = x()
        for _ in range(3):
            t = model(t)[:, :2]

    seen = outputs(model, generate)
    with no_leaks(model), view.trace_call(generate) as tracer:
        cache = tracer.cache(["shared", "head"])
        for step in tracer.iter[1]:
            view.embed.output
    assert [(entry.step, entry.call) for entry in cache["shared"]] == [(s, c) for s in range(3) for c in (0, 1)]
    for path in cache:
        for entry, value in zip(cache[path], seen[path], strict=True):
            assert torch.equal(entry.output, value)


@torch.no_grad()
def test_changes_in_place_are_noticed() -> None:
    model = Calls(
        lambda self, v: self.b(self.a(v)) + self.c(v),
        a=nn.Identity(),
        b=nn.ReLU(inplace=True),
        c=nn.Identity(),
    )
    view = Traceable(model)
    with view.trace(torch.tensor([-1.0, 1.0])) as tracer:
        cache = tracer.cache()
        copied = tracer.cache(clone=True)
    with pytest.raises(CacheError, match=r"'a' was changed in place after it had been collected.*clone=True"):
        cache["a"]
    assert copied["a"].output.tolist() == [-1.0, 1.0]
    assert cache["b"].output.tolist() == [0.0, 1.0]
    with view.trace(torch.tensor([1.0])) as tracer:
        mine = tracer.cache(["c"])
    mine["c"].output.add_(1)  # by the user
    with pytest.raises(CacheError, match="in place"):
        mine["c"]


@torch.inference_mode()
def test_inference_tensors_are_collected() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        cache = tracer.cache(["embed"])
    assert torch.equal(cache["embed"].output, view.module.embed(x()))


def test_an_error_keeps_what_was_collected() -> None:
    model = net()
    view = Traceable(model)

    def fail(*_):
        raise ValueError("here")

    handle = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="here"), view.trace(x()) as tracer:
        cache = tracer.cache()
    handle.remove()
    with no_leaks(model):
        assert "layers.0" in cache
        assert "layers.2" not in cache


def test_a_shared_module_is_there_under_each_of_its_paths() -> None:
    shared = nn.Linear(2, 2)
    root = Calls(lambda self, x: self.b(self.a(x)), a=shared, b=shared)
    expected, view = outputs(root, lambda: root(x()))["a"], Traceable(root)
    for modules in (None, ["a"], ["b"], ["a", "b"]):
        with view.trace(x()) as tracer:
            cache = tracer.cache(modules)
        for path in ("a", "b"):
            assert path in cache
            assert all(torch.equal(call.output, one) for call, one in zip(cache[path], expected, strict=True))
    with pytest.raises(CacheError, match="'c' is not in the cache"):
        cache["c"]


def test_two_caches_are_equal_only_if_they_are_one() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        one, other = tracer.cache(clone=True), tracer.cache(clone=True)
    assert one != other
    assert {one: 1, other: 2}[one] == 1
