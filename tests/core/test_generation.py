"""Many calls of the root in one trace: steps."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch
from helpers import Calls, net, no_leaks, x
from torch import nn

from nnatomy.errors import NotReachedError, OutOfOrderError
from nnatomy.tracing import Traceable


def counting(steps: int = 5):
    """A model of one child, and a generation that feeds its result back; step k starts from 10**k..."""
    model = Calls(lambda self, v: self.twice(self.child(v)) + self.twice(0), child=nn.Identity(), twice=nn.Identity())

    def generate(start, count=steps):
        values = []
        for _ in range(count):
            start = model(start) + 1
            values.append(start)
        return values

    return model, Traceable(model), generate


def test_all_steps_by_the_name_that_nnsight_has() -> None:
    model = net()
    view = Traceable(model)
    with view.trace_call(lambda x: [model(x), model(-x)], x()) as tracer:
        seen = [view.head.output for _ in tracer.all()]
    assert torch.equal(seen[1], model(-x()))


def test_every_step() -> None:
    model, view, generate = counting()
    with no_leaks(model), view.trace_call(generate, 0) as tracer:
        seen = []
        for step in tracer.iter[:]:
            seen.append((step, view.child.output, view.twice.calls[1].input))
        after = tracer.result
    assert seen == [(k, k, 0) for k in range(5)]
    assert after == [1, 2, 3, 4, 5]
    with view.trace_call(generate, 0) as tracer:
        assert [view.child.output for _ in tracer.iter] == list(range(5))


@pytest.mark.parametrize(
    ("which", "steps"),
    [
        (slice(2, 4), [2, 3]),
        (slice(2, 99), [2, 3, 4]),
        (slice(None, None, 2), [0, 2, 4]),
        (0, [0]),
        (3, [3]),
        (9, []),
        ([0, 3], [0, 3]),
        ([], []),
        (range(1, 3), [1, 2]),
        (slice(7, 9), []),
        (slice(3, 1), []),
    ],
)
def test_some_steps(which, steps) -> None:
    model, view, generate = counting()
    warns = nullcontext()
    if which in (9, slice(7, 9)):
        named = "7:9" if which == slice(7, 9) else "9"
        text = rf"iter\[{named}\]: step {named[0]} did not come, .* after 5 steps \(0 to 4\)"
        warns = pytest.warns(UserWarning, match=text)
    with no_leaks(model), view.trace_call(generate, 0, early_stop=False) as tracer, warns:
        seen = [(step, view.child.output) for step in tracer.iter[which]]
    assert seen == [(k, k) for k in steps]
    assert tracer.result == [1, 2, 3, 4, 5]


def test_edits_are_of_their_step() -> None:
    model, view, generate = counting(4)
    with view.trace_call(generate, 0) as tracer:
        for step in tracer.iter[1:3]:
            view.child.output = view.child.output + 100 * step
        result = tracer.result
    assert result == [1, 102, 303, 304]


def test_without_iter_the_first_step_is_meant() -> None:
    model, view, generate = counting()
    with no_leaks(model), view.trace_call(generate, 0) as tracer:
        assert view.child.output == 0
        assert view.output == 0
        with pytest.raises(OutOfOrderError):
            view.child.output
        assert tracer.result == [1, 2, 3, 4, 5]


def test_a_question_of_a_step_that_is_over_names_the_step() -> None:
    model, view, generate = counting()
    with view.trace_call(generate, 0) as tracer:
        for _ in tracer.iter[2]:
            view.child.output
        with pytest.raises(OutOfOrderError, match=r"in step 2 and this question means step 0.*tracer\.iter"):
            view.child.output


def test_a_module_that_is_not_called_in_a_step_is_not_answered_by_the_next() -> None:
    model = Calls(lambda self, v: self.odd(v) if v % 2 else v, odd=nn.Identity())
    view = Traceable(model)
    with no_leaks(model), view.trace_call(lambda: [model(v) for v in range(4)]) as tracer:
        seen = []
        for step in tracer.iter[:]:
            try:
                seen.append(view.odd.output)
            except NotReachedError as error:
                assert f"step {step} ended without" in str(error)
                seen.append(None)
        assert tracer.result == [0, 1, 2, 3]
    assert seen == [None, 1, None, 3]


def test_break_continue_and_what_follows() -> None:
    model, view, generate = counting()
    with view.trace_call(generate, 0) as tracer:
        seen = []
        for step in tracer.iter[:]:
            if step == 1:
                continue
            seen.append(view.child.output)
            if step == 3:
                break
        assert seen == [0, 2, 3]
        for step in tracer.iter[4]:
            assert view.child.output == 4
        assert tracer.result == [1, 2, 3, 4, 5]


def test_an_exception_in_the_loop() -> None:
    model, view, generate = counting()
    with no_leaks(model), pytest.raises(ZeroDivisionError), view.trace_call(generate, 0) as tracer:
        for _ in tracer.iter[:]:
            1 / view.child.output


def test_early_stop_in_a_generation() -> None:
    model, view, _ = counting()
    made = []

    def generate():
        for step in range(100):
            made.append(step)
            model(step)

    with no_leaks(model), view.trace_call(generate) as tracer:
        for _ in tracer.iter[2]:
            view.child.output
    assert made == [0, 1, 2]


def test_nested_loops_and_steps_within_a_step() -> None:
    model, view, generate = counting()
    with view.trace_call(generate, 0) as tracer:
        for step in tracer.iter[:2]:
            for inner in tracer.iter[step]:
                assert view.child.output == inner == step
            assert view.output == step
        assert tracer.result == [1, 2, 3, 4, 5]


def test_a_generation_that_fails_midway() -> None:
    model, view, _ = counting()

    def generate():
        for step in range(3):
            model(step)
        raise RuntimeError("midway")

    with no_leaks(model):
        seen = []
        with pytest.raises(RuntimeError, match="midway"), view.trace_call(generate) as tracer:
            for _ in tracer.iter[:]:
                seen.append(view.child.output)
        assert seen == [0, 1, 2]


def test_a_function_that_never_calls_the_root() -> None:
    model, view, _ = counting()
    with no_leaks(model):
        with view.trace_call(lambda: 5) as tracer:
            assert list(tracer.iter[:]) == []
            assert tracer.result == 5
        with pytest.raises(NotReachedError), view.trace_call(lambda: 5):
            view.child.output


def test_submodules_called_outside_the_root() -> None:
    """What the function calls of the model before the root's first call counts to step 0, after it to step 1."""
    model, view, _ = counting()
    with view.trace_call(lambda: (model.child(7), model(1), model.child(8))) as tracer:
        assert view.child.output == 7
        assert view.child.calls[1].output == 1
        assert tracer.result == (7, 1, 8)


def test_a_root_call_that_raises_and_is_tried_again() -> None:
    def forward(self, v):
        if self.child(v) < 0:
            raise ValueError
        return v

    model = Calls(forward, child=nn.Identity())
    view = Traceable(model)

    def generate():
        values = []
        for v in (1, -1, 2):
            try:
                values.append(model(v))
            except ValueError:
                values.append(None)
        return values

    with no_leaks(model), view.trace_call(generate) as tracer:
        seen = [view.child.output for _ in tracer.iter[:]]
        assert tracer.result == [1, None, 2]
    assert seen == [1, -1, 2]


@torch.no_grad()
def test_tensors_against_plain_calls() -> None:
    model = net()
    view = Traceable(model)

    def generate(t):
        for _ in range(3):
            t = model(t)[:, :2]
        return t

    with view.trace_call(generate, x()) as tracer:
        heads = [view.head.output for _ in tracer.iter[:]]
        result = tracer.result
    first = model(x())
    second = model(first[:, :2])
    assert torch.equal(heads[0], first)
    assert torch.equal(heads[1], second)
    assert torch.equal(result, heads[2][:, :2])
    assert torch.equal(result, generate(x()))


def test_what_is_called_after_a_root_call_that_raised_is_of_the_next_step() -> None:
    def forward(self, v):
        if self.child(v) < 0:
            raise ValueError
        return v

    model = Calls(forward, child=nn.Identity(), encoder=nn.Identity())

    def generate():
        with suppress(ValueError):
            model(-1)
        model.encoder(7)
        return model(2)

    with no_leaks(model), Traceable(model).trace_call(generate) as tracer:
        cache = tracer.cache()
    assert [(call.step, call.output) for call in cache["child"]] == [(0, -1), (1, 2)]
    assert [(call.step, call.output) for call in cache["encoder"]] == [(1, 7)]
