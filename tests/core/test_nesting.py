"""Modules that go without a gate: nothing of it shows, but that there are fewer gates."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Calls, no_leaks, outputs, x
from nets import gated
from torch import Tensor, nn

from nnatomy.core import Traceable
from nnatomy.core.nesting import TRIES
from nnatomy.errors import NotReachedError, OutOfOrderError


def layer() -> Calls:
    return Calls(
        lambda self, x: x + self.mlp(self.attn(x)),
        attn=nn.Linear(2, 2),
        mlp=nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
    )


def stack() -> Calls:
    """Three layers of three modules each, one of which has two more; in a module that is in the root."""
    torch.manual_seed(0)
    inner = Calls(
        lambda self, x: self.layers[2](self.layers[1](self.layers[0](x))),
        layers=nn.ModuleList(layer() for _ in range(3)),
    )
    return Calls(lambda self, x: self.head(self.inner(x)), inner=inner, head=nn.Linear(2, 2))


#: The root and what is in it, the list of layers, the layers, and what one of these calls.
OUTERMOST, LAYERS, WITHIN = 3, 1 + 3, 2


def seen_whole(root: nn.Module, call: Callable[[], Any] | None = None) -> Traceable:
    view = Traceable(root)
    with view.trace_call(call) if call else view.trace(x()) as tracer:
        view.inputs
        tracer.result
    return view


def test_gates_are_put_where_questions_concern_them() -> None:
    root = stack()
    view, expected = seen_whole(root), outputs(root, lambda: root(x()))
    with no_leaks(root):
        with view.trace(x()):
            first = view.inner.layers[0].output
            assert gated(root) == OUTERMOST + LAYERS
            linear = view.inner.layers[1].mlp[0].output
            assert gated(root) == OUTERMOST + LAYERS + 2 * WITHIN
            last = view.inner.layers[2].attn.output
            head = view.head.output
            assert gated(root) == OUTERMOST + LAYERS + 3 * WITHIN
        assert torch.equal(first, expected["inner.layers.0"][0])
        assert torch.equal(linear, expected["inner.layers.1.mlp.0"][0])
        assert torch.equal(last, expected["inner.layers.2.attn"][0])
        assert torch.equal(head, expected["head"][0])


def test_where_it_stands_at_an_input_its_inside_can_be_asked_for() -> None:
    root = stack()
    view, expected = seen_whole(root), outputs(root, lambda: root(x()))
    with view.trace(x()):
        view.inner.layers[1].inputs
        inside = view.inner.layers[1].attn.output
        deeper = view.inner.layers[1].mlp[1].output
    assert torch.equal(inside, expected["inner.layers.1.attn"][0])
    assert torch.equal(deeper, expected["inner.layers.1.mlp.1"][0])


def test_what_is_over_with_its_caller_is_past() -> None:
    view = seen_whole(stack())
    with view.trace(x()):
        view.inner.layers[1].output
        for late in (view.inner.layers[1].attn, view.inner.layers[0].mlp[1]):
            with pytest.raises(OutOfOrderError, match="already past it"):
                late.output
        with pytest.raises(NotReachedError, match="without coming to it"):
            view.inner.layers[0].attn.calls[1].output


def test_a_module_without_a_gate_may_not_have_been_called() -> None:
    """Only the caller's calls are known then, and the error does not say more than that."""
    root = stack()
    view = seen_whole(root)
    root.inner.layers[0].function = lambda self, x: x + self.mlp(x)
    with view.trace(x()):
        view.inner.layers[1].output
        with pytest.raises(
            OutOfOrderError, match=r"already past it \(or past where it would be, had it been called\)"
        ):
            view.inner.layers[0].attn.output
    with view.trace(x()):
        view.inner.layers[0].inputs
        with pytest.raises(NotReachedError, match="does not call that module"):
            view.inner.layers[0].attn.output


def test_a_module_that_is_called_twice_and_all_within_it_has_a_gate() -> None:
    body = stack()
    twice = Calls(lambda self, x: self.head(self.body(self.body(x))), body=body, head=stack())
    view, expected = seen_whole(twice), outputs(twice, lambda: twice(x()))
    with view.trace(x()):
        view.body.output
        assert gated(twice) == len(list(twice.modules()))  # the head's too: it might be called there
        second = view.body.inner.layers[0].mlp.calls[1].output
    assert torch.equal(second, expected["body.inner.layers.0.mlp"][1])
    with view.trace(x()):
        view.inputs
        assert gated(twice) < len(list(twice.modules()))


def test_steps() -> None:
    root = stack()
    call = lambda: [root(x() * step) for step in range(3)]  # noqa: E731
    view, expected = seen_whole(root, call), outputs(root, call)
    got: list[Tensor] = []
    with view.trace_call(call) as tracer:
        for step in tracer.iter[:]:
            got.append(view.inner.layers[1].output)
            if step == 1:
                got.append(view.inner.layers[2].mlp[0].output)
    found = expected["inner.layers.1"], expected["inner.layers.2.mlp.0"]
    for one, other in zip(got, [*found[0][:2], found[1][1], found[0][2]], strict=True):
        assert torch.equal(one, other)


def test_an_encoder_that_is_called_before_the_root_is_past() -> None:
    """As `generate` does: a trace's forward pass has called it by way of the model within the root."""
    root = stack()
    root.inner.encoder = encoder = stack()
    root.inner.function = lambda self, x: self.layers[0](x if self.given else self.encoder(x))
    root.inner.given = False
    view = seen_whole(root)
    root.inner.given = True
    with view.trace_call(lambda: root(encoder(x()))) as tracer:
        for _ in tracer.iter[:1]:
            with pytest.raises(OutOfOrderError, match="already past it"):
                view.inner.encoder.inner.output


def test_a_shared_module_may_be_called_within_a_layer_without_gates() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(2, 2)

    def sharing() -> Calls:
        return Calls(lambda self, x: self.after(self.shared(x)), shared=shared, after=nn.Linear(2, 2))

    root = Calls(lambda self, x: self.two(self.one(x)), one=sharing(), two=sharing())
    view, expected = seen_whole(root), outputs(root, lambda: root(x()))
    with view.trace(x()):
        here = view.one.shared.calls[1].output
        after = view.two.after.output
    assert torch.equal(here, expected["one.shared"][1])
    assert torch.equal(after, expected["two.after"][0])


def test_a_module_that_others_call_has_a_gate() -> None:
    """By hand, a layer's attention is called once before the layer is."""
    root = stack()
    root.function = lambda self, x: self.head(self.inner(self.inner.layers[1].attn(x)))
    view, expected = seen_whole(root), outputs(root, lambda: root(x()))
    with view.trace(x()):
        view.inner.layers[0].output
        second = view.inner.layers[1].attn.calls[1].output
        with pytest.raises(OutOfOrderError):
            view.inner.layers[1].attn.output
    assert torch.equal(second, expected["inner.layers.1.attn"][1])


def test_a_module_that_one_calls_that_does_not_hold_it_has_a_gate() -> None:
    """The one that holds it may call it another time."""
    root = stack()
    root.head = holder = Calls(lambda self, x: x, linear=nn.Linear(2, 2))
    root.inner.layers[1].function = lambda self, x: holder.linear(x)
    root.function = lambda self, x: self.inner(self.head(x))
    view = seen_whole(root)
    holder.function = lambda self, x: self.linear(x)
    expected = outputs(root, lambda: root(x()))
    with view.trace(x()):
        view.head.output
        second = view.head.linear.calls[1].output
    assert torch.equal(second, expected["head.linear"][1])


def test_what_is_called_twice_in_one_step_and_never_in_another() -> None:
    inner = stack().inner
    twice = itertools.cycle([True, False])
    inner.layers[1].function = lambda self, x: self.attn(self.attn(x)) if next(twice) else x
    calls = lambda: [inner(x()), inner(x())]  # noqa: E731
    expected = outputs(inner, calls)
    view = seen_whole(inner, calls)
    with view.trace_call(calls) as tracer:
        view.layers[1].inputs
        second = view.layers[1].attn.calls[1].output
        tracer.result
    assert torch.equal(second, expected["layers.1.attn"][1])
    with view.trace_call(calls):
        view.layers[0].output
        assert "_call_impl" in inner.layers[1].attn.__dict__


def test_modules_that_are_replaced_are_looked_at_again() -> None:
    root = stack()
    view = seen_whole(root)
    root.inner.layers[1].attn = nn.Linear(2, 2)
    root.function = lambda self, x: self.head(self.inner(self.inner.layers[1].attn(x)))
    expected = outputs(root, lambda: root(x()))
    for _ in range(2):
        with view.trace(x()) as tracer:
            view.inner.layers[0].output
            second = view.inner.layers[1].attn.calls[1].output
            tracer.result
        assert torch.equal(second, expected["inner.layers.1.attn"][1])
    with view.trace(x()):
        view.inner.layers[0].output
        assert gated(root) < len(list(root.modules()))


def test_passes_that_are_stopped_are_not_looked_at_for_ever() -> None:
    root = stack()
    view = Traceable(root)
    for _ in range(TRIES + 1):
        with view.trace(x()):
            view.inner.output
    seen_whole(root)
    with view.trace(x()):
        view.inner.output
        everywhere = gated(root)
    fresh = seen_whole(stack())
    with fresh.trace(x()):
        fresh.inner.output
        assert gated(fresh.module) < everywhere == len(list(root.modules()))


def test_nothing_is_kept_of_a_model() -> None:
    view = seen_whole(stack())
    module = weakref.ref(view.module.inner.layers[1])
    assert module() is not None
    del view
    assert module() is None


def test_what_is_called_more_often_than_in_the_pass_that_was_looked_at() -> None:
    """Asked for late, nobody can tell which of its calls comes; asked for in time, it is known."""
    cell = Calls(lambda self, x: torch.tanh(self.lin(x)), lin=nn.Linear(2, 2))

    def run(self: Any, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            x = self.cell(x)
        return x

    layer = Calls(run, cell=cell)
    layer.rounds = 1
    twice = Calls(lambda self, x: self.layer(self.layer(x)) if self.again else self.layer(x), layer=layer)
    twice.again = False
    root = Calls(lambda self, x: self.head(self.twice(x)), twice=twice, head=nn.Linear(2, 2))
    view = seen_whole(root)
    layer.rounds, twice.again = 3, True
    expected = outputs(root, lambda: root(x()))["twice.layer.cell"]
    for call in range(6):
        with view.trace(x()):
            assert torch.equal(view.twice.layer.cell.calls[call].output, expected[call])
        with pytest.raises((OutOfOrderError, NotReachedError)), view.trace(x()):
            view.twice.layer.output
            view.twice.layer.cell.calls[call].output
    with pytest.raises(OutOfOrderError, match="its first calls have not been counted"), view.trace(x()):
        view.twice.layer.output
        view.twice.layer.cell.calls[1].output
