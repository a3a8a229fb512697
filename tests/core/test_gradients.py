"""Gradients of values read in a block, against plain hooks, and checkpointing in the model."""

from __future__ import annotations

import pytest
import torch
from helpers import Calls, hooks, net, no_leaks, x
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnatomy.tracing import Traceable


def plain(model, path, edit=lambda out: out):
    """The result, the (edited) value at `path` and the gradient of the result's sum by it."""
    kept = []

    def hook(out):
        kept.append(edit(out))
        return kept[-1]

    with hooks((model.get_submodule(path), "output", hook)):
        result = model(x())
    grad, weight = torch.autograd.grad(result.sin().sum(), [kept[0], model.embed.weight])
    return result, kept[0], grad, weight


EDITS = {
    "none": lambda out: out,
    "replaced": lambda out: out * 3 + 1,
    "in place": lambda out: out.mul_(3).add_(1),
    "a part in place": lambda out: out[:, 1].mul_(-2) is None or out,
}


@pytest.mark.parametrize("edit", list(EDITS))
@pytest.mark.parametrize("path", ["embed", "layers.1.mlp.0", "head"])
def test_grad_through_edits(edit, path) -> None:
    model = net()
    view = Traceable(model)
    expected = plain(model, path, EDITS[edit])
    with no_leaks(model):
        with view.trace(x()) as tracer:
            value = EDITS[edit](view[path].output)
            view[path].output = value
            result = tracer.result
            loss = result.sin().sum()
            inside = torch.autograd.grad(loss, value, retain_graph=True)[0]
        outside, weight = torch.autograd.grad(loss, [value, model.embed.weight])
    got = result, value, outside, weight
    assert torch.equal(inside, outside)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_backward_retain_grad_and_hooks() -> None:
    model = net()
    view = Traceable(model)
    _, _, expected, weight = plain(model, "layers.1.mlp")
    by_hook = []
    with view.trace(x()) as tracer:
        value = view.layers[1].mlp.output
        value.retain_grad()
        value.register_hook(by_hook.append)
        tracer.result.sin().sum().backward()
        assert torch.equal(value.grad, expected)
    assert torch.equal(by_hook[0], expected)
    assert torch.equal(model.embed.weight.grad, weight)


def test_a_gradient_in_the_middle_of_the_forward_pass() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        first = view.embed.output
        hidden = view.layers[0].output[0]
        grad = torch.autograd.grad(hidden.sum(), first, retain_graph=True)[0]
        view.layers[1].attn.output = view.layers[1].attn.output + grad
        result = tracer.result
    shared = model.shared(model.embed(x()))
    assert grad.shape == first.shape
    assert not torch.equal(result, model(x()))
    assert shared.requires_grad


def test_steering_vectors_are_trained_through_a_trace() -> None:
    model = net()
    view = Traceable(model)
    steer = torch.zeros(4, requires_grad=True)
    with view.trace(x()) as tracer:
        view.layers[0].output = (view.layers[0].output[0] + steer, 0.5)
        loss = tracer.result.sum()
    loss.backward()
    traced = steer.grad.clone()
    steer.grad = None
    with hooks((model.layers[0], "output", lambda out: (out[0] + steer, out[1]))):
        model(x()).sum().backward()
    assert torch.equal(traced, steer.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_the_model(reentrant) -> None:
    inner = net()

    def forward(self, v):
        for layer in self.layers:
            v = checkpoint(lambda t, layer=layer: layer(t)[0], v, use_reentrant=reentrant)
        return v

    model = Calls(forward, layers=inner.layers)
    view = Traceable(model)
    start = torch.linspace(-1, 1, 8).reshape(2, 4).requires_grad_()
    plain_result = model(start)
    expected = (
        torch.autograd.grad(plain_result.sin().sum(), [start] if not reentrant else [start], retain_graph=False)[0]
        if not reentrant
        else backward(plain_result, start)
    )
    with no_leaks(model):
        with view.trace(start) as tracer:
            attn = view.layers[1].attn.output
            result = tracer.result
            inside = backward(result, start)
        assert torch.equal(result, plain_result)
        assert torch.equal(inside, expected)
        assert attn.shape == (2, 4)
        with view.trace(start) as tracer:  # an early stop inside a checkpointed part
            view.layers[1].mlp[0].output


def backward(result, start):
    start.grad = None
    result.sin().sum().backward()
    grad, start.grad = start.grad, None
    return grad


def test_an_error_in_an_autograd_function_of_the_model() -> None:
    """Raised below C++ frames: with greenlets this ended the process."""

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, module):
            return module(v)

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("in backward")

    model = Calls(lambda self, v: Bad.apply(v, self.child), child=nn.Linear(2, 2))
    view = Traceable(model)
    start = x().requires_grad_()
    with no_leaks(model):
        with pytest.raises(ValueError, match="in backward"), view.trace(start) as tracer:
            tracer.result.sum().backward()
        with view.trace(start):  # and cancelled below them
            view.child.input
        with pytest.raises(RuntimeError, match="shapes"), view.trace(torch.ones(3, 3)) as tracer:
            tracer.result
