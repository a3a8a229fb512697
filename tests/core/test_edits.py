"""Lasting edits: a view that edits in every trace, call and step, and an original that does not."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import Calls, hooks, net, no_gc, no_leaks, settles, x
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotReachedError, OutOfOrderError, UsageError
from nnatomy.tracing import Traceable


def doubled(out):
    return (2 * out[0], out[1])


def test_every_trace_and_call_of_the_view_is_edited_and_the_original_is_not() -> None:
    model = net()
    view = Traceable(model)

    def double() -> None:
        hidden, scale = view.layers[1].output
        view.layers[1].output = (2 * hidden, scale)

    plain = model(x())
    with hooks((model.layers[1], "output", doubled)):
        expected = model(x())
    with no_leaks(model):
        edited = view.edit(double)
        for _ in range(2):
            assert torch.equal(edited(x()), expected)
            with edited.trace(x()) as tracer:
                before = edited.layers[0].output[0]
                after = edited.layers[1].output[0]
                assert torch.equal(tracer.result, expected)
            with view.trace(x()):
                assert torch.equal(view.layers[0].output[0], before)
                assert torch.equal(2 * view.layers[1].output[0], after)
            assert torch.equal(view(x()), plain)
        with edited.trace(x()):
            assert torch.equal(edited.layers[0].output[0], before)  # and stops here
        assert torch.equal(edited.without_edits()(x()), plain)


def test_edits_stack_and_can_be_listed() -> None:
    model = net()
    view = Traceable(model)

    def add() -> None:
        view.embed.output = view.embed.output + 1

    def triple() -> None:
        view.embed.output = view.embed.output * 3

    edited = view.edit(add).edit(triple)
    assert edited.edits == (add, triple)
    assert view.edits == ()
    with hooks((model.embed, "output", lambda out: 3 * (out + 1))):
        expected = model(x())
    assert torch.equal(edited(x()), expected)


@pytest.mark.parametrize("called", [True, False])
def test_an_edit_of_what_a_later_step_has_not(called: bool) -> None:
    """A module that a step does not call is not edited there; one that is called, and does not compute the value, is an error."""

    class Once(nn.Module):
        count = 0

        def forward(self, v: Tensor) -> Tensor:
            self.count += 1
            return v.softmax(-1) if self.count == 1 else v

    part = Once()
    model = Calls(lambda self, v: self.part(v) if called or not part.count else v, part=part)
    view = Traceable(model)
    v = torch.ones(1, 2)

    def edit() -> None:
        view.part.source.softmax.output = 3 * v

    traced = view.edit(edit).trace_call(lambda: [model(v) for _ in range(3)])
    if called:
        with pytest.raises(
            NotReachedError, match=r"softmax.output of step 1 was asked for, but that call has ended without"
        ):
            traced.run()
    else:
        first, *others = traced.run()
        assert torch.equal(first, 3 * v)
        assert all(torch.equal(other, v) for other in others)


def test_an_edit_as_a_block() -> None:
    model = net()
    view = Traceable(model)
    factor = 2
    with view.edit() as edited:
        hidden, scale = view.layers[1].output
        view.layers[1].output = (factor * hidden, scale)
    factor = 100  # the names are as they were
    with hooks((model.layers[1], "output", doubled)):
        expected = model(x())
    assert torch.equal(edited(x()), expected)


def test_an_edit_keeps_what_its_block_uses_and_nothing_else() -> None:
    model = net()
    view = Traceable(model)
    refs = []

    def make() -> Traceable:
        used, other = torch.ones(4), torch.ones(4)
        refs.extend(map(weakref.ref, (used, other)))
        with view.edit() as edited:
            view.embed.output = view.embed.output + sum(used for _ in range(1))
        return edited

    with hooks((model.embed, "output", lambda out: out + 1)):
        expected = model(x())
    with no_gc():
        edited = make()
        assert refs[1]() is None
        assert torch.equal(edited(x()), expected)
        del edited
        assert settles(lambda: refs[0]() is None)


def test_what_is_no_edit() -> None:
    with pytest.raises(UsageError, match="An edit is a function without arguments; got 3"):
        Traceable(net()).edit(3)


def test_an_error_in_an_edit_arrives() -> None:
    model = net()
    view = Traceable(model)
    edited = view.edit(lambda: view.layers[1].output[0] / 0 + [])
    with no_leaks(model), pytest.raises(TypeError, match="unsupported operand"):
        edited(x())
    late = view.edit(lambda: (view.layers[1].output, view.layers[0].output))
    with no_leaks(model), pytest.raises(OutOfOrderError, match=r"layers.0.output was asked for"):
        with late.trace(x()):
            late.layers[2].output


def test_with_blocks_of_their_own_prompts_and_in_every_step() -> None:
    model = StandardizedTransformer("demo:gpt2")
    vector = torch.linspace(-1, 1, model.hidden_size)
    prompts = ["The capital of France is", "Japan is in"]
    edited = model.edit(lambda: model.steer(2, vector, 0.5))
    with torch.no_grad():
        with edited.trace() as tracer:
            with tracer.invoke(prompts[0]):
                one = edited.logits
            with tracer.invoke(prompts[1]):
                two = edited.logits
        for prompt, logits in zip(prompts, (one, two), strict=True):
            with model.trace(prompt):
                model.steer(2, vector, 0.5)
                alone = model.logits
            assert torch.allclose(logits, alone, atol=1e-3)
            assert torch.allclose(edited(prompt).logits, alone, atol=1e-3)
        tokens = edited.generate(prompts[0], max_new_tokens=4).run()
        with model.generate(prompts[0], max_new_tokens=4) as tracer:
            for _ in tracer.iter[:]:
                model.steer(2, vector, 0.5)
            assert torch.equal(tokens, tracer.result)
        assert not torch.allclose(model(prompts[0]).logits, edited(prompts[0]).logits, atol=1e-3)


def test_a_body_uses_the_name_that_its_own_with_binds() -> None:
    """In a function too, where the name is bound after the body has been captured."""
    model = net()
    view = Traceable(model)
    with view.edit() as mine:
        hidden, scale = mine.layers[1].output
        mine.layers[1].output = (2 * hidden, scale)
    with hooks((model.layers[1], "output", doubled)):
        expected = model(x())
    assert torch.equal(mine(x()), expected)
    with view.trace() as tracer:
        with tracer.invoke(x()) as block:
            its_line = block.line
        with tracer.invoke(x()):
            pass
    assert its_line.file == __file__
