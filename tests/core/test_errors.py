"""Errors: whose they are, where they arrive, and what they say."""

from __future__ import annotations

import re
import traceback
from typing import Any

import pytest
import torch
from helpers import Calls, net, no_leaks, our_frames, x
from torch import nn

from nnatomy.core.frames import hide_our_frames
from nnatomy.errors import (
    AssignmentError,
    CacheError,
    NoSuchModuleError,
    NotReachedError,
    OutOfOrderError,
    OutsideTraceError,
    UsageError,
)
from nnatomy.tracing import Traceable


class Boom(Exception):
    pass


def deep(error: BaseException) -> Calls:
    """A model that raises `error` three modules deep, after a module that works."""

    def fail(self, v):
        raise error

    return Calls(
        lambda self, v: self.outer(self.first(v)),
        first=nn.Identity(),
        outer=Calls(lambda self, v: self.inner(v), inner=Calls(fail)),
    )


WAYS = {
    "output": lambda view, tracer: view.outer.output,
    "last": lambda view, tracer: view.outer.inner.output,
    "assign": lambda view, tracer: setattr(view.outer, "output", 1),
    "skip": lambda view, tracer: view.never.skip(1),
    "result": lambda view, tracer: tracer.result,
    "iter": lambda view, tracer: list(tracer.iter[1:]),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", [Boom, AttributeError, KeyError, SystemExit, KeyboardInterrupt])
def test_an_error_of_the_model_arrives_as_it_is(way, kind) -> None:
    error = kind("mine")
    model = deep(error)
    model.never = nn.Identity()
    view = Traceable(model)
    with no_leaks(model), pytest.raises(kind) as caught, view.trace(1) as tracer:
        WAYS[way](view, tracer)
    assert caught.value is error
    assert error.args == ("mine",)
    assert error.__context__ is None
    assert error.__cause__ is None
    assert not error.__suppress_context__
    owners = our_frames(error)
    at_model = owners.index("torch") if "torch" in owners else len(owners)
    assert "us" not in owners[at_model:], "frames of ours between the model's"
    assert 1 <= owners[:at_model].count("us") <= 2 + (way == "iter")  # list() runs the loop's own frame
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names.count("forward") == 3
    assert names[-1] == "fail"


def test_the_same_error_without_a_trace_has_the_same_frames() -> None:
    def frames(error):
        tb = traceback.extract_tb(error.__traceback__)
        return [(f.name, f.lineno) for f in tb if f.name in ("forward", "fail") or "lambda" in f.name]

    model = deep(Boom())
    with pytest.raises(Boom) as plain:
        model(1)
    expected = frames(plain.value)
    view = Traceable(deep(Boom()))
    with pytest.raises(Boom) as traced, view.trace(1) as tracer:
        tracer.result
    assert frames(traced.value) == expected


def test_chained_errors_are_free_of_our_frames_too() -> None:
    def chain(self, v):
        try:
            self.inner(v)
        except Boom as error:
            raise ValueError("second") from error

    model = Calls(chain, inner=deep(Boom("first")))
    view = Traceable(model)
    with pytest.raises(ValueError, match="second") as caught, view.trace(1) as tracer:
        tracer.result
    assert isinstance(caught.value.__cause__, Boom)
    assert "us" not in our_frames(caught.value.__cause__)


def test_an_error_at_the_end_of_the_block() -> None:
    model = deep(Boom())
    view = Traceable(model)
    with no_leaks(model):
        with pytest.raises(Boom), view.trace(1, early_stop=False):
            view.first.output
        with pytest.raises(Boom), view.trace(1) as tracer:
            tracer.cache()
        with view.trace(1):  # but where nobody goes on, nothing is raised
            view.first.output


def test_an_error_that_the_block_has_caught_is_done_with() -> None:
    model = deep(Boom())
    view = Traceable(model)
    with no_leaks(model):
        with view.trace(1, early_stop=False) as tracer:
            with pytest.raises(Boom):
                view.outer.output
            with pytest.raises(Boom):  # asked once more: the same answer
                view.outer.output
        with pytest.raises(NotReachedError):
            tracer.result


def test_an_error_of_the_body_ends_the_forward_pass() -> None:
    model = net()
    view = Traceable(model)
    error = Boom("body")
    with no_leaks(model):
        for options in ({}, {"early_stop": False}):
            with pytest.raises(Boom) as caught, view.trace(x(), **options) as tracer:
                tracer.cache()
                view.layers[0].output
                raise error
            assert caught.value is error
            assert "us" not in our_frames(error)


def test_a_model_that_cleans_up_and_fails_at_it() -> None:
    seen = []

    def forward(self, v):
        try:
            return self.late(self.child(v))
        finally:
            seen.append("clean")
            raise Boom("while cleaning up")

    model = Calls(forward, child=nn.Identity(), late=nn.Identity())
    view = Traceable(model)
    with no_leaks(model), view.trace(1):
        view.child.output
    assert seen == ["clean"]


def test_a_model_that_catches_its_own_errors() -> None:
    def forward(self, v):
        try:
            self.bad(v)
        except Boom:
            return self.good(v)

    def fail(self, v):
        raise Boom

    model = Calls(forward, bad=Calls(fail, inner=nn.Identity()), good=nn.Identity())
    view = Traceable(model)
    with no_leaks(model):
        with view.trace(7) as tracer:
            assert view.bad.input == 7
            assert view.good.output == 7
            with pytest.raises(OutOfOrderError):
                view.bad.output  # it was called and left without one
            assert tracer.result == 7
        with pytest.raises(NotReachedError), view.trace(7):
            view.bad.output


def test_a_failing_hook_of_the_user() -> None:
    model = net()
    view = Traceable(model)

    def hook(*_):
        raise Boom

    handle = model.layers[1].register_forward_hook(hook)
    with pytest.raises(Boom), view.trace(x()):
        view.layers[1].output
    handle.remove()
    with no_leaks(model), view.trace(x()) as tracer:
        assert torch.equal(tracer.result, model(x()))


def test_wrong_arguments_of_the_model() -> None:
    view = Traceable(net())
    with pytest.raises(TypeError, match="unexpected keyword"), view.trace(x(), nonsense=1) as tracer:
        tracer.result
    with pytest.raises(TypeError, match="missing"), view.trace() as tracer:
        tracer.result
    with view.trace(nonsense=1):  # nothing asked for: nothing run
        pass


def raises(kind, text):
    return pytest.raises(kind, match="^" + re.escape(text))


def test_outside_a_trace() -> None:
    view = Traceable(net())
    text = "layers.0: values exist only while the model runs. Ask for them inside `with model.trace(...):`"
    for ask in (
        lambda: view.layers[0].output,
        lambda: view.layers[0].inputs,
        lambda: setattr(view.layers[0], "output", 1),
        lambda: view.layers[0].skip(1),
    ):
        with raises(OutsideTraceError, text):
            ask()
    with raises(OutsideTraceError, "the model: values exist only while"):
        view.output
    with view.trace(x()):
        view.embed.output
    with raises(OutsideTraceError, text):
        view.layers[0].output


def test_unknown_submodules_name_the_near_ones() -> None:
    view = Traceable(net())
    with pytest.raises(NoSuchModuleError) as caught:
        view.layer
    assert str(caught.value) == (
        "the model (Net) has no submodule 'layer'. Did you mean 'layers'? "
        "Its children: embed, layers, shared, never, head."
    )
    with pytest.raises(
        NoSuchModuleError, match=r"layers\.0 \(Layer\) has no submodule 'outptu'. Did you mean 'output'"
    ):
        view.layers[0].outptu
    with pytest.raises(NoSuchModuleError, match=r"attribute of the module itself: use `\.module\.in_features`"):
        view.embed.in_features
    with pytest.raises(NoSuchModuleError, match="no submodule 'x'"):
        view["layers.0.x"]
    with pytest.raises(IndexError, match=r"layers has 3 children, so no \[3\]"):
        view.layers[3]
    with pytest.raises(IndexError):
        view.layers[-4]
    assert not hasattr(view, "nothing")
    assert not hasattr(view, "__array__")
    with pytest.raises(NoSuchModuleError, match="Linear is not a submodule of Net"):
        view.paths([nn.Linear(1, 1)])


def test_a_wrong_name_is_not_assigned() -> None:
    view = Traceable(net())
    with pytest.raises(AttributeError):
        view.layers[0].outptu = 1
    with pytest.raises(AttributeError):
        view.outptu = 1
    with pytest.raises(AttributeError):
        view.embed = torch.ones(1)


def test_a_trace_is_used_once_and_only_entered() -> None:
    view = Traceable(net())
    trace = view.trace(x())
    for ask in (lambda: trace.block, lambda: trace.iter, lambda: trace.cache(), trace.stop):
        with raises(UsageError, "This trace has not been entered: ask inside `with"):
            ask()
    with trace:
        pass
    with raises(UsageError, "This trace has been used already: open a new one"), trace:
        pass
    for ask in (lambda: trace.iter, lambda: trace.cache()):
        with raises(UsageError, "This trace is over"):
            ask()


def test_no_result_after_an_early_stop() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        view.embed.output
    with raises(NotReachedError, "The forward pass was stopped when the block ended, so there is no result."):
        tracer.result
    with view.trace(x()) as tracer:
        tracer.stop()
        with raises(NotReachedError, "The forward pass was stopped, so there is no result."):
            tracer.result


def test_after_stop_nothing_is_answered() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model):
        with view.trace(x()) as tracer:
            view.embed.output
            tracer.stop()
            tracer.stop()
            with pytest.raises(OutOfOrderError, match=r"stopped \(it stood at embed\.output"):
                view.head.output
        with view.trace(x()) as tracer:
            tracer.stop()  # before it has begun
            with pytest.raises(
                OutOfOrderError,
                match=r"head\.output was asked for at .*, after the forward pass had been stopped",
            ):
                view.head.output
            assert list(tracer.iter[:]) == []
        with view.trace(x(), early_stop=False) as tracer:
            tracer.stop()


def test_steps_are_counted_from_zero() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        for which in (-1, [-1], [1, 0], [2, 2], slice(-1, None), slice(None, -2), slice(None, None, -1)):
            with pytest.raises(UsageError, match=r"tracer\.iter\[.*\]"):
                list(tracer.iter[which])
        with pytest.raises(IndexError, match=r"shared\.calls\[-1\]: calls count from the first, 0"):
            view.shared.calls[-1]


def test_what_a_cache_says() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        cache = tracer.cache([view.shared, "never", view.module.head])
        with raises(CacheError, "'embed' is not in the cache. It holds: nothing yet."):
            cache["embed"]
    with raises(CacheError, "'embed' is not in the cache. It holds: shared, head."):
        cache["embed"]
    with raises(CacheError, "'never' was not called while the cache was open."):
        cache["never"]
    with raises(CacheError, "'shared' was called 2 times: say which with cache['shared'][k].output"):
        cache["shared"].output


@torch.no_grad()
def test_compiled_modules() -> None:
    model = net()
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    model.head.compile(backend="eager")
    view = Traceable(model)
    with no_leaks(model):
        for first in (lambda: None, lambda: view.embed.output):
            for ask in (lambda: view.layers[1]._orig_mod.attn.output, lambda: view.head.output):
                with view.trace(x()):
                    first()
                    with pytest.raises(NotReachedError, match=r"it is compiled \(torch\.compile\)"):
                        ask()
        with view.trace(x()) as tracer:
            assert torch.equal(view.layers[1].output[0], view.layers[2].input)
            assert torch.allclose(tracer.result, net()(x()))


def test_modules_of_another_model() -> None:
    view = Traceable(net())
    view.module.made_later = []
    with view.trace(x()):
        view.embed.output
        other = Traceable(net())
        with pytest.raises(OutsideTraceError):
            other.embed.output


def test_a_module_put_in_meanwhile() -> None:
    """It is seen as every other, and a module that has been taken out is none of the model's."""
    model = net()
    view = Traceable(model)
    taken_out = view.head
    with view.trace(x()) as tracer:
        view.embed.output
        model.head = nn.Linear(4, 3)
        with pytest.raises(NotReachedError, match="not among those of the traced model"):
            taken_out.output
    with view.trace(x()) as tracer:
        view.embed.output
        model.head = nn.Linear(4, 3)
        y = view.head.output
        assert y is tracer.result
    assert torch.equal(y, model(x()))


@pytest.mark.parametrize("value", [(1, 2, 3), (1, {}), ((1,), 2), 3])
def test_inputs_are_arguments_and_keyword_arguments(value: Any) -> None:
    view = Traceable(net())
    text = r"embed\.inputs is all that the module is called with: assign \(args, kwargs\), a tuple and a dict; got (a tuple|an int)\."
    with view.trace(x()), pytest.raises(AssignmentError, match=text):
        view.embed.inputs = value


def test_an_error_of_nothing_but_our_frames_loses_all_of_them() -> None:
    try:
        exec("raise Boom", {"__name__": "nnatomy.core.run", "Boom": Boom})
    except Boom as error:
        assert error.__traceback__ is not None
        error.__traceback__ = error.__traceback__.tb_next
        assert hide_our_frames(error).__traceback__ is None
