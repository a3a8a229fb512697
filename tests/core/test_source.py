"""`module.source`: the calls inside a forward, against the same computation written out and plain torch functions."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Calls, no_leaks
from torch import Tensor, nn

from nnatomy.errors import NotReachedError, OutOfOrderError, OutsideTraceError
from nnatomy.tracing import Traceable


class Attention(nn.Module):
    """With a helper, a loop, a branch, a comprehension, and operators."""

    def __init__(self, rounds: int = 3) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.rounds = rounds

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        queries, keys = self.q(x), self.k(x)
        if not first:
            queries = queries.softmax(-1)
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(4)
        x = self.attend(scores) @ x
        for _ in range(self.rounds):
            x = torch.tanh(x + 1)
        parts = [part * 2 for part in x.unbind(1)]
        x = x.clone()
        x[:, 0] = -parts[0]
        x += torch.stack(parts, 1)
        return x

    def attend(self, scores: Tensor) -> Tensor:
        return nn.functional.softmax(scores, dim=-1)


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention()


def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 4)


def scores_of(net: Attention, x: Tensor) -> Tensor:
    return net.q(x) @ net.k(x).transpose(-2, -1) / math.sqrt(4)


def rest(net: Attention, pattern: Tensor, x: Tensor) -> list[Tensor]:
    rounds = [pattern @ x]
    for _ in range(net.rounds):
        rounds.append(torch.tanh(rounds[-1] + 1))
    return rounds


def finish(x: Tensor) -> Tensor:
    doubled = 2 * x
    return torch.cat([-doubled[:, :1], x[:, 1:]], 1) + doubled


NAMES = [
    *("transpose", "matmul", "truediv", "attend.softmax", "matmul_1"),
    *(("add", "tanh") * 3),
    *("unbind", "mul", "mul", "mul", "clone", "neg", "stack", "iadd"),
]


def test_the_calls_are_listed_in_the_order_they_are_made() -> None:
    net = attention()
    view = Traceable(net)
    with torch.no_grad(), view.trace(x()):
        calls = list(view.source)
    assert [call.name for call in calls if call.name != "setitem"] == NAMES
    by_name = {call.name: call for call in calls}
    softmax = by_name["attend.softmax"]
    assert softmax.function == "torch.nn.functional.softmax"
    assert softmax.shapes == ((2, 3, 3),)
    assert softmax.text == "return nn.functional.softmax(scores, dim=-1)"
    with open(softmax.file) as file:
        assert file.read().split("\n")[softmax.line - 1].strip() == softmax.text
    with view.trace(x()):
        assert [call.name for call in view.source.attend] == ["attend.softmax"]
    with view.trace(x()):
        assert "attend.softmax  (2, 3, 3)" in str(view.source)
    with pytest.raises(OutsideTraceError):
        str(view.source)


def test_what_is_between_modules_is_read() -> None:
    net = attention()
    view = Traceable(net)
    scores = scores_of(net, x())
    with torch.no_grad(), no_leaks(net), view.trace(x()) as tracer:
        keys = view.k.output  # the module is at work when its source is first asked
        assert torch.equal(view.source.transpose.input, keys)
        given = view.source.attend.softmax.input
        assert view.source.attend.softmax.inputs[1]["dim"] == -1
        pattern = view.source.attend.softmax.output
        stacked = view.source["stack"].output
        result = tracer.result
    assert torch.equal(given, scores)
    assert torch.equal(pattern, scores.softmax(-1))
    assert torch.equal(stacked, 2 * rest(net, pattern, x())[-1])
    assert torch.equal(result, net(x()))


def test_the_scores_before_the_softmax_are_replaced() -> None:
    net = attention()
    view = Traceable(net)
    with torch.no_grad():
        scores = scores_of(net, x())
        masked = scores.masked_fill(torch.eye(3, dtype=torch.bool), -math.inf)
        expected = finish(rest(net, masked.softmax(-1), x())[-1])
        with no_leaks(net), view.trace(x()) as tracer:
            view.source.attend.softmax.input = masked
            assert torch.equal(tracer.result, expected)
        with view.trace(x()) as tracer:  # in place
            view.source.attend.softmax.input.copy_(masked)
            assert torch.equal(tracer.result, expected)
        with view.trace(x()) as tracer:
            view.source.attend.softmax.output = masked.softmax(-1)
            assert torch.equal(tracer.result, expected)
        with view.trace(x()) as tracer:
            view.source.attend.softmax.inputs = ((masked,), {"dim": -2})
            assert torch.equal(tracer.result, finish(rest(net, masked.softmax(-2), x())[-1]))


def test_each_round_of_a_loop() -> None:
    net = attention()
    view = Traceable(net)
    with torch.no_grad():
        rounds = rest(net, scores_of(net, x()).softmax(-1), x())
        with view.trace(x()) as tracer:
            first = view.source.tanh.output
            second = view.source.tanh.calls[1].output
            view.source.tanh.calls[2].output = torch.zeros(2, 3, 4)
            assert torch.equal(tracer.result, torch.zeros(2, 3, 4))
        assert torch.equal(first, rounds[1])
        assert torch.equal(second, rounds[2])
        with pytest.raises(NotReachedError, match=r"source.tanh.output was asked for.*Of a call in a loop, ask before"):
            with view.trace(x()):
                view.q.output
                view.source.tanh.output


def test_names_do_not_depend_on_which_branch_is_taken() -> None:
    net = attention()
    view = Traceable(net)
    with torch.no_grad(), view.trace(x(), first=False):
        branch = view.source.softmax.output
        pattern = view.source.attend.softmax.output
    assert torch.equal(branch, net.q(x()).softmax(-1))
    assert torch.equal(pattern, (branch @ net.k(x()).transpose(-2, -1) / 2).softmax(-1))


def test_calls_and_steps() -> None:
    net = attention()
    root = Calls(lambda self, x: self.attention(self.attention(x)), attention=net)
    view = Traceable(root)
    with torch.no_grad():
        first = scores_of(net, x())
        second = scores_of(net, net(x()))
        with view.trace(x()):
            assert torch.equal(view.attention.source.attend.softmax.input, first)
            assert torch.equal(view.attention.calls[1].source.attend.softmax.input, second)
        with view.trace_call(lambda x: root(root(x)), x()) as tracer:
            seen = [view.attention.source.attend.softmax.input for _ in tracer.iter[:]]
    assert torch.equal(seen[0], first)
    assert torch.equal(seen[1], scores_of(net, net(net(x()))))


def test_gradients() -> None:
    net = attention()
    view = Traceable(net)
    with view.trace(x()) as tracer:
        scores = view.source.attend.softmax.input
        scores.retain_grad()
        tracer.result.sum().backward()
    leaf = scores_of(net, x()).detach().requires_grad_()
    finish(rest(net, leaf.softmax(-1), x())[-1]).sum().backward()
    assert torch.allclose(scores.grad, leaf.grad)


def test_too_late_and_not_there() -> None:
    view = Traceable(attention())
    with pytest.raises(
        OutOfOrderError, match=r"source.transpose.output was asked for at .*behind the model.source.attend"
    ):
        with view.trace(x()):
            view.source.attend.softmax.output
            view.source.transpose.output
    with pytest.raises(NotReachedError, match=r"print\(model.source\) lists its calls"):
        with view.trace(x()):
            view.source.softmx.output
    with pytest.raises(IndexError, match="count from the first, 0"):
        view.source.tanh.calls[-1]


def test_a_module_of_torch_itself() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    view = Traceable(nn.Sequential(layer))
    with view.trace(x()):
        (relu, add) = [call.name for call in view[0].source if "norm2" in call.text or "linear2" in call.text]
    assert relu.endswith("_ff_block_1.activation")
    with view.trace(x()) as tracer:
        mid = view[0].norm1.output
        added = view[0].source[add].output
        result = tracer.result
    assert torch.equal(added, mid + layer.linear2(layer.linear1(mid).relu()))
    assert torch.equal(result, layer.norm2(added))


def test_inside_a_module_that_is_inside_another_one_asked_for() -> None:
    net = attention()
    root = Calls(lambda self, x: x, attention=net)

    def forward(x: Tensor) -> Tensor:
        return (root.attention(x) + 1).tanh()

    root.forward = forward  # an instance's own
    view = Traceable(root)
    with torch.no_grad(), view.trace(x()) as tracer:
        scores = view.attention.source.attend.softmax.input
        added = view.source.add.output
        result = tracer.result
    assert torch.equal(scores, scores_of(net, x()))
    assert torch.equal(added, net(x()) + 1)
    assert torch.equal(result, (net(x()) + 1).tanh())


def test_without_source_a_call_is_named_by_its_line() -> None:
    names: dict = {"torch": torch, "nn": nn}
    exec("class Bare(nn.Module):\n    def forward(self, x):\n        return torch.tanh(x + 1)\n", names)
    view = Traceable(nn.Sequential(names["Bare"]()))
    with view.trace(x()):
        assert [call.name for call in view[0].source] == ["line3", "line3"]
    with view.trace(x()):
        assert torch.equal(view[0].source.line3.calls[1].output, torch.tanh(x() + 1))


def test_blocks_see_their_own_rows() -> None:
    net = attention()
    view = Traceable(net)
    with torch.no_grad():
        with view.trace() as tracer:
            with tracer.invoke(x()[:1]):
                one = view.source.attend.softmax.input.clone()
                view.source.attend.softmax.output = torch.zeros(1, 3, 3)
                result = tracer.result
            with tracer.invoke(x()[1:]):
                two = view.source.attend.softmax.input
                untouched = tracer.result
    assert torch.allclose(torch.cat([one, two]), scores_of(net, x()), atol=1e-6)
    assert torch.allclose(result, finish(rest(net, torch.zeros(1, 3, 3), x()[:1])[-1]), atol=1e-6)
    assert torch.allclose(untouched, net(x()[1:]), atol=1e-6)


def test_what_is_called_outside_the_forward_has_none_of_its_names() -> None:
    """Hooks of the module and a module that it does not know: neither is the forward's own relu."""

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x - 1)

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(unknown(x) + 1)

    unknown, module = Unknown(), Module()
    module.register_forward_pre_hook(lambda _, args: (torch.relu(args[0]),))
    view, x = Traceable(nn.Sequential(module)), torch.randn(2, 4)
    with view.trace(x):
        mine = view[0].source.relu.output
    assert torch.equal(mine, torch.relu(torch.relu(torch.relu(x) - 1) + 1))
    with view.trace(x) as tracer:
        view[0].source.relu.output = torch.full((2, 4), 7.0)
        result = tracer.result
    assert torch.equal(result, torch.full((2, 4), 7.0))


def test_a_decorated_forward() -> None:
    class Rotary(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(x)

    view, x = Traceable(nn.Sequential(Rotary())), torch.randn(2, 4)
    with no_leaks(view.module):
        with view.trace(x) as tracer:
            cos = view[0].source.cos.output
            result = tracer.result
        assert torch.equal(cos, x.cos())
        assert torch.equal(result, x.cos())


def test_a_forward_of_the_instance() -> None:
    module = nn.Identity()
    module.forward = lambda x: torch.sin(x) + 1  # type: ignore[method-assign]
    view, x = Traceable(nn.Sequential(module)), torch.randn(2, 4)
    with view.trace(x):
        sin = view[0].source.sin.output
    assert torch.equal(sin, x.sin())
