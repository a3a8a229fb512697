"""Gradient checkpointing: what is edited where `backward` computes again, and what counts as a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Calls, hooks, no_leaks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnatomy.errors import AssignmentError
from nnatomy.tracing import Traceable


def parts(reentrant: bool) -> Calls:
    torch.manual_seed(0)

    def forward(self: Any, v: Tensor) -> Tensor:
        return self.last(checkpoint(self.part, self.first(v), use_reentrant=reentrant).tanh())

    part = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return Calls(forward, first=nn.Linear(4, 4), part=part, last=nn.Linear(4, 4))


START = torch.linspace(-1, 1, 8).reshape(2, 4)


def gradients(model: nn.Module, result: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result.sin().sum(), list(model.parameters())))


def backward(model: nn.Module, result: Tensor) -> list[Tensor]:
    model.zero_grad()
    result.sin().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def replace(view: Any) -> None:
    view.output = view.output * 0.5


def in_place(view: Any) -> None:
    view.output.mul_(0.5)


def skip(view: Any) -> None:
    view.skip(view.input * 0.5)


EDITS: list[Callable[[Any], None]] = [replace, in_place, skip]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_edit_inside_is_refused(reentrant: bool, edit: Callable[[Any], None]) -> None:
    model = parts(reentrant)
    view = Traceable(model)
    with (
        no_leaks(model),
        pytest.raises(AssignmentError, match=r"part\.1\.\w+ was changed inside .* under gradient checkpointing"),
        view.trace(START.clone().requires_grad_()) as tracer,
    ):
        edit(view.part[1])
        tracer.result


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of this very case
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_edit_inside_is_good_without_gradients(reentrant: bool, edit: Callable[[Any], None]) -> None:
    model = parts(reentrant)
    view = Traceable(model)
    with torch.no_grad():
        with view.trace(START) as tracer:
            before = view.part[0].output.clone()
            edit(view.part[1])
            result = tracer.result
        changed = before * 0.5 if edit is skip else before.tanh() * 0.5
        assert torch.equal(result, model.last(model.part[2](changed).tanh()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_edits_outside_and_reads_inside_have_the_gradients_of_hooks(reentrant: bool) -> None:
    model = parts(reentrant)
    view = Traceable(model)
    with hooks((model.first, "output", lambda out: out * 0.5), (model.part, "output", lambda out: out)):
        expected = backward(model, model(START))
    with no_leaks(model):
        with view.trace(START) as tracer:
            view.first.output = view.first.output * 0.5
            inside = view.part[1].output
            result = tracer.result
        got = backward(model, result)
    assert inside.shape == (2, 4)
    assert len(got) == len(expected) == 8
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_calls_again_is_no_call_of_a_step(reentrant: bool) -> None:
    model = parts(reentrant)
    view = Traceable(model)

    def train() -> list[Tensor]:
        results = []
        for step in range(3):
            result = model(START + step)
            result.sum().backward()
            results.append(result.detach())
        return results

    with torch.no_grad():
        expected = [model.part[0](model.first(START + step)) for step in range(3)]
    with no_leaks(model), view.trace_call(train) as tracer:
        got = [view.part[0].output.detach() for _ in tracer.iter[:]]
        assert len(tracer.result) == 3
    assert len(got) == 3
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_another_tensor_put_into_a_checkpointed_dict_is_refused() -> None:
    inner = Calls(lambda self, x: {"h": torch.tanh(self.a(x))}, a=nn.Linear(2, 2))
    part = Calls(lambda self, x: self.o(self.inner(x)["h"]), inner=inner, o=nn.Linear(2, 2))
    view = Traceable(Calls(lambda self, x: checkpoint(self.part, x, use_reentrant=False), part=part))
    with (
        pytest.raises(AssignmentError, match="gradient checkpointing"),
        view.trace(torch.randn(1, 2)) as tracer,
    ):
        value = view.part.inner.output
        value["h"] = value["h"] * 3
        tracer.result


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_that_one_of_several_blocks_skips_inside_is_refused(reentrant: bool) -> None:
    """It runs for the others, and `backward` would give the gradients of its own output for all."""
    model = parts(reentrant)
    view = Traceable(model)

    def skips() -> None:
        view.part[1].skip(view.part[1].input * 0.5)

    with (
        no_leaks(model),
        pytest.raises(AssignmentError, match="skip of Tanh was changed inside .* under gradient checkpointing"),
        view.trace() as tracer,
    ):
        tracer.invoke(START[:1], skips)
        tracer.invoke(START[1:], lambda: view.output)

    with torch.no_grad(), warnings.catch_warnings(), view.trace() as tracer:
        warnings.simplefilter("ignore")  # checkpoint's own: nothing here gets a gradient
        tracer.invoke(START[:1], skips)
        other = tracer.invoke(START[1:], lambda: tracer.result)
    assert torch.allclose(other.value, model(START.clone().requires_grad_())[1:])
