"""The caller's thread state holds in the forward pass, and does not stay in the worker."""

from __future__ import annotations

import contextvars
import warnings

import pytest
import torch
from helpers import Calls, forward_threads, no_leaks
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnatomy.core import Traceable

VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="default")


def look() -> dict[str, object]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        "made": torch.ones(1).device.type,
        "default": torch.get_default_device().type,
        "var": VAR.get(),
        "threads": torch.get_num_threads(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


class Seen(TorchFunctionMode):
    names: list[str]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", "?"))
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def seen_mode():
    mode = Seen()
    mode.names = []
    return mode


STATES = {
    "plain": lambda: torch.enable_grad(),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "meta": lambda: torch.device("meta"),
    "function mode": seen_mode,
    "dispatch mode": Dispatched,
}


def model_that_looks():
    model = Calls(lambda self, _: (self.child(1), look())[1], child=nn.Identity())
    return model, Traceable(model)


@pytest.mark.parametrize("name", list(STATES))
def test_what_holds_for_the_caller_holds_for_the_model(name) -> None:
    model, view = model_that_looks()
    before = look()
    with no_leaks(model):
        for _ in range(2):
            with STATES[name]():
                expected = look()
                with view.trace(0) as tracer:
                    view.child.output
                    assert look() == expected
                    assert tracer.result == expected
                assert look() == expected
            assert look() == before
            with view.trace(0) as tracer:
                assert tracer.result == before
            with STATES[name](), view.trace(0):
                view.child.output  # cancelled in the middle
            with view.trace(0) as tracer:
                assert tracer.result == before
    assert (name == "plain") or expected != before or name == "autocast off"


def test_states_within_each_other() -> None:
    model, view = model_that_looks()
    before = look()
    with torch.device("meta"), torch.no_grad(), torch.device("cpu"), seen_mode(), Dispatched():
        expected = look()
        with view.trace(0) as tracer:
            assert tracer.result == expected
        assert look() == expected
    assert look() == before
    assert torch.utils._device.CURRENT_DEVICE is None


def test_the_state_is_the_one_where_the_trace_was_opened() -> None:
    model, view = model_that_looks()
    with view.trace(0) as tracer, torch.no_grad():
        assert tracer.result["grad"] is True


def test_context_variables() -> None:
    def forward(self, _):
        seen = VAR.get()
        VAR.set("of the model")
        return seen

    view = Traceable(Calls(forward))
    token = VAR.set("of the caller")
    with view.trace(0) as tracer:
        assert tracer.result == "of the caller"
    assert VAR.get() == "of the caller"
    VAR.reset(token)
    with view.trace(0) as tracer:
        assert tracer.result == "default"


def test_the_number_of_threads() -> None:
    model, view = model_that_looks()
    before = torch.get_num_threads()
    with view.trace(0) as tracer:
        assert tracer.result["threads"] == before
    try:
        torch.set_num_threads(before + 1)
        with view.trace(0) as tracer:  # in the same worker
            assert tracer.result["threads"] == before + 1
    finally:
        torch.set_num_threads(before)
    with view.trace(0) as tracer:
        assert tracer.result["threads"] == before


def test_a_model_that_leaves_its_thread_untidy() -> None:
    def forward(self, _):
        seen = look()
        torch.set_grad_enabled(False)
        seen_mode().__enter__()
        return seen

    model = Calls(forward)
    view = Traceable(model)
    before = look()
    for _ in range(3):
        with view.trace(0) as tracer:
            assert tracer.result == before
    assert look() == before


def test_the_worker_is_the_same_from_trace_to_trace() -> None:
    _, view = model_that_looks()
    with view.trace(0):
        view.child.output
    threads = set(forward_threads())
    for _ in range(20):
        with view.trace(0):
            view.child.output
    assert set(forward_threads()) <= threads


def test_inference_tensors_can_be_read_and_replaced() -> None:
    model = Calls(lambda self, v: self.child(v) * 2, child=nn.Linear(2, 2))
    view = Traceable(model)
    with torch.inference_mode(), view.trace(torch.ones(1, 2)) as tracer:
        value = view.child.output
        assert value.is_inference()
        value += 1
        result = tracer.result
    assert torch.equal(result, value * 2)


def test_warnings_of_the_model_are_the_callers() -> None:
    model = Calls(lambda self, _: warnings.warn("from the model", UserWarning, stacklevel=1))
    view = Traceable(model)
    with pytest.warns(UserWarning, match="from the model"), view.trace(0) as tracer:
        tracer.result
