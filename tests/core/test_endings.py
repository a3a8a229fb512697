"""Errors, interrupts, thread state, gradients, and what is left behind."""

from __future__ import annotations

import contextvars
import gc
import resource
import subprocess
import sys
import threading
import traceback
import weakref
from typing import Any

import pytest
import torch
from nets import Net, gated, nothing_left
from owners import owner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnatomy.errors import OutOfOrderError
from nnatomy.tracing import Traceable

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def our_frames(error: BaseException) -> list[str]:
    return [f.filename for f in traceback.extract_tb(error.__traceback__) if owner(f.filename) == "us"]


def test_an_error_of_the_block_arrives_unchanged() -> None:
    module = Net()
    net = Traceable(module)
    raised = ValueError("mine")
    with nothing_left(module) as gone:
        with pytest.raises(ValueError, match="mine") as caught, net.trace(X):
            hidden = net.blocks[1].output[0]
            gone.append(weakref.ref(hidden))
            del hidden
            raise raised
        assert caught.value is raised
        assert our_frames(caught.value) == []
        del caught
        raised.__traceback__ = None


def test_an_error_of_the_model_arrives_unchanged_and_short() -> None:
    module = Net()
    net = Traceable(module)
    with nothing_left(module) as gone:
        for ask in (lambda t: net.blocks[2].output, lambda t: t.result, lambda t: list(t.iter[1:])):
            with (
                pytest.raises(AttributeError, match="^the model's own$") as caught,
                net.trace(X, fail_at=1) as tracer,
            ):
                gone.append(weakref.ref(net.blocks[0].output[0]))
                ask(tracer)
            names = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
            frames = our_frames(caught.value)
            assert 1 <= len(frames) <= 2 + names.count("_indices"), frames
            last_of_ours = max(
                i for i, f in enumerate(traceback.extract_tb(caught.value.__traceback__)) if owner(f.filename) == "us"
            )
            assert "forward" in names[last_of_ours:]
            del caught
    with pytest.raises(AttributeError, match="the model's own"), net.trace(X, fail_at=0, early_stop=False):
        pass
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), net.trace(X[:, :3]):
        _ = net.head.output


def test_the_model_may_handle_its_own_errors() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.risky = Net()
            self.safe = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.risky(x, fail_at=2)
            except AttributeError:
                return self.safe(x)

    module = Careful()
    net = Traceable(module)
    with nothing_left(module), net.trace(X) as tracer:
        _ = net.risky.blocks[1].output
        with pytest.raises(OutOfOrderError):
            _ = net.risky.blocks[0].output
        assert torch.equal(net.safe.input, X)
        assert torch.equal(tracer.result, module.safe(X))


def test_the_callers_thread_state_holds_in_the_forward_and_nowhere_else() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: dict[str, Any] = {}

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.update(
                grad=torch.is_grad_enabled(),
                inference=torch.is_inference_mode_enabled(),
                autocast=torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
                device=torch.empty(0).device.type,
                variable=variable.get(),
                thread=threading.get_ident(),
            )
            return x * 1

    net = Traceable(Spy())

    def state() -> dict[str, Any]:
        with net.trace(X) as tracer:
            _ = tracer.result
        assert seen.pop("thread") != threading.get_ident()
        return dict(seen)

    plain = {"grad": True, "inference": False, "autocast": False, "device": "cpu", "variable": "none"}
    assert state() == plain
    with torch.no_grad():
        assert state() == plain | {"grad": False}
    with torch.inference_mode():
        assert state() == plain | {"grad": False, "inference": True}
    with torch.autocast("cpu", torch.bfloat16):
        assert state() == plain | {"autocast": torch.bfloat16}
    with torch.device("meta"):
        assert state() == plain | {"device": "meta"}
    token = variable.set("mine")
    assert state() == plain | {"variable": "mine"}
    variable.reset(token)
    assert state() == plain
    with net.trace(X) as tracer:  # the state of the trace's line, whatever the block does
        with torch.no_grad():
            _ = net.input
        _ = tracer.result
    assert seen["grad"]


def gradients(net: nn.Module, edit: str) -> tuple[Tensor, Tensor]:
    """By plain hooks: the gradients of the result with respect to one value, and of a parameter."""
    kept: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        output.retain_grad()
        kept.append(output)
        if edit == "replace":
            return output * 3
        if edit == "in place":
            output.mul_(3)
        return None

    handle = net.blocks[1].inner.register_forward_hook(hook)
    net.zero_grad()
    net(X).square().sum().backward()
    handle.remove()
    grad, parameter = kept[0].grad, net.blocks[0].inner.weight.grad
    assert grad is not None
    assert parameter is not None
    return grad, parameter.clone()


@pytest.mark.parametrize("edit", ["none", "replace", "in place"])
def test_gradients_are_those_of_plain_hooks(edit: str) -> None:
    module = Net()
    net = Traceable(module)
    expected = gradients(module, edit)
    for way in ("backward", "autograd.grad", "register_hook"):
        module.zero_grad()
        hooked: list[Tensor] = []
        with nothing_left(module), net.trace(X) as tracer:
            hidden = net.blocks[1].inner.output
            if way == "backward":
                hidden.retain_grad()
            if way == "register_hook" and edit != "in place":
                hidden.register_hook(hooked.append)
            if edit == "replace":
                net.blocks[1].inner.output = hidden * 3
            if edit == "in place":
                net.blocks[1].inner.output.mul_(3)
            if way == "register_hook" and edit == "in place":
                hidden.register_hook(hooked.append)
            loss = tracer.result.square().sum()
            weight = module.blocks[0].inner.weight
            if way == "autograd.grad":
                got = torch.autograd.grad(loss, (hidden, weight))
            else:
                loss.backward()
                assert weight.grad is not None
                got = (hooked[0] if hooked else hidden.grad, weight.grad)
            del hidden, loss
        assert torch.equal(got[0], expected[0]), way
        assert torch.equal(got[1], expected[1]), way
        del got


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_the_model(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor, fail_at: int | None = None) -> Tensor:
            for block in self.blocks:
                x = checkpoint(lambda y, b=block: b(y, scale=0.5)[0], x, use_reentrant=reentrant)
            return self.head(x)

    module = Checkpointed()
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(module(x).sum(), module.head.weight)[0]
    module(x).sum().backward()
    plain = module.blocks[0].inner.weight.grad
    assert plain is not None
    plain = plain.clone()
    module.zero_grad()
    net = Traceable(module)
    with nothing_left(module):
        with net.trace(x) as tracer:
            assert net.blocks[1].inner.output.shape == (2, 4)
            loss = tracer.result.sum()
        loss.backward()
    assert torch.equal(module.blocks[0].inner.weight.grad, plain)
    assert torch.equal(module.head.weight.grad, expected)


def test_tensors_are_freed_at_once() -> None:
    module = Net()
    net = Traceable(module)
    with nothing_left(module) as gone:
        with net.trace(X) as tracer:
            hidden = net.blocks[0].output[0]
            gone.append(weakref.ref(hidden))
            replaced = torch.randn(2, 4)
            gone.append(weakref.ref(replaced))
            net.blocks[1].input = replaced
            cache = tracer.cache()
            gone.append(weakref.ref(tracer.result))
            gone.append(weakref.ref(cache))
        del hidden, replaced, cache, tracer


def test_ten_thousand_traces_leave_everything_flat() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net = Traceable(module)

    def some(count: int) -> None:
        for i in range(count):
            try:
                with torch.no_grad(), net.trace(X) as tracer:
                    hidden = net[1].output
                    if i % 10 == 0:
                        raise ValueError
                    if i % 10 == 1:
                        _ = net[0].output
                    if i % 10 == 2:
                        net[2].input = hidden[:, :3]
                    _ = tracer.result
            except (ValueError, OutOfOrderError, RuntimeError):
                pass

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with nothing_left(module):
        some(500)
        gc.collect()
        objects, held = len(gc.get_objects()), tensors()
        threads = threading.active_count()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        some(10_000)
        assert threading.active_count() <= threads
        assert not gated()
        assert not net._blocks._by_thread
        gc.collect()
        assert len(gc.get_objects()) - objects < 200
        assert tensors() == held
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # KiB


def test_a_trace_when_python_shuts_down_is_refused() -> None:
    """No other thread runs any more: it would wait for ever."""
    code = """
import torch
from nnatomy.tracing import Traceable
class Late:
    def __del__(self, torch=torch, view=Traceable(torch.nn.Linear(2, 2))):
        try:
            with view.trace(torch.ones(1, 2)):
                view.output
        except Exception as error:
            print(type(error).__name__, error)
late = Late()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("OutsideTraceError Python is shutting down"), done
    assert done.returncode == 0
