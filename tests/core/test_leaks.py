"""Nothing outlives a trace: tensors, threads, gates, memory."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from helpers import Calls, Weak, busy_threads, forward_threads, net, no_gc, no_leaks, settles, x
from torch import nn

from nnatomy.core import worker
from nnatomy.core.run import NO_RESULT
from nnatomy.errors import NotReachedError, OutOfOrderError
from nnatomy.tracing import Traceable


class Boom(Exception):
    pass


def reads(view, weak, tracer):
    weak(view.layers[0].output[0])
    weak(view.layers[1].input)


def result(view, weak, tracer):
    weak(view.layers[0].output[0])
    weak(tracer.result)


def edits(view, weak, tracer):
    weak(view.embed.output)
    view.embed.output = weak(view.embed.output + 1)
    view.layers[0].mlp.skip(weak(torch.ones(2, 4)))
    weak(view.layers[1].output[0])


def body_fails(view, weak, tracer):
    weak(view.layers[0].output[0])
    raise Boom


def out_of_order(view, weak, tracer):
    weak(view.layers[1].output[0])
    view.embed.output


def not_reached(view, weak, tracer):
    weak(view.layers[1].output[0])
    view.never.output


def stopped(view, weak, tracer):
    weak(view.layers[1].output[0])
    tracer.stop()


def cached(view, weak, tracer):
    tracer.cache()
    weak(view.layers[1].output[0])


def stepped(view, weak, tracer):
    for _ in tracer.iter[:]:
        weak(view.layers[1].output[0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "body", [reads, result, edits, body_fails, out_of_order, not_reached, stopped, cached, stepped]
)
def test_tensors_are_freed_by_reference_counts_alone(body, grad) -> None:
    model = net()
    view = Traceable(model)
    weak = Weak()

    def one():
        with torch.set_grad_enabled(grad), view.trace(weak(x())) as tracer:
            body(view, weak, tracer)

    for module in model.modules():
        module.register_forward_hook(lambda _m, _a, out: weak(out) if isinstance(out, torch.Tensor) else None)
    with no_leaks(model), no_gc():
        try:
            one()
        except (Boom, OutOfOrderError, NotReachedError):
            pass
        assert len(weak.refs) > 3
        assert settles(lambda: weak.alive() == 0), [ref() for ref in weak.refs if ref() is not None]


def test_tensors_of_a_model_that_fails_are_freed_with_the_error() -> None:
    weak = Weak()

    def fail(self, v):
        mine = weak(v + 1)
        raise Boom(mine.shape)

    model = Calls(lambda self, v: self.fail(weak(self.child(v))), child=nn.Linear(2, 2), fail=Calls(fail))
    view = Traceable(model)
    with no_leaks(model), no_gc():
        for ask in (lambda t: t.result, lambda t: view.fail.output, lambda t: list(t.iter[1:])):
            caught = None
            try:
                with view.trace(weak(x())) as tracer:
                    ask(tracer)
            except Boom as error:
                caught = error
            assert caught is not None
            assert weak.alive() > 0  # its frames hold them, as without a trace
            del caught, tracer
            assert settles(lambda: weak.alive() == 0)


def test_what_a_name_holds_stays_and_nothing_else() -> None:
    model = net()
    view = Traceable(model)
    with no_gc(), torch.no_grad():
        with view.trace(x()) as tracer:
            kept = view.layers[0].mlp.output
            weak = Weak()
            weak(view.layers[0].output[0])
        assert settles(lambda: weak.alive() == 0)
        assert kept.sum().isfinite()
        assert tracer._result is NO_RESULT


def test_a_trace_never_entered_or_never_asked() -> None:
    model = net()
    view = Traceable(model)
    weak = Weak()
    with no_leaks(model), no_gc():
        trace = view.trace(weak(x()))
        del trace
        assert weak.alive() == 0
        with view.trace(weak(x())):
            pass
        assert weak.alive() == 0


def test_idle_workers_end() -> None:
    view = Traceable(net())
    with view.trace(x()):
        view.embed.output
    assert settles(lambda: busy_threads() == 0)
    assert settles(lambda: not forward_threads(), worker.IDLE_SECONDS + 5)
    assert not worker._idle
    with view.trace(x()):
        view.embed.output


def test_an_idle_worker_holds_nothing() -> None:
    view = Traceable(net())
    assert settles(lambda: not forward_threads(), worker.IDLE_SECONDS + 5)
    with no_gc():
        for _ in range(2):  # by a new thread, and by one that has been idle
            with view.trace(x()) as tracer:
                view.embed.output
                run = ref(tracer.block.run)
            del tracer
            assert settles(lambda: busy_threads() == 0)
            assert run() is None
        assert forward_threads()


def test_a_tensor_is_pickled_without_us(tmp_path) -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()):
        value = view.embed.output.detach()
    torch.save((value, model.state_dict()), tmp_path / "saved")
    assert b"nnatomy" not in (tmp_path / "saved").read_bytes()
