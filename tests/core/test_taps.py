"""Taps: values inside a module's call, found by a torch function mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Calls, no_leaks
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nnatomy.core import Collector, Slot, Tap
from nnatomy.errors import NotReachedError, OutOfOrderError
from nnatomy.tracing import Traceable


def tap_of(function: Any) -> Tap:
    """A tap that finds the first result of `function` inside a call."""

    class Mode(TorchFunctionMode):
        def __init__(self, module: nn.Module, visit: Callable[[Any], Slot]) -> None:
            super().__init__()
            self.visit: Callable[[Any], Slot] | None = visit

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is function and self.visit is not None:
                visit, self.visit = self.visit, None
                return visit(result).value
            return result

    return Mode


SIN, COS = tap_of(torch.sin), tap_of(torch.cos)


def model() -> Calls:
    """`outer` computes a sine, calls `inner`, which computes a cosine, and then a sine once more."""
    inner = Calls(lambda self, v: torch.cos(v) + 1)
    outer = Calls(lambda self, v: torch.sin(self.inner(torch.sin(v))), inner=inner)
    return Calls(lambda self, v: self.outer(v) * 2, outer=outer)


X = torch.linspace(0.1, 1, 4)


def reach(view: Traceable, path: str, kind: str, tap: Tap, call: int = 0) -> Slot:
    return view._blocks.current(view.path).reach(
        view[path].module if path else view.module, kind, f"{path}.{kind}", call, tap
    )


def test_a_value_inside_a_call_is_read_and_replaced() -> None:
    net = model()
    view = Traceable(net)
    with no_leaks(net), view.trace(X) as tracer:
        slot = reach(view, "outer", "sin", SIN)
        assert torch.equal(slot.value, X.sin())
        slot.value = X
        again = reach(view, "outer", "sin", SIN)
        assert again is slot
        assert torch.equal(view.outer.inner.input, X)
        result = tracer.result
    assert torch.equal(result, (X.cos() + 1).sin() * 2)


def test_order_of_taps_and_points() -> None:
    net = model()
    view = Traceable(net)
    with no_leaks(net), view.trace(X):
        view.outer.input
        reach(view, "outer", "sin", SIN)
        assert torch.equal(reach(view, "outer.inner", "cos", COS).value, X.sin().cos())
        with pytest.raises(OutOfOrderError, match=r"outer\.sin was asked for"):
            reach(view, "outer", "sin", SIN)
        assert torch.equal(view.outer.inner.output, X.sin().cos() + 1)
        with pytest.raises(OutOfOrderError, match=r"outer\.inner\.cos was asked for"):
            reach(view, "outer.inner", "cos", COS)


def test_what_a_call_does_not_compute_is_not_reached_and_its_output_still_is() -> None:
    net = model()
    view = Traceable(net)
    with no_leaks(net), view.trace(X) as tracer:
        with pytest.raises(
            NotReachedError, match=r"outer\.inner\.sin was asked for, but that call has ended without computing one"
        ):
            reach(view, "outer.inner", "sin", SIN)
        assert torch.equal(view.outer.inner.output, X.sin().cos() + 1)
        assert torch.equal(tracer.result, net(X))


def test_a_tap_put_on_a_call_in_flight_below_those_of_deeper_calls() -> None:
    """Asked for inside `inner`: the mode of `outer` must outlive the one of `inner`."""
    net = model()
    view = Traceable(net)
    seen = []

    class InInner(Collector):
        def __init__(self) -> None:
            self.modules = {view.outer.inner.module}
            self.kinds = {"cos": COS, "sin": SIN}

        def take(self, slot: Slot) -> None:
            seen.append(slot.kind)

    with no_leaks(net), view.trace(X) as tracer:
        run = tracer.block.run
        run.collectors.append(InInner())
        run.watch()
        view.outer.inner.input
        second = reach(view, "outer", "sin", SIN)  # the first one is over; this is the one after `inner`
        assert torch.equal(second.value, (X.sin().cos() + 1).sin())
        second.value = X
        assert torch.equal(tracer.result, 2 * X)
    assert seen == ["cos"]  # the sines are not of its call
    with view.trace(X) as tracer:  # nothing of a mode is left on the worker
        assert torch.equal(tracer.result, net(X))


def test_a_tap_is_left_with_an_error_and_with_an_early_stop() -> None:
    failing = Calls(lambda self, v: self.part(v) if v.sum() > 0 else 1 / 0, part=nn.Identity())
    net = Calls(lambda self, v: torch.sin(self.child(v)), child=failing)
    view = Traceable(net)
    depths = []

    def depth(_m: Any, _a: Any) -> None:
        depths.append(torch._C._len_torch_function_stack())

    with no_leaks(net):
        with pytest.raises(ZeroDivisionError), view.trace(-X):
            reach(view, "child", "sin", SIN)
        with view.trace(X):
            view.child.input
            with pytest.raises(NotReachedError):
                reach(view, "child", "sin", SIN)
        with view.trace(X):
            reach(view, "child", "input", SIN)
    handle = net.register_forward_pre_hook(depth)
    with view.trace(X) as tracer:
        assert torch.equal(tracer.result, X.sin())
    handle.remove()
    assert depths == [0]


def test_each_call_of_a_shared_module_has_its_own() -> None:
    net = Calls(lambda self, v: self.child(self.child(v)), child=Calls(lambda self, v: torch.sin(v)))
    view = Traceable(net)
    with no_leaks(net), view.trace(X):
        first = reach(view, "child", "sin", SIN).value
        second = reach(view, "child", "sin", SIN, call=1).value
    assert torch.equal(first, X.sin())
    assert torch.equal(second, X.sin().sin())


def test_a_skipped_module_computes_none() -> None:
    net = model()
    view = Traceable(net)
    with no_leaks(net), view.trace(X) as tracer:
        view.outer.inner.skip(X)
        with pytest.raises(NotReachedError):
            reach(view, "outer.inner", "cos", COS)
        assert torch.equal(tracer.result, X.sin() * 2)


def test_a_tap_asked_for_while_a_module_within_is_skipped() -> None:
    inner = Calls(lambda self, v: v + 1)
    net = Calls(lambda self, v: torch.cos(self.inner(v)), inner=inner)
    view = Traceable(net)
    with no_leaks(net), view.trace(X) as tracer:
        view.inner.skip(2 * X)
        value = reach(view, "", "cos", COS).value
        result = tracer.result
    assert torch.equal(value, (2 * X).cos())
    assert torch.equal(result, (2 * X).cos())


def test_a_tap_sees_the_tensors_of_the_block_as_they_were_made() -> None:
    """What the block computes is computed in its own thread, where no mode of a tap is on."""
    net = model()
    view = Traceable(net)
    with no_leaks(net), view.trace(X):
        view.outer.input
        assert torch._C._len_torch_function_stack() == 0
        value: Tensor = reach(view, "outer", "sin", SIN).value
        assert torch.equal(torch.sin(value), X.sin().sin())
