"""Scanning: shapes without computing, and a model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Calls, net, no_leaks, x
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnatomy.errors import InputError, OutOfOrderError
from nnatomy.tracing import Traceable


def test_shapes_and_dtypes() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), view.scan(torch.zeros(7, 2)) as tracer:
        hidden = view.layers[1].output[0]
        assert isinstance(hidden, FakeTensor)
        assert hidden.shape == (7, 4)
        view.layers[1].output = (hidden.double().float(), 0.5)
        with pytest.raises(OutOfOrderError):
            view.embed.output
        assert tracer.result.shape == (7, 3)
        assert tracer.result.dtype is torch.float32


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = net()
    view = Traceable(model)
    with no_leaks(model), view.scan(torch.zeros(5, 2)) as tracer:
        assert view.layers[0].mlp[1].output.shape == (5, 8)
        assert tracer.result.device.type == "meta"


class Untidy(nn.Module):
    """A model that writes to itself in all the ways models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("late", None)
        self.kept: Tensor | None = None
        self.calls = 0

    def forward(self, v: Tensor) -> Tensor:
        self.calls += 1
        self.count = self.count + 1
        self.total += v.sum(0)
        self.total.mul_(2)
        self.late = v * 2
        self.kept = v + 1
        self.extra = v + 2
        self.register_buffer("new", v + 3)
        return self.drop(self.norm(v)) + self.total


@pytest.mark.parametrize("end", ["result", "early", "error"])
def test_the_model_is_left_exactly_as_it_was(end) -> None:
    model = Calls(lambda self, v: self.untidy(v) + self.last(v), untidy=Untidy(), last=nn.Identity())
    model.train()
    before = copy.deepcopy(model.state_dict())
    view = Traceable(model)
    random = torch.random.get_rng_state()
    with no_leaks(model):
        try:
            with view.scan(torch.ones(4, 2)) as tracer:
                view.untidy.output
                if end == "result":
                    assert tracer.result.shape == (4, 2)
                if end == "error":
                    raise ValueError("mine")
        except ValueError as error:
            assert end == "error", error
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert not isinstance(after[name], FakeTensor)
        assert torch.equal(after[name], value), name
    assert model.untidy.calls == 0
    assert model.untidy.kept is None
    assert torch.equal(torch.random.get_rng_state(), random)


def test_arguments_nested_and_by_keyword() -> None:
    model = Calls(lambda self, pair, *, extra: self.same(pair["a"][0] + extra), same=nn.Identity())
    view = Traceable(model)
    real = torch.ones(2)
    with view.scan({"a": [real]}, extra=torch.ones(3, 1)) as tracer:
        assert isinstance(view.same.output, FakeTensor)
        assert tracer.result.shape == (3, 2)
    assert type(real) is Tensor


def test_after_a_scan_the_model_computes() -> None:
    model = net()
    expected = model(x())
    view = Traceable(model)
    with view.scan(x()):
        view.head.output
    with view.trace(x()) as tracer:
        result = tracer.result
    assert torch.equal(result, expected)
    assert type(result) is Tensor


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.inner(hidden)
        return hidden if hidden.sum() > 0 else hidden[hidden > 0]


def test_a_forward_pass_that_asks_for_values_says_so() -> None:
    model = Branching()
    view = Traceable(model)
    with no_leaks(model), view.scan(torch.ones(3, 2)):
        assert view.inner.output.shape == (3, 2)
    with pytest.raises(InputError, match=r"of Branching depends on the values of tensors \(aten\..*neither scan"):
        with view.scan(torch.ones(3, 2)) as tracer:
            tracer.result
