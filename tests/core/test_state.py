"""The caller's thread state holds in the forward pass, and does not stay in the worker."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import warnings

import pytest
import torch
from helpers import Calls, forward_threads, net, no_leaks, x
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnatomy.errors import UsageError
from nnatomy.tracing import Traceable

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


def doubled(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return net[2](2 * net[1](net[0](x))).sum()


@pytest.fixture
def tanh() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap", "jacrev of vmap", "parameters"])
def test_transforms_of_functions_with_a_trace(tanh: nn.Sequential, transform: str) -> None:
    view, x = Traceable(tanh), torch.randn(3, 4)

    def traced(x: torch.Tensor) -> torch.Tensor:
        with view.trace(x) as tracer:
            view[1].output = 2 * view[1].output
            result = tracer.result
        return result.sum()

    def with_parameters(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        with view.trace_call(torch.func.functional_call, tanh, parameters, (x,)) as tracer:
            view[1].output = 2 * view[1].output
            result = tracer.result
        return result.sum()

    def of(function, rows: bool = False):
        func = torch.func
        match transform:
            case "grad":
                return func.grad(function)(x)
            case "jvp":
                return func.jvp(function, (x,), (x.sin(),))[1]
            case "hessian":
                return func.hessian(function)(x)
            case "vmap":
                return func.vmap(function)(x[:, None])
            case "jacrev of vmap":
                return func.jacrev(func.vmap(function))(x[:, None])

    with no_leaks(tanh):
        if transform == "parameters":
            plain = lambda p: 2 * torch.func.functional_call(tanh, p, (x,)).sum() - 2 * 3 * p["2.bias"].sum()  # noqa: E731
            shifted = lambda p: with_parameters(p) - 3 * p["2.bias"].sum()  # noqa: E731
            mine, expected = (torch.func.grad(f)(dict(tanh.named_parameters())) for f in (shifted, plain))
            assert all(torch.allclose(mine[name], expected[name], atol=1e-5) for name in expected)
        else:
            assert torch.allclose(of(traced), of(lambda x: doubled(tanh, x)), atol=1e-5)
        assert traced(x).item() == pytest.approx(doubled(tanh, x).item(), rel=1e-5)


def test_inside_a_transform_of_the_models_own() -> None:
    inner = nn.Linear(4, 4)
    root = Calls(
        lambda self, x: self.after(torch.func.grad(lambda y: torch.tanh(self.inner(y)).sum())(x)),
        inner=inner,
        after=nn.Linear(4, 4),
    )
    view, x = Traceable(root), torch.randn(3, 4)
    with no_leaks(root):
        with (
            pytest.raises(UsageError, match=r"inner\.output is inside a transform of torch\.func"),
            view.trace(x),
        ):
            view.inner.output
        with view.trace(x):
            after = view.after.output
        assert torch.equal(after, root(x))


def test_hooks_on_saved_tensors(tanh: nn.Sequential) -> None:
    view, x = Traceable(tanh), torch.randn(3, 4)
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    def count(run) -> int:
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return len(packed)

    assert count(lambda: view.trace(x).run()) == count(lambda: tanh(x)) > 0
    assert count(lambda: None) == 0


def test_the_callers_cuda_stream(monkeypatch: pytest.MonkeyPatch, tanh: nn.Sequential) -> None:
    """With stand-ins for torch's functions, as there may be no device: the pass runs within the caller's stream."""
    mine, entered = object(), []

    @contextlib.contextmanager
    def enter(stream: object):
        entered.append((stream, threading.get_ident()))
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: mine)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    ran: list[int] = []
    tanh[1].register_forward_hook(lambda *_: ran.append(len(entered)))
    Traceable(tanh).trace(torch.randn(3, 4)).run()
    (stream, thread), left = entered
    assert stream is mine
    assert thread != threading.get_ident()
    assert (ran, left) == ([1], "left")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such thing here")
def test_the_cores_a_thread_may_run_on_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sets them, nor asks for them, which a sandbox may forbid."""

    def refused(*_: object) -> None:
        raise PermissionError("sched affinity")

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    monkeypatch.setattr(os, "sched_getaffinity", refused)
    view = Traceable(net())
    with view.trace(x()) as tracer:
        first = view.layers[0].output[0]
        result = tracer.result
    with view.trace() as tracer:
        blocks = [tracer.invoke(x(), lambda: view.layers[0].output[0]) for _ in range(2)]
    assert all(torch.equal(block.value, first) for block in blocks)
    assert torch.equal(result, view.module(x()))
