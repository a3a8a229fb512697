"""Questions out of order are answered at once, with an error, never with another call's value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import Calls, net, no_leaks, x
from torch import nn

from nnatomy.errors import NotReachedError, OutOfOrderError
from nnatomy.tracing import Traceable


def test_both_points_and_both_lines_are_named() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), pytest.raises(OutOfOrderError) as caught, view.trace(x()):
        view.layers[1].output  # the first line
        view.layers[0].mlp.output  # the second line
    text = str(caught.value)
    lines = re.findall(rf"{re.escape(__file__)}:(\d+)", text)
    source = Path(__file__).read_text().splitlines()
    named = {source[int(line) - 1].split("# ")[1] for line in lines}
    assert named == {"the first line", "the second line"}
    assert "layers.0.mlp.output was asked for" in text
    assert "layers.1.output" in text
    assert "move this line above" in text


def test_two_of_one_line_are_told_by_their_points() -> None:
    """The line could not be moved above itself."""
    view = Traceable(net())
    with (
        pytest.raises(OutOfOrderError, match=r"ask for layers\.0\.output before layers\.1\.output\.$"),
        view.trace(x()),
    ):
        [view.layers[i].output for i in (1, 0)]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (lambda v: v.layers[0].output, lambda v: v.layers[0].input),
        (lambda v: v.layers[0].mlp[0].output, lambda v: v.layers[0].mlp.input),
        (lambda v: v.layers[0].mlp[0].output, lambda v: v.layers[0].mlp[0].inputs),
        (lambda v: v.layers[0].mlp[0].output, lambda v: v.layers[0].attn.output),
        (lambda v: v.layers[0].attn.input, lambda v: v.layers[0].input),
        (lambda v: v.shared.calls[1].output, lambda v: v.shared.output),
        (lambda v: v.shared.calls[1].input, lambda v: v.shared.calls[0].output),
        (lambda v: v.head.output, lambda v: v.head.skip(None)),
        (lambda v: v.head.output, lambda v: v.embed.output),
        (lambda v: v.output, lambda v: v.input),
    ],
)
def test_out_of_order(first, then) -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), view.trace(x()) as tracer:
        value = first(view)
        with pytest.raises(OutOfOrderError):
            then(view)
        with pytest.raises(OutOfOrderError):  # and a second time
            then(view)
        assert first(view) is value  # the block stands where it stood
        tracer.result


def test_assigning_out_of_order_changes_nothing() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        view.layers[0].output
        with pytest.raises(OutOfOrderError):
            view.embed.output = None
        result = tracer.result
    assert (result == model(x())).all()


def test_after_the_result_everything_is_past() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        tracer.result
        with pytest.raises(OutOfOrderError):
            view.output
        with pytest.raises(OutOfOrderError):
            view.never.output
        assert tracer.result is not None


def test_what_the_model_does_not_call_is_not_reached() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model):
        with pytest.raises(NotReachedError, match=r"never\.output was asked for .* ended without coming to it"):
            with view.trace(x()):
                view.never.output
        with pytest.raises(NotReachedError, match=r"shared\.output \(call 2\)"), view.trace(x()):
            view.shared.calls[2].output


def test_a_module_inside_a_skipped_one_is_not_reached() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), pytest.raises(NotReachedError), view.trace(x()):
        view.layers[0].mlp.skip(0.0)
        view.layers[0].mlp[0].output


def test_a_container_asked_for_in_flight() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()):
        attn = view.layers[2].attn.output
        hidden = view.layers[2].output[0]
    assert attn.shape == hidden.shape


def test_an_unhashable_looking_order_of_calls() -> None:
    """A module whose calls alternate with another's: call k of each, in between the other's."""
    model = Calls(
        lambda self, v: [self.a(v), self.b(v + 1), self.a(v + 2), self.b(v + 3)],
        a=nn.Identity(),
        b=nn.Identity(),
    )
    view = Traceable(model)
    with view.trace(0) as tracer:
        got = [view.a.output, view.b.output, view.a.calls[1].output, view.b.calls[1].output]
        assert tracer.result == got == [0, 1, 2, 3]
    with view.trace(0):
        assert view.b.output == 1
        with pytest.raises(OutOfOrderError):
            view.a.output  # its second call is still to come, and must not be given
        assert view.a.calls[1].output == 2
