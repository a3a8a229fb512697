"""Several blocks on one forward pass: whose rows, in which order, with whose names, and how they end."""

from __future__ import annotations

import gc
import linecache
import re
import sys
import threading
import time
import traceback
import weakref
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Calls, hooks, net, no_gc, no_leaks, our_frames, settles
from torch import Tensor, nn

from nnatomy.blocks import capture
from nnatomy.core import worker
from nnatomy.errors import AssignmentError, CaptureError, InputError, OutOfOrderError, RowsError, UsageError
from nnatomy.tracing import Traceable

ONE = torch.tensor([[0.5, -1.0]])
TWO = torch.tensor([[2.0, 0.25], [-0.5, 1.5]])


def line_of(text: str) -> int:
    """The line of this file that ends with that comment."""
    lines = linecache.getlines(__file__)
    return next(number for number, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {text}"))


def test_each_block_sees_its_rows_and_one_pass_serves_all() -> None:
    model = net()
    view = Traceable(model)
    passes = []
    with no_leaks(model), hooks((model, "output", lambda out: passes.append(out))):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                hidden_one, scale = view.layers[1].output
                result_one = tracer.result
            with tracer.invoke(TWO):
                (inputs, kwargs) = view.layers[1].inputs
                hidden_two = view.layers[1].output[0]
                result_two = tracer.result
            with tracer.invoke():
                everything = tracer.result
    assert len(passes) == 1
    assert torch.equal(everything, torch.cat([result_one, result_two]))
    assert torch.equal(everything, model(torch.cat([ONE, TWO])))
    assert (hidden_one.shape, hidden_two.shape, inputs[0].shape) == ((1, 4), (2, 4), (2, 4))
    assert scale == kwargs["scale"] == 0.5
    assert torch.equal(tracer.result, everything)


@pytest.mark.parametrize("kind", ["assigned", "in place", "input"])
def test_an_edit_changes_the_blocks_own_rows_alone(kind: str) -> None:
    model = net()
    view = Traceable(model)
    with torch.no_grad(), view.trace() as tracer:
        with tracer.invoke(ONE):
            one = tracer.result
        with tracer.invoke(TWO):
            if kind == "assigned":
                hidden, scale = view.layers[1].output
                view.layers[1].output = (hidden * 2, scale)
            elif kind == "in place":
                view.layers[1].output[0].mul_(2)
            else:
                view.layers[1].input = view.layers[1].input * 2
            two = tracer.result

    def edit(value: Any) -> Any:
        if kind == "input":
            return (torch.cat([value[0][0][:1], 2 * value[0][0][1:]]),), value[1]
        return torch.cat([value[0][:1], 2 * value[0][1:]]), value[1]

    with hooks((model.layers[1], "input" if kind == "input" else "output", edit)), torch.no_grad():
        expected = model(torch.cat([ONE, TWO]))
    assert torch.equal(torch.cat([one, two]), expected)


@pytest.mark.parametrize("reader_first", [True, False])
def test_a_name_of_another_block_is_waited_for_whichever_stands_first(reader_first: bool) -> None:
    view = Traceable(net())
    clean = None  # stale, as in a notebook's second run: not to be taken
    if reader_first:
        with view.trace() as tracer:
            with tracer.invoke(TWO):
                view.layers[1].output = (clean.expand(2, -1), view.layers[1].output[1])
                patched = tracer.result
            with tracer.invoke(ONE):
                clean = view.layers[1].output[0]
    else:
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                clean = view.layers[1].output[0]
            with tracer.invoke(TWO):
                view.layers[1].output = (clean.expand(2, -1), view.layers[1].output[1])
                patched = tracer.result
    expected = view.module(ONE)
    assert torch.allclose(patched, expected.expand(2, -1))


def test_names_are_those_of_the_users_frame() -> None:
    view = Traceable(net())
    layer, values, total = 1, [], 0

    def enclosing() -> list[Any]:
        values.append("before")
        nested = [0, 1]
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                shapes = [view.layers[i].output[0].shape[layer] for i in nested]  # both kinds of outer name

                def inner() -> Any:
                    return view.layers[2].output[0] + len(nested)

                third = inner()
        values.append(third)
        return shapes

    assert enclosing() == [4, 4]
    assert values[1].shape == (1, 4)
    for i in range(3):  # the same body several times, each with the names as they were
        with view.trace() as tracer:
            for factor in (1, 10):
                with tracer.invoke(ONE):
                    total = total + factor * (i + 1)
    assert total == 66


def test_an_own_name_is_ones_own() -> None:
    view = Traceable(net())
    seen = []
    with view.trace() as tracer:
        for x in (ONE, TWO):
            with tracer.invoke(x):
                for i in range(3):
                    hidden = view.layers[i].output[0]
                    seen.append((i, hidden.shape[0]))
    assert sorted(seen) == [(i, rows) for i in range(3) for rows in (1, 2)]
    assert hidden.shape[0] == 2  # as if they had run one after the other


def test_blocks_that_come_to_one_thread_one_after_the_other() -> None:
    view = Traceable(net())
    with view.trace() as tracer:
        tracer.invoke(ONE, lambda: None)  # over at once: its thread is the next one's
        two = tracer.invoke(TWO, lambda: tracer.result)
    assert two.value.shape == (2, 3)
    assert torch.equal(two.value, view.module(torch.cat([ONE, TWO]))[1:])


@pytest.mark.parametrize("others", [0, 1])
def test_a_barrier_in_the_traces_own_body_that_nobody_else_comes_to(others: int) -> None:
    view = Traceable(net())
    with (
        pytest.raises(OutOfOrderError, match="a block stands at the barrier"),
        view.trace() if others else view.trace(ONE) as tracer,
    ):
        for _ in range(others):
            tracer.invoke(ONE, lambda: view.head.output)
        tracer.barrier(2)()


def test_functions_in_place_of_bodies() -> None:
    view = Traceable(net())
    with view.trace() as tracer:
        one = tracer.invoke(ONE, lambda: view.layers[0].output[0])
        two = tracer.invoke(TWO, lambda: tracer.result)
    assert (one.value.shape, two.value.shape) == ((1, 4), (2, 3))


def test_a_body_in_exec_with_and_without_its_source() -> None:
    source = "with view.trace() as tracer:\n    with tracer.invoke(x):\n        h = view.layers[0].output[0]\n"
    names: dict[str, Any] = {"view": Traceable(net()), "x": ONE}
    linecache.cache["<here>"] = (len(source), None, source.splitlines(True), "<here>")
    exec(compile(source, "<here>", "exec"), names)
    assert names["h"].shape == (1, 4)
    with pytest.raises(
        CaptureError, match=r"cannot be had.*tracer.invoke\(prompt, function\) or model.edit\(function\)"
    ):
        exec(compile(source, "<nowhere>", "exec"), names)
    broken = source.replace("(x):", "(x:")  # the file is just being edited
    linecache.cache["<edited>"] = (len(broken), None, broken.splitlines(True), "<edited>")
    with pytest.raises(CaptureError, match="is not what its source file says now"):
        exec(compile(source, "<edited>", "exec"), names)


def test_bodies_that_cannot_run_later() -> None:
    view = Traceable(net())

    def returns() -> Any:
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                return view.layers[0].output

    with pytest.raises(CaptureError, match="runs later, apart from what stands around it: 'return' outside"):
        returns()
    with pytest.raises(CaptureError, match="has to be a `with` of its own"):
        with view.trace() as tracer, tracer.invoke(ONE):
            view.layers[0].output
    with pytest.raises(CaptureError, match="is not what its source file says now"):
        with view.trace() as tracer, ExitStack() as stack:
            stack.enter_context(tracer.invoke(ONE))


def test_a_debugger_or_coverage_goes_on() -> None:
    view = Traceable(net())
    lines = []

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        if frame.f_code is body.__code__ and event == "line":
            lines.append(frame.f_lineno - body.__code__.co_firstlineno)
        return trace

    def body() -> Any:
        with view.trace() as tracer:
            with tracer.invoke(ONE) as block:
                value = view.layers[0].output[0]
        after = value.shape
        return after, block

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        shape, block = body()
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert shape == (1, 4)
    assert block.done
    assert {4, 5} <= set(lines)


def test_an_error_in_a_block_points_at_its_own_line() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), pytest.raises(ZeroDivisionError) as caught:
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                view.layers[0].output
            with tracer.invoke(TWO):
                view.layers[1].output
                1 / 0  # the fault
    last = traceback.extract_tb(caught.tb)[-1]
    assert (last.filename, last.lineno) == (__file__, line_of("the fault"))
    assert our_frames(caught.value).count("us") <= 2


def test_an_error_of_the_model_and_one_before_the_blocks_end() -> None:
    model = Calls(lambda self, x: self.child(x) @ torch.ones(7, 7), child=nn.Identity())
    view = Traceable(model)
    with no_leaks(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                view.child.output
                tracer.result
            with tracer.invoke(TWO):
                view.child.output
    with no_leaks(model), pytest.raises(KeyError):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                view.child.output
            view.child.output
            raise KeyError


def test_where_no_order_satisfies_all_both_lines_are_named() -> None:
    view = Traceable(net())
    with pytest.raises(OutOfOrderError) as caught:
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                late = view.layers[2].output[0]  # the late read
            with tracer.invoke(ONE):
                view.layers[0].output = (late, 0.5)  # the early write
    for text in ("late read", "early write"):
        assert f"test_invoke.py:{line_of('the ' + text)}" in str(caught.value)
    with pytest.raises(
        OutOfOrderError, match="No order lets all blocks go on, as they wait for each other: "
    ) as caught:
        with view.trace() as tracer:
            with tracer.invoke(ONE):  # the first block
                first = second  # noqa: F821 # the first wait
            with tracer.invoke(ONE):  # the second block
                second = first  # noqa: F841 # the second wait
    for text in ("first wait", "second wait", "first block", "second block"):
        assert f"test_invoke.py:{line_of('the ' + text)}" in str(caught.value)


def test_a_name_that_nobody_binds() -> None:
    view = Traceable(net())
    with pytest.raises(NameError, match="name 'nothing' is not defined"):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                nothing  # noqa: F821
    with pytest.raises(NameError, match="name 'maybe' is not defined"):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                if view.layers[0].output is None:
                    maybe = 1
            with tracer.invoke(ONE):
                maybe


def test_a_barrier_holds_until_all_have_come() -> None:
    view = Traceable(net())
    order = []
    with view.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(ONE):
            view.layers[0].output
            barrier()
            order.append("first after")
        with tracer.invoke(ONE):
            view.layers[2].output
            order.append("second before")
            barrier()
    assert order == ["second before", "first after"]
    with pytest.raises(OutOfOrderError, match=rf"a block stands at the barrier at {re.escape(__file__)}:\d+"):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                tracer.barrier(2)()


def test_the_callers_block_takes_part() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), view.trace() as tracer:
        with tracer.invoke(ONE):
            one = view.layers[1].output[0]
        with tracer.invoke(TWO):
            view.layers[0].output[0].mul_(0)
        hidden = view.layers[1].output[0]  # the whole batch
        with pytest.raises(UsageError, match="before the first value is asked for"):
            tracer.invoke(ONE, lambda: None)
        result = tracer.result
    assert torch.equal(hidden[:1], one)
    assert result.shape == (3, 3)
    assert torch.equal(result[1], result[2])


def test_skipping_replaces_a_blocks_own_rows() -> None:
    model = net()
    view = Traceable(model)
    with torch.no_grad(), view.trace() as tracer:
        with tracer.invoke(ONE):
            one = tracer.result
        with tracer.invoke(TWO):
            view.layers[1].skip((view.layers[0].output[0], 0.5))
            two = tracer.result
    with torch.no_grad(), hooks((model.layers[1], "output", lambda out: out)):
        assert torch.allclose(one, model(ONE))
    with torch.no_grad(), view.trace(TWO) as tracer:
        view.layers[1].skip((view.layers[0].output[0], 0.5))
        assert torch.allclose(two, tracer.result)


def test_what_has_been_put_in_place_of_a_module_is_let_go_when_the_call_is_over() -> None:
    """A generation makes many such calls."""
    view = Traceable(net())
    with torch.no_grad(), view.trace() as tracer:
        run = tracer.block.run
        with tracer.invoke(ONE):
            before = len(run.replacements)
        with tracer.invoke(TWO):
            view.layers[0].skip((view.embed.output, 0.5))
            view.layers[1].skip((view.layers[0].output[0], 0.5))
            view.layers[2].input
            after = len(run.replacements)
    assert after == before


@torch.no_grad()
def test_of_two_values_put_in_place_of_a_module_the_second_counts() -> None:
    view = Traceable(net())
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            view.layers[0].input
        with tracer.invoke(TWO):
            view.layers[1].skip((torch.ones(2, 4), 0.5))
            view.layers[1].skip((torch.zeros(2, 4), 0.5))
            hidden = view.layers[1].output[0].clone()
    assert torch.equal(hidden, torch.zeros(2, 4))


@torch.no_grad()
def test_what_a_block_puts_in_place_of_a_module_is_its_output_from_there_on() -> None:
    model = net()
    view = Traceable(model)
    instead = torch.ones(1, 4)
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            view.embed.skip(instead)
            one = view.embed.output.clone()
            view.embed.output = 2 * view.embed.output
            after = view.shared.input
        with tracer.invoke(TWO):
            two = view.embed.output
        with tracer.invoke():
            everything = view.embed.output
    assert torch.equal(one, instead)
    assert torch.equal(after, 2 * instead)
    assert torch.equal(two, model.embed(torch.cat([ONE, TWO]))[1:])
    assert torch.equal(everything, torch.cat([2 * instead, two]))


def test_a_cache_keeps_the_blocks_own_rows() -> None:
    view = Traceable(net())
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            cache = tracer.cache(["layers.0", "head"])
        with tracer.invoke(TWO):
            two = view.layers[0].output[0]
    assert (cache["head"].output.shape, cache["layers.0"].output[0].shape) == ((1, 3), (1, 4))
    assert two.shape == (2, 4)


class Flattens(nn.Module):
    """(batch, seq, hidden) in, its experts see (batch * seq, hidden), one of them some tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Linear(5, 5)
        self.some = nn.Identity()
        self.first = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.experts(x.flatten(0, 1))
        self.some(flat[:7])
        self.first(x.transpose(0, 1))
        return flat.view_as(x)


def test_rows_of_a_flattened_and_of_a_second_batch_axis() -> None:
    torch.manual_seed(0)
    model = Flattens()
    view = Traceable(model)
    one, two = torch.randn(1, 4, 5), torch.randn(2, 4, 5)
    with torch.no_grad(), view.trace() as tracer:
        with tracer.invoke(one):
            view.experts.output[0] = 0  # in place, in a view
            result = tracer.result
        with tracer.invoke(two):
            flat = view.experts.input
            view.experts.output = 2 * view.experts.output
            second = view.first.output
            edited = tracer.result
    assert torch.equal(flat, two.flatten(0, 1))
    assert torch.equal(second, two.transpose(0, 1))
    assert torch.allclose(edited, 2 * model(two))
    assert torch.allclose(result[0, 1:], model(one)[0, 1:])
    assert not result[0, 0].any()
    with pytest.raises(RowsError, match=r"shape \(7, 5\) in a batch of 3 prompts of 4 positions.*tracer.invoke\(\)"):
        with view.trace() as tracer:
            with tracer.invoke(one):
                view.some.output
            with tracer.invoke(two):
                pass


def test_an_argument_whose_rows_nobody_knows_is_left_alone() -> None:
    model = Calls(
        lambda self, x: self.child(x, bias=torch.ones(4, 1, 5)),
        child=Calls(lambda self, x, bias: x + bias.sum()),
    )
    view = Traceable(model)
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            args, kwargs = view.child.inputs
            with pytest.raises(RowsError, match=r"shape \(4, 1, 5\)"):
                kwargs["bias"].shape
            view.child.inputs = ((args[0] * 0,), kwargs)
            one = tracer.result
        with tracer.invoke(TWO):
            two = tracer.result
    assert torch.equal(one, torch.full((1, 2), 20.0))
    assert torch.equal(two, TWO + 20)


def test_what_does_not_fit() -> None:
    view = Traceable(net())
    with pytest.raises(AssignmentError, match=r"of shape \(1, 4\); what was assigned is of shape \(2, 4\)"):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                view.embed.output = torch.zeros(2, 4)
            with tracer.invoke(TWO):
                pass
    with pytest.raises(InputError, match="make no one batch"):
        with view.trace() as tracer:
            tracer.invoke(ONE, lambda: None)
            tracer.invoke(torch.zeros(1, 3), lambda: None)
    with pytest.raises(InputError, match="no tensor among these"):
        with view.trace() as tracer:
            tracer.invoke(3, lambda: None)
    with pytest.raises(UsageError, match="This trace has inputs of its own"):
        with view.trace(ONE) as tracer:
            tracer.invoke(TWO, lambda: None)
    with pytest.raises(UsageError, match=f"test_invoke.py:{line_of('no block')} has no block: write `with"):
        with view.trace() as tracer:
            tracer.invoke(ONE)  # no block
    with pytest.raises(UsageError, match="is no `with`"):
        with view.trace() as tracer:
            with tracer.invoke(ONE, lambda: None):
                pass


def test_steps_of_a_generation_in_two_blocks() -> None:
    step_model = Calls(lambda self, x: self.child(x), child=nn.Linear(2, 2))
    view = Traceable(step_model)

    def generate(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = step_model(x)
        return x

    from nnatomy.blocks.joining import Joining
    from nnatomy.tracing import Trace

    with torch.no_grad(), Trace(view, Joining(generate)) as tracer:
        with tracer.invoke(ONE):
            for step in tracer.iter[1:3]:
                view.child.output = view.child.output * 0
            one = tracer.result
        with tracer.invoke(TWO):
            values = [view.child.output for step in tracer.iter[:]]
            two = tracer.result
    with torch.no_grad():
        assert torch.equal(one, generate_from(step_model, torch.zeros(1, 2), 1))
        assert torch.allclose(two, generate(TWO))
    assert [value.shape for value in values] == [(2, 2)] * 4


def generate_from(model: nn.Module, x: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        x = model(x)
    return x


@pytest.mark.parametrize("grad", [True, False])
def test_edits_of_several_blocks_at_one_point_change_nobodys_value(grad: bool) -> None:
    model = net()
    view = Traceable(model)
    with torch.set_grad_enabled(grad), view.trace() as tracer:
        for factor in (2, 3):
            tracer.invoke(ONE, lambda factor=factor: multiply(view, factor))
        whole = tracer.invoke(lambda: view.embed.output)
        for factor in (5, 7):
            tracer.invoke(ONE, lambda factor=factor: multiply(view, factor))
        result = tracer.result
    embedded = model.embed(ONE)
    assert torch.equal(whole.value, torch.cat([factor * embedded for factor in (2, 3, 1, 1)]))
    with hooks((model.embed, "output", lambda out: torch.cat([2 * out, 3 * out, 5 * out, 7 * out]))):
        assert torch.allclose(result, model(ONE))


def multiply(view: Traceable, factor: int) -> None:
    view.embed.output = factor * view.embed.output


def test_gradients_flow_between_blocks() -> None:
    model = net()
    view = Traceable(model)
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            clean = view.layers[0].output[0]
            clean.retain_grad()
        with tracer.invoke(TWO):
            hidden, scale = view.layers[0].output
            view.layers[0].output = (hidden + clean, scale)
            loss = tracer.result.sum()
    loss.backward()
    assert clean.grad is not None
    assert clean.grad.abs().sum() > 0


def test_nothing_is_kept_until_python_looks_for_cycles() -> None:
    model = net()
    view = Traceable(model)
    edited = view.edit(lambda: view.embed.output.mul_(2))
    refs = []

    def bodies() -> None:
        with edited.trace() as tracer:
            with tracer.invoke(ONE) as block:  # noqa: F841
                hidden = view.layers[0].output[0]
            with tracer.invoke(TWO):
                view.layers[1].input = view.layers[1].input + hidden[0]
                mine = tracer.result  # noqa: F841

    def functions() -> None:
        with view.trace() as tracer:
            block = tracer.invoke(ONE, lambda: view.layers[0].output)  # noqa: F841
            tracer.invoke(TWO.clone(), lambda: tracer.result)

    def alone() -> None:
        with edited.trace(TWO) as tracer:
            hidden = tracer.result  # noqa: F841

    def call() -> None:
        edited(TWO)

    def fails() -> None:
        with pytest.raises(ZeroDivisionError), view.trace() as tracer:
            with tracer.invoke(ONE):
                hidden = view.layers[0].output[0]  # noqa: F841
                1 / 0

    handles = [
        module.register_forward_hook(lambda _m, _a, out: refs.append(weakref.ref(out[0]))) for module in model.modules()
    ]
    with no_leaks(model), no_gc():
        for run in (bodies, functions, alone, call, fails):
            run()
            assert len(refs) > 5
            assert settles(lambda: not any(ref() is not None for ref in refs)), run
            refs.clear()
    for handle in handles:
        handle.remove()


def test_a_function_that_a_block_has_defined_has_its_names_after_the_trace() -> None:
    view = Traceable(net())
    own = "frame"
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            early = "early"
        with tracer.invoke(ONE):
            own = "own"

            def names() -> Any:
                return early, own, late, view, ONE, len(own)

        with tracer.invoke(ONE):
            late = "late"
    assert names() == ("early", "own", "late", view, ONE, 3)
    with pytest.raises(NameError, match="name 'nothing' is not defined"):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                asks = lambda: nothing  # noqa: F821, E731
        asks()


def test_a_function_that_a_block_has_defined_waits_in_the_block_that_calls_it() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), view.trace() as tracer:
        with tracer.invoke(ONE):
            double = lambda: 2 * late  # noqa: E731
            last = view.layers[2].output[0]
        with tracer.invoke(ONE):
            doubled = double()
            after = view.layers[2].output[0]
        with tracer.invoke(ONE):
            late = view.layers[0].output[0]
    assert torch.equal(doubled, 2 * late)
    assert torch.equal(after, last)


def test_no_more_threads_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    view = Traceable(model)
    start, left = worker._thread.start_new_thread, [1]
    assert settles(lambda: not worker._idle, worker.IDLE_SECONDS + 5)

    def refuse(*args: Any) -> Any:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        return start(*args)

    with no_leaks(model), pytest.raises(RuntimeError, match="can't start"):
        with view.trace() as tracer:
            tracer.invoke(ONE, lambda: view.layers[0].output)
            tracer.invoke(TWO, lambda: view.layers[0].output)
            monkeypatch.setattr(worker, "_thread", SimpleNamespace(start_new_thread=refuse))
            view.layers[1].output
    assert not left


def test_a_trace_stopped_before_its_blocks_began() -> None:
    model = net()
    view = Traceable(model)
    with no_leaks(model), view.trace() as tracer:
        with tracer.invoke(ONE):
            reached = True
        tracer.stop()
    assert reached
    with no_leaks(model), pytest.raises(OutOfOrderError, match="had been stopped"):
        with view.trace() as tracer:
            tracer.invoke(ONE, lambda: view.embed.output)
            tracer.stop()


def test_a_block_of_nothing() -> None:
    view = Traceable(net())
    with view.trace() as tracer:
        with tracer.invoke(ONE) as block:
            pass
        with tracer.invoke(TWO):
            "a remark alone"
        with tracer.invoke():
            result = tracer.result
    with view.edit() as edited:
        ...
    assert block.done
    assert torch.equal(result, view(torch.cat([ONE, TWO])))
    assert torch.equal(edited(TWO), view(TWO))


def test_nothing_is_kept() -> None:
    view = Traceable(net())

    def run() -> weakref.ref[torch.Tensor]:
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                hidden = view.layers[0].output[0]
            with tracer.invoke(TWO):
                view.layers[0].output
        return weakref.ref(hidden)

    before = threading.active_count()
    refs = [run() for _ in range(20)]
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    assert threading.active_count() <= before + 4


def test_ctrl_c_while_a_block_is_at_work() -> None:
    import signal

    model = net()
    view = Traceable(model)
    threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
    start = time.monotonic()
    with no_leaks(model), pytest.raises(KeyboardInterrupt):
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                view.layers[0].output
                while True:
                    pass
            with tracer.invoke(TWO):
                view.layers[1].output
    assert time.monotonic() - start < 5
    assert re.match("<root", repr(view))


def test_one_thread_at_a_time_parses_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 raises SystemError where two do."""
    at_once, most = [0], [0]
    parse = capture.ast.parse

    def slow(source: str) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        return parse(source)

    def work() -> None:
        view = Traceable(net())
        with view.trace() as tracer:
            with tracer.invoke(ONE):
                view.layers[1].output

    monkeypatch.setattr(capture.ast, "parse", slow)
    capture.parsed.cache_clear()
    capture.compiled_body.cache_clear()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_what_is_kept_of_bodies_is_bounded() -> None:
    """A notebook makes a code of each cell that is run."""
    view = Traceable(net())
    text = "with view.trace() as tracer:\n    with tracer.invoke(ONE):\n        value = view.head.output\n"
    for cell in range(20):
        name = f"<cell {cell}>"
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        names = {"view": view, "ONE": ONE}
        exec(compile(text, name, "exec"), names)
        assert "value" in names
        del linecache.cache[name]
    for cached in (capture.compiled_body, capture.parsed):
        assert cached.cache_info().maxsize is not None


def test_a_gradient_asked_for_late() -> None:
    """When the block has gone on from the point that the tensor was read at."""
    model = net()
    view = Traceable(model)
    hooked: list[Tensor] = []
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            kept = view.layers[0].output[0]
            one = view.head.output
            kept.retain_grad()
        with tracer.invoke(TWO):
            watched = view.layers[0].output[0]
            two = view.head.output
            watched.register_hook(hooked.append)
    ((one**2).sum() + (two**2).sum()).backward()
    expected = []
    for given in (ONE, TWO):
        seen: list[Tensor] = []
        handle = model.layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))  # noqa: B023
        result = model(given)
        handle.remove()
        result = result if isinstance(result, Tensor) else result[0]
        expected += torch.autograd.grad((result**2).sum(), seen)
    assert kept.grad is not None
    torch.testing.assert_close(kept.grad, expected[0])
    torch.testing.assert_close(hooked[0], expected[1])


def test_many_blocks_that_assign_keep_no_more_than_their_rows() -> None:
    """Not a tensor of the whole batch for each that has assigned before: what is kept grows as the blocks do."""
    view = Traceable(net())

    def doubles() -> Tensor:
        read = view.layers[0].output[0]
        view.layers[0].output = (read * 2, *view.layers[0].output[1:])
        return read

    def bytes_kept(count: int) -> int:
        with view.trace() as tracer:
            blocks = [tracer.invoke(ONE, doubles) for _ in range(count)]
        return sum(
            {
                block.value.untyped_storage().data_ptr(): block.value.untyped_storage().nbytes() for block in blocks
            }.values()
        )

    assert bytes_kept(64) - bytes_kept(32) == 2 * (bytes_kept(32) - bytes_kept(16))


TOTAL: Any = "before"


def test_names_that_a_function_declares_global() -> None:
    global TOTAL
    root = net()
    view, (one, other) = Traceable(root), torch.randn(2, 1, 2)
    with no_leaks(root):
        with view.trace() as tracer:
            with tracer.invoke(one):
                TOTAL = view.embed.output.sum()
            with tracer.invoke(other):
                TOTAL += view.embed.output.sum()
        expected = root.embed(one).sum() + root.embed(other).sum()
        assert torch.allclose(TOTAL, expected, atol=1e-5)
        assert torch.allclose(globals()["TOTAL"], expected, atol=1e-5)
        with view.trace() as tracer:
            with tracer.invoke(one):
                global COUNT
                COUNT = 1 + len(view.embed.output)
        assert globals()["COUNT"] == 2


def test_what_is_put_into_a_dict() -> None:
    part = Calls(lambda self, x, scale: {"h": self.a(x) * scale, "more": [x]}, a=nn.Linear(2, 2))
    root = Calls(
        lambda self, x: self.o(self.part(x, scale=torch.ones(len(x), 1))["h"]), part=part, o=nn.Linear(2, 2)
    ).requires_grad_(False)
    view, (one, other) = Traceable(root), torch.randn(2, 1, 2)
    with no_leaks(root):
        with view.trace() as tracer:
            with tracer.invoke(one):
                view.part.output["h"] = torch.full((1, 2), 3.0)
                seen = view.part.output["h"]
                first = tracer.result
            with tracer.invoke(other):
                second = tracer.result
        assert torch.equal(seen, torch.full((1, 2), 3.0))
        assert torch.allclose(first, root.o(torch.full((1, 2), 3.0)))
        assert torch.allclose(second, root(other))
        with view.trace() as tracer:
            with tracer.invoke(one):
                view.part.inputs[1]["scale"] = torch.full((1, 1), 2.0)
                first = tracer.result
            with tracer.invoke(other):
                second = tracer.result
        assert torch.allclose(first, root.o(2 * part.a(one)))
        assert torch.allclose(second, root(other))
        with pytest.raises(AssignmentError, match="what was assigned is a"), view.trace() as tracer:
            with tracer.invoke(one):
                view.part.output["new"] = torch.zeros(1, 2)
                tracer.result
            with tracer.invoke(other):
                view.part.output


class Experiment:
    """Whose methods have private names, and annotations that there are only for type checkers."""

    def __init__(self) -> None:
        self.__scale = 3.0

    def run(self, view: Traceable, *inputs: Any) -> Any:
        with view.trace() as tracer:
            for x in inputs:
                with tracer.invoke(x):

                    def __scaled(__value: Tensor) -> Tensor:
                        return __value * self.__scale

                    found: OnlyForTypeCheckers = __scaled(view.embed.output)  # noqa: F821
        return found


def test_blocks_in_methods() -> None:
    root = net()
    one, other = torch.randn(2, 1, 2)
    assert torch.allclose(Experiment().run(Traceable(root), one, other), 3 * root.embed(other), atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_change_in_place_behind_another_blocks_assignment_is_of_the_tensor_assigned(grad: bool) -> None:
    """As if one after the other: the model's own tensor, which it uses elsewhere too, stays as it is from the assignment on."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 2)

        def forward(self, v: Tensor) -> Tensor:
            v = v * 1
            return v + self.part(v)

    model = Residual()
    view = Traceable(model)

    def assigns() -> None:
        view.part.input = view.part.input * 0

    with torch.set_grad_enabled(grad):
        with view.trace() as tracer:
            tracer.invoke(ONE, assigns)
            tracer.invoke(ONE, lambda: view.part.input.mul_(3))
            both = tracer.invoke(lambda: tracer.result)
        expected = torch.cat([ONE + model.part(ONE * 0), ONE + model.part(ONE * 3)])
        torch.testing.assert_close(both.value, expected)
        with view.trace() as tracer:
            tracer.invoke(ONE, lambda: view.part.input)
            tracer.invoke(ONE, lambda: view.part.input.mul_(3))
            both = tracer.invoke(lambda: tracer.result)
        expected = torch.cat([ONE + model.part(ONE), 3 * ONE + model.part(ONE * 3)])
        torch.testing.assert_close(both.value, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_changed_in_place_after_others_have_gone_on_at_the_same_point_counts(grad: bool) -> None:
    """The block has been given a copy, as another had put rows of its own there; it changes that one after a barrier."""
    model = nn.Sequential(nn.Linear(2, 2))
    view = Traceable(model)

    def assigns() -> None:
        view[0].input = view[0].input * 0

    def changes_late() -> None:
        given = view[0].input
        barrier()
        given.mul_(3)

    def comes_last() -> None:
        view[0].input
        barrier()

    with torch.set_grad_enabled(grad):
        with no_leaks(model), view.trace() as tracer:
            barrier = tracer.barrier(2)
            for block in (assigns, changes_late, comes_last):
                tracer.invoke(ONE, block)
            result = tracer.result
        torch.testing.assert_close(result, model(torch.cat([ONE * 0, ONE * 3, ONE])))


def test_a_function_that_a_block_defines_where_annotations_are_not_evaluated() -> None:
    """As `from __future__ import annotations` at the head of this file says."""
    view = Traceable(net())
    with view.trace() as tracer:
        with tracer.invoke(ONE):

            def halved(value: OnlyForTypeCheckers) -> OnlyForTypeCheckers:  # noqa: F821
                return value / 2

            half = halved(view.embed.output)
    assert torch.equal(half, view.module.embed(ONE) / 2)
    assert halved.__annotations__ == {"value": "OnlyForTypeCheckers", "return": "OnlyForTypeCheckers"}


def test_a_block_that_is_entered_twice_or_never() -> None:
    view = Traceable(net())
    with pytest.raises(UsageError, match="any other is entered once"), view.trace() as tracer:
        block = tracer.invoke(ONE)
        for _ in range(2):
            with block:
                view.embed.output
    with pytest.raises(UsageError, match="has no block"), view.trace() as tracer:
        tracer.invoke(ONE)
        view.embed.output


def test_after_the_trace_a_function_has_the_names_that_blocks_have_bound_last() -> None:
    """As a function that is defined in the frame itself would."""
    view = Traceable(net())
    found = []
    with view.trace() as tracer:
        with tracer.invoke(ONE):
            name = "first"
        with tracer.invoke(ONE):
            ask = lambda: name  # noqa: E731
            found.append(ask())
        with tracer.invoke(ONE):
            name = "last"
    assert (found, ask(), name) == (["first"], "last", "last")


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_that_is_read_and_then_changed_in_place(grad: bool) -> None:
    """A read changes nothing: where gradients make the model go on with a copy of what was read, it is refused."""

    def forward(model: Any, x: Tensor) -> Tensor:
        hidden = model.first(x)
        model.act(hidden)
        return hidden

    model = Calls(forward, first=nn.Linear(2, 2), act=nn.ReLU(inplace=True))
    view = Traceable(model)
    expected = model(torch.cat([ONE, TWO]))
    assert not torch.equal(expected, model.first(torch.cat([ONE, TWO])))

    def trace() -> Tensor:
        with torch.set_grad_enabled(grad), view.trace(early_stop=False) as tracer:
            tracer.invoke(ONE, lambda: None)
            tracer.invoke(TWO, lambda: view.act.input)
        return tracer.result

    if grad:
        with pytest.raises(
            RowsError, match=r"^An input of a ReLU was read .* is changed in place in that module\. .*no_grad\(\)\.$"
        ):
            trace()
    else:
        assert torch.equal(trace(), expected)
    with view.trace(early_stop=False) as tracer:  # the mend that the text gives
        tracer.invoke(ONE, lambda: None)
        tracer.invoke(TWO, lambda: view.first.output)
    assert torch.equal(tracer.result, expected)
