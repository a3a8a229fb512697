"""Reading and assigning inputs and outputs, against plain hooks."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import Calls, Layer, Net, hooks, net, no_leaks, outputs, x
from torch import nn

from nnatomy.tracing import Traceable


def test_every_output_is_what_a_hook_sees_and_the_result_is_the_models() -> None:
    model = net()
    view = Traceable(model)
    seen = outputs(model, lambda: model(x()))
    order = ["embed", "shared"]
    for i in range(3):
        order += [
            f"layers.{i}.attn",
            *(f"layers.{i}.mlp.{j}" for j in range(3)),
            f"layers.{i}.mlp",
            f"layers.{i}",
        ]
    order += ["head"]
    with no_leaks(model):
        with view.trace(x()) as tracer:
            read = {path: view[path].output for path in order}
            result = tracer.result
        assert torch.equal(result, model(x()))
        assert torch.equal(tracer.result, result)
    for path, value in read.items():
        expected = seen[path][0]
        if isinstance(value, tuple):
            assert torch.equal(value[0], expected[0])
            assert value[1] == expected[1] == 0.5
        else:
            assert torch.equal(value, expected)


def test_attribute_index_and_path_name_the_same_module() -> None:
    view = Traceable(net())
    assert view.layers[1].mlp[2].module is view["layers.1.mlp.2"].module is view[1][1][1][2].module
    assert view.layers[-1].module is view.layers[2].module
    assert [child.path for child in view.layers[0:2]] == ["layers.0", "layers.1"]
    assert [child.path for child in view.layers] == ["layers.0", "layers.1", "layers.2"]
    assert len(view.layers) == 3
    assert "embed" in dir(view)


def test_inputs_by_position_and_by_keyword() -> None:
    model = net()
    view = Traceable(model)
    got = {}
    with hooks(
        (model.layers[0], "input", lambda value: got.__setitem__("layer", value)),
        (model.head, "input", lambda value: got.__setitem__("head", value)),
    ):
        model(x())
    with view.trace(x()):
        args, kwargs = view.layers[0].inputs
        first = view.layers[0].input
        head_args, head_kwargs = view.head.inputs
        head_first = view.head.input
    assert torch.equal(args[0], got["layer"][0][0])
    assert first is args[0]
    assert kwargs == got["layer"][1] == {"scale": 0.5}
    assert head_args == ()
    assert head_first is head_kwargs["input"]
    assert torch.equal(head_first, got["head"][1]["input"])


def test_input_of_a_call_without_arguments() -> None:
    model = Calls(lambda self, t: t + self.made(), made=Calls(lambda self, *extra: sum(extra, torch.ones(()))))
    view = Traceable(model)
    with view.trace(torch.zeros(())) as tracer:
        assert view.made.inputs == ((), {})
        assert view.made.input is None
        view.made.input = torch.tensor(2.0)
        assert view.made.inputs == ((2.0,), {})
        result = tracer.result
    assert result.item() == 3.0


def test_assigning_an_output_is_what_a_returning_hook_does() -> None:
    model = net()
    view = Traceable(model)
    with hooks((model.layers[1], "output", lambda out: (out[0] * 3 + 1, 7.0))):
        expected = model(x())
    assert not torch.equal(expected, model(x()))
    with no_leaks(model), view.trace(x()) as tracer:
        hidden, _ = view.layers[1].output
        view.layers[1].output = (hidden * 3 + 1, 7.0)
        assert view.layers[1].output[1] == 7.0
        result = tracer.result
    assert torch.equal(result, expected)


def test_assigning_input_and_inputs() -> None:
    model = net()
    view = Traceable(model)

    def double(value):
        args, kwargs = value
        return (args[0] * 2, *args[1:]), {**kwargs, "scale": 2.0}

    with hooks(
        (model.layers[0], "input", double),
        (model.head, "input", lambda value: (value[0], {"input": value[1]["input"] + 1})),
    ):
        expected = model(x())
    with view.trace(x()) as tracer:
        view.layers[0].input = view.layers[0].input * 2
        args, kwargs = view.layers[0].inputs
        view.layers[0].inputs = args, {**kwargs, "scale": 2.0}
        assert view.layers[0].inputs[1]["scale"] == 2.0
        view.head.input = view.head.input + 1
        result = tracer.result
    assert torch.equal(result, expected)


def test_assigning_without_reading_first() -> None:
    model = net()
    view = Traceable(model)
    value = torch.full((2, 4), 0.25)
    with hooks((model.embed, "output", lambda _: value)):
        expected = model(x())
    with view.trace(x()) as tracer:
        view.embed.output = value
        result = tracer.result
    assert torch.equal(result, expected)


@torch.no_grad()
def test_in_place_edits_take_effect_and_later_reads_see_them() -> None:
    model = net()
    view = Traceable(model)
    with hooks((model.layers[0].mlp[1], "output", lambda out: out.mul_(-2))):
        expected = model(x())
    with view.trace(x()) as tracer:
        view.layers[0].mlp[1].output[:] *= -2
        first = view.layers[0].mlp[1].output
        first[0, 0] += 0
        assert view.layers[0].mlp[1].output is first
        result = tracer.result
    assert torch.equal(result, expected)


@torch.no_grad()
def test_output_of_a_container_after_an_edit_inside_it() -> None:
    model = net()
    view = Traceable(model)
    with hooks((model.layers[1].attn, "output", lambda out: out * 0)):
        seen = outputs(model, lambda: model(x()))
    with view.trace(x()):
        view.layers[1].attn.output = view.layers[1].attn.output * 0
        layer = view.layers[1].output[0]
    assert torch.equal(layer, seen["layers.1"][0][0])


def test_the_root_has_an_input_and_an_output_too() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        view.input = view.input * 2
        view.output = view.output + 1
        result = tracer.result
    assert torch.equal(result, model(x() * 2) + 1)


def test_points_see_what_hooks_of_the_user_leave() -> None:
    model = net()
    view = Traceable(model)
    handle = model.embed.register_forward_hook(lambda _m, _a, out: out + 10)
    with view.trace(x()):
        read = view.embed.output
    handle.remove()
    assert torch.equal(read, model.embed(x()) + 10)


def test_skip_puts_a_value_in_the_place_of_the_call() -> None:
    model = net()
    view = Traceable(model)
    ran = []
    with hooks((model.layers[1].mlp, "output", lambda out: torch.ones_like(out))):
        expected = model(x())
    with hooks((model.layers[1].mlp[0], "output", lambda out: ran.append(1))), view.trace(x()) as tracer:
        view.layers[1].mlp.skip(torch.ones(2, 4))
        assert torch.equal(view.layers[1].mlp.output, torch.ones(2, 4))
        result = tracer.result
    assert torch.equal(result, expected)
    assert not ran


def test_the_output_of_a_skipped_module_can_be_edited_and_the_input_read_before() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        before = view.layers[0].input
        view.layers[0].skip((before, 0.5))
        view.layers[0].output = (view.layers[0].output[0] * 2, 0.5)
        result = tracer.result
    with hooks((model.layers[0], "output", lambda _: (before * 2, 0.5))):
        assert torch.equal(result, model(x()))


def test_a_skip_of_the_root_is_the_result() -> None:
    view = Traceable(net())
    with view.trace(x()) as tracer:
        view.skip("nothing")
        assert tracer.result == "nothing"


def test_shared_modules_by_call() -> None:
    model = net()
    view = Traceable(model)
    seen = outputs(model, lambda: model(x()))["shared"]
    with view.trace(x()) as tracer:
        first = view.shared.output
        assert view.shared.calls[0].output is first
        last = view.shared.calls[1].output
        view.shared.calls[1].output = last * 2
        result = tracer.result
    assert torch.equal(first, seen[0])
    assert torch.equal(last, seen[1])
    assert torch.equal(result, model.head(seen[1] * 2))


def test_a_module_that_calls_itself() -> None:
    class Nested(nn.Module):
        def forward(self, depth: int) -> int:
            return 1 if depth == 0 else 10 * self(depth - 1) + depth

    model = Calls(lambda self, d: self.nested(d), nested=Nested())
    view = Traceable(model)
    with view.trace(3) as tracer:
        inner = [view.nested.calls[k].inputs[0][0] for k in range(4)]
        outer = [view.nested.calls[k].output for k in reversed(range(4))]
        assert tracer.result == outer[-1]
    assert inner == [3, 2, 1, 0]
    assert outer == [1, 11, 112, 1123]


@pytest.mark.parametrize("value", [None, 3, "text", (), {"a": torch.ones(1)}, [torch.ones(1), None]])
def test_any_value_goes_through(value: object) -> None:
    model = Calls(lambda self, v: self.same(v), same=nn.Identity())
    view = Traceable(model)
    with view.trace(value) as tracer:
        assert view.same.output is value
        assert tracer.result is value
    with view.trace("other") as tracer:
        view.same.output = value
        assert tracer.result is value


def test_a_child_named_like_an_attribute_is_reached_by_path() -> None:
    model = Calls(lambda self, v: self._modules["output"](v), output=nn.Identity())
    view = Traceable(model)
    with view.trace(5):
        assert view["output"].output == 5
        assert view.output == 5


def test_a_view_calls_its_module_outside_the_run() -> None:
    model = net()
    view = Traceable(model)
    with view.trace(x()) as tracer:
        hidden = view.layers[0].output[0]
        aside = view.head(view.shared(hidden))
        assert view.layers[1].input is hidden
        result = tracer.result
    assert torch.equal(aside, model.head(model.shared(hidden)))
    assert torch.equal(result, model(x()))


def test_reads_leave_the_result_bit_identical() -> None:
    model = Net(width=64)
    big = torch.randn(17, 2)
    expected = model(big)
    view = Traceable(model)
    with view.trace(big) as tracer:
        for layer in view.layers:
            layer.attn.output, layer.mlp.output, layer.output
        assert torch.equal(tracer.result, expected)
    assert isinstance(model.layers[0], Layer)


def test_views_can_be_referred_to_weakly() -> None:
    view = Traceable(net())
    assert weakref.ref(view)() is view
    child = view.layers[0]
    assert weakref.ref(child)() is child
