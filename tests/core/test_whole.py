"""Reading and writing values, order, early stop, skipping."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nets import Net, loop, nothing_left
from torch import Tensor, nn

from nnatomy.errors import (
    CacheError,
    NoSuchModuleError,
    NotReachedError,
    OutOfOrderError,
    OutsideTraceError,
    UsageError,
)
from nnatomy.tracing import Traceable


@pytest.fixture
def module() -> Net:
    return Net()


@pytest.fixture
def net(module: Net) -> Iterator[Traceable]:
    with nothing_left(module):
        yield Traceable(module)


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_values_are_the_hooks_values(net: Traceable, module: Net) -> None:
    seen: dict[str, Any] = {}
    handles = [
        child.register_forward_hook(
            lambda _, args, kwargs, out, n=name: seen.update({n: (args, kwargs, out)}), with_kwargs=True
        )
        for name, child in module.named_modules()
        if "shared" not in name
    ]
    expected = module(X)
    for handle in handles:
        handle.remove()
    with net.trace(X) as tracer:
        for i in range(3):
            args, kwargs = net.blocks[i].inputs
            assert torch.equal(args[0], seen[f"blocks.{i}"][0][0])
            assert kwargs == {"scale": 0.5}
            assert torch.equal(net.blocks[i].input, args[0])
            assert torch.equal(net.blocks[i].act.output, seen[f"blocks.{i}.act"][2])
            assert torch.equal(net.blocks[i].output[0], seen[f"blocks.{i}"][2][0])
        result = tracer.result
    assert torch.equal(result, expected)
    assert tracer.result is result


def test_assignments_and_edits_in_place(net: Traceable, module: Net) -> None:
    with net.trace(X) as tracer:
        net.blocks[0].input = net.blocks[0].input * 2
        first = net.blocks[0].inner.input
        net.blocks[1].act.output = torch.zeros(2, 4)
        with torch.no_grad():
            net.blocks[2].act.output[:] = 1.0
        assert float(net.blocks[2].act.output.detach().sum()) == 8  # several reads, the current value
        net.head.inputs = ((torch.ones(2, 4),), {})
        result = tracer.result
    assert torch.equal(first, 2 * X)
    assert torch.equal(result, module.head(torch.ones(2, 4)))


def test_a_keyword_only_input(module: Net) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(input=x)

    net = Traceable(Keywords())
    with net.trace(x=X) as tracer:
        assert net.input is X
        assert net.child.input is X
        net.child.input = 0 * X
        assert torch.equal(tracer.result, net.module.child(0 * X))


def test_out_of_order_is_an_error_at_once_with_both_lines(net: Traceable) -> None:
    with net.trace(X):
        _ = net.blocks[1].act.output
        for late in (
            lambda: net.blocks[0].output,
            lambda: net.blocks[1].inner.output,
            lambda: net.blocks[1].act.input,
            lambda: net.blocks[1].input,
            lambda: net.input,
        ):
            with pytest.raises(OutOfOrderError) as error:
                late()
            here = __file__
            assert "already past it: it stands behind blocks.1.act.output, asked for at" in str(error.value)
            assert str(error.value).count(f"{here}:") == 3
        assert net.blocks[1].output is not None  # the container in flight
        assert net.blocks[2].inner.input is not None


def test_never_another_calls_value(net: Traceable, module: Net) -> None:
    shared: list[Tensor] = []
    handle = module.blocks[0].shared.register_forward_hook(lambda _, __, out: shared.append(out) and None)
    module(X)
    handle.remove()
    with net.trace(X):
        for k in (0, 1, 2):
            assert torch.equal(net.blocks[0].shared.calls[k].output, shared[k])
    with net.trace(X):
        _ = net.blocks[1].inner.output
        with pytest.raises(OutOfOrderError, match=r"blocks.2.shared.output was asked for"):
            _ = net.blocks[2].shared.output  # its first call is over; its second is not it
        assert torch.equal(net.blocks[2].shared.calls[1].output, shared[1])
    with net.trace(X), pytest.raises(NotReachedError, match=r"shared.output \(call 3\).*not that often"):
        _ = net.blocks[0].shared.calls[3].output
    with pytest.raises(IndexError, match="calls count from the first, 0"):
        _ = net.blocks[0].shared.calls[-1]


class Elsewhere(nn.Module):
    """Calls a module within another; if told to, once before from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Hardtanh(-100, 100), nn.ReLU())
        self.last = nn.Identity()

    def forward(self, v: Tensor, early: bool = False) -> Tensor:
        return self.last(self.outer(self.outer[1](v) * 10 if early else v))


def test_a_module_called_otherwise_than_in_the_passes_before() -> None:
    view = Traceable(Elsewhere())
    one = torch.ones(1)
    for _ in range(3):
        with view.trace(one) as tracer:
            assert view.outer[1].output == 1
            tracer.result
    with view.trace(one, early=True):
        assert view.outer[1].output == 1
        assert view.outer[1].calls[1].output == 10
    with view.trace(one, early=True):
        assert view.outer.input == 10
        with pytest.raises(OutOfOrderError, match=r"outer\.1\.output was asked for"):
            view.outer[1].output
        assert view.outer[1].calls[1].output == 10
    with view.trace(one):
        assert view.outer[1].output == 1


def test_early_stop(net: Traceable, module: Net) -> None:
    called: list[int] = []
    handles = [b.register_forward_pre_hook(lambda *_, i=i: called.append(i)) for i, b in enumerate(module.blocks)]
    with net.trace(X) as tracer:
        _ = net.blocks[1].inner.output
    assert called == [0, 1]
    with pytest.raises(NotReachedError, match="stopped when the block ended.*early_stop=False"):
        _ = tracer.result
    with net.trace(X):
        pass
    assert called == [0, 1]
    with net.trace(X, early_stop=False) as tracer:
        _ = net.blocks[0].output
    assert called == [0, 1, 0, 1, 2]
    assert tracer.result.shape == (2, 2)
    with net.trace(X) as tracer:
        _ = net.blocks[0].output
        tracer.stop()
        with pytest.raises(OutOfOrderError, match="after the forward pass had been stopped"):
            _ = net.blocks[1].output
        with pytest.raises(NotReachedError, match="stopped"):
            _ = tracer.result
    assert called == [0, 1, 0, 1, 2, 0]
    for handle in handles:
        handle.remove()


def test_skip(net: Traceable, module: Net) -> None:
    called: list[int] = []
    handle = module.blocks[1].inner.register_forward_pre_hook(lambda *_: called.append(1))
    with net.trace(X) as tracer:
        first = net.blocks[0].output[0]
        net.blocks[1].skip((net.blocks[1].input * 3, 0.5))
        assert torch.equal(net.blocks[1].output[0], first * 3)
        after = net.blocks[2].input
        result = tracer.result
    assert torch.equal(after, first * 3)
    assert result.shape == (2, 2)
    assert not called
    handle.remove()
    with net.trace(X), pytest.raises(NotReachedError):
        net.blocks[1].skip((X, 0.5))
        _ = net.blocks[1].inner.output


def test_nested_traces(net: Traceable, module: Net) -> None:
    with net.trace(X) as outer:
        one = net.blocks[0].output[0]
        with net.trace(2 * X) as inner:
            other = net.blocks[0].output[0]
            net.head.input = other
            inner_result = inner.result
        net.head.input = one
        outer_result = outer.result
    assert torch.equal(inner_result, module.head(module.blocks[0](2 * X, scale=0.5)[0]))
    assert torch.equal(outer_result, module.head(module.blocks[0](X, scale=0.5)[0]))


def test_the_module_itself_can_be_called_in_the_block(net: Traceable, module: Net) -> None:
    with net.trace(X) as tracer:
        hidden = net.blocks[0].output[0]
        direct = net.head(hidden)
        whole = net(X)
        assert torch.equal(tracer.result, whole)
    assert torch.equal(direct, module.head(hidden))


def test_misuse(net: Traceable) -> None:
    with pytest.raises(OutsideTraceError, match="head: values exist only while the model runs"):
        _ = net.head.output
    with pytest.raises(NoSuchModuleError, match=r"the model \(Net\) has no submodule 'block'.*Did you mean 'blocks'"):
        _ = net.block
    with pytest.raises(NoSuchModuleError, match=r"head \(Linear\) has no submodule 'weight'.*use `.module.weight`"):
        _ = net.head.weight
    with pytest.raises(IndexError, match=r"blocks has 3 children, so no \[3\]"):
        _ = net.blocks[3]
    with pytest.raises(AttributeError):
        net.head.ouput = 3
    trace = net.trace(X)
    with pytest.raises(UsageError, match="has not been entered"):
        _ = trace.iter
    with trace:
        pass
    with pytest.raises(UsageError, match="used already"), trace:
        pass
    assert [view.path for view in net.blocks[1:]] == ["blocks.1", "blocks.2"]
    assert net["blocks.1.inner"].module is net.blocks[1].inner.module
    assert len(net.blocks) == len(list(net.blocks)) == 3
    assert "inner" in dir(net.blocks[0])


def test_children_with_the_names_of_attributes() -> None:
    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.output(x)

    net = Traceable(Bert())
    with net.trace(X):
        child = net["output"].output
        assert torch.equal(net.output, 2 * child)


def test_a_compiled_module_says_so(net: Traceable, module: Net) -> None:
    module.head._compiled_call_impl = module.head._call_impl
    try:
        with net.trace(X) as tracer:
            _ = net.blocks[0].output
            with pytest.raises(NotReachedError, match="it is compiled"):
                _ = net.head.output
            assert torch.equal(tracer.result, module(X))
    finally:
        del module.head._compiled_call_impl


def test_steps_of_a_generation(net: Traceable, module: Net) -> None:
    expected = [module.blocks[0](X + step, scale=0.5)[0] for step in range(4)]

    def trace() -> Any:
        return net.trace_call(loop, module, X, 4)

    for which, steps in ((slice(None), [0, 1, 2, 3]), (slice(1, 3), [1, 2]), (2, [2]), ([0, 3], [0, 3])):
        got = []
        with trace() as tracer:
            for step in tracer.iter[which]:
                got.append((step, net.blocks[0].output[0]))
            after = tracer.result  # what follows the loop runs
        assert [step for step, _ in got] == steps
        assert all(torch.equal(value, expected[step]) for step, value in got)
        assert len(after) == 4
    with trace() as tracer:
        assert torch.equal(net.blocks[0].output[0], expected[0])  # without iter, step 0
        for _ in tracer.iter[2:]:
            net.head.input = torch.ones(2, 4)
        result = tracer.result
        with pytest.raises(OutOfOrderError, match="this question means step 0"):
            _ = net.head.output
    plain = loop(module, X, 4)
    assert all(torch.equal(result[i], plain[i]) for i in (0, 1))
    assert all(torch.equal(result[i], module.head(torch.ones(2, 4))) for i in (2, 3))


def test_loops_that_end_otherwise(net: Traceable, module: Net) -> None:
    with net.trace_call(loop, module, X, 4) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                break
        for step in tracer.iter[2:]:
            if step == 2:
                continue
            value = net.blocks[0].input
    assert torch.equal(value, X + 3)
    with net.trace_call(loop, module, X, 2) as tracer:
        with pytest.warns(UserWarning, match=r"iter\[5:\]: step 5 did not come.* after 2 steps \(0 to 1\)") as warned:
            assert list(tracer.iter[5:]) == []
        assert warned[0].filename == __file__
        assert len(tracer.result) == 2
    with net.trace_call(loop, module, X, 3) as tracer:
        for _ in tracer.iter[1]:
            with pytest.raises(NotReachedError, match=r"unused.output of step 1 was asked for .* but step 1 ended"):
                _ = net.unused.output
        assert len(tracer.result) == 3
    for bad in (slice(-1, None), slice(None, -1), [3, 1], [-1]):
        with net.trace(X) as tracer, pytest.raises(UsageError, match="steps"):
            list(tracer.iter[bad])


def test_caches(net: Traceable, module: Net) -> None:
    with net.trace(X) as tracer:
        cache = tracer.cache()
    assert set(cache) == {n for n, _ in module.named_modules() if not n.startswith("unused") and n != "blocks"} - {
        "blocks.1.shared",
        "blocks.2.shared",
    }
    with net.trace(X):
        inner = net.blocks[1].inner.output
    assert torch.equal(cache["blocks.1.inner"].output, inner)
    assert torch.equal(cache[net.blocks[1].inner][0].output, inner)
    assert len(cache["blocks.0.shared"]) == 3
    with pytest.raises(CacheError, match=r"was called 3 times: say which with cache\['blocks.0.shared'\]\[k\].output"):
        _ = cache["blocks.0.shared"].output
    with pytest.raises(CacheError, match="'unused' was not called while the cache was open"):
        _ = cache["unused"]
    with pytest.raises(CacheError, match="'nope' is not in the cache. It holds: blocks.0"):
        _ = cache["nope"]
    with net.trace_call(loop, module, X, 3) as tracer:
        cache = tracer.cache([net.blocks[2], "head", module.blocks[0]], dtype=torch.float64, include_inputs=True)
    assert [entry.step for entry in cache["head"]] == [0, 1, 2]
    assert cache["head"][1].output.dtype == torch.float64
    assert torch.equal(cache["blocks.0"][2].inputs[0][0], (X + 2).double())
    assert cache["blocks.2"][0].inputs[1] == {"scale": 0.5}
    with pytest.raises(NoSuchModuleError, match="Tanh is not a submodule of Net"), net.trace(X) as tracer:
        tracer.cache([nn.Tanh()])


def test_a_cache_sees_edits_and_refuses_what_was_changed_later() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    net = Traceable(module)
    with torch.no_grad(), net.trace(X) as tracer:
        cache = tracer.cache()
        copies = tracer.cache(clone=True)
        net[0].output = torch.full((2, 4), -1.0)
    assert float(copies["0"].output.sum()) == -8
    with pytest.raises(CacheError, match=r"'0' was changed in place.*clone=True"):
        _ = cache["0"]


def test_scan_computes_nothing_and_leaves_the_model() -> None:
    for device in ("cpu", "meta"):
        module = Net().to(device)
        before = [(p.data_ptr(), type(p)) for p in module.parameters()]
        net = Traceable(module)
        with net.scan(X) as tracer:
            assert net.blocks[1].output[0].shape == (2, 4)
            assert type(net.head.input).__name__ == "FakeTensor"
            net.head.input = net.head.input[:1]
            assert tracer.result.shape == (1, 2)
        assert [(p.data_ptr(), type(p)) for p in module.parameters()] == before
    with pytest.raises(RuntimeError, match="reduction dim"), net.scan(X[:, :3]) as tracer:
        _ = tracer.result


def test_nothing_of_torchs_or_pythons_is_given_a_method(net: Traceable) -> None:
    before = {kind: {*dir(kind)} for kind in (object, torch.Tensor, torch.nn.Module)}
    with net.trace(X):
        value = net.head.output
        assert not hasattr(value, "save")
        assert {kind: {*dir(kind)} for kind in before} == before
    assert {kind: {*dir(kind)} for kind in before} == before


def test_a_shallow_copy_computes_with_its_own_parameters(net: Traceable, module: Net) -> None:
    with nothing_left(module):
        with net.trace(torch.ones(1, 4)):
            hidden = net.blocks[0].inner.output
            mine = copy.copy(module.head)
            mine._parameters = {name: torch.nn.Parameter(torch.zeros_like(p)) for name, p in mine.named_parameters()}
            assert not mine(hidden).any()
        assert not mine(hidden).any()
        assert "_call_impl" not in mine.__dict__


def test_parts_that_are_compiled_in_a_trace() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), backend="eager")
    linear = nn.Linear(2, 2)
    function = torch.compile(lambda x: linear(x) + 1, backend="eager", fullgraph=True)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.compiled, self.linear = nn.Linear(2, 2), compiled, linear

        def forward(self, x: Tensor) -> Tensor:
            return function(self.compiled(self.first(x)))

    root = Root().requires_grad_(False)
    view = Traceable(root)
    with nothing_left(root):
        for x in torch.randn(3, 1, 2):
            with view.trace(x) as tracer:
                first = view.first.output
                result = tracer.result
            assert torch.equal(first, root.first(x))
            assert torch.allclose(result, root(x))


def test_after_the_end_of_a_plain_pass_the_error_names_the_line_that_ran_it_there(net: Traceable) -> None:
    with net.trace(X) as tracer:
        with pytest.raises(NotReachedError):
            _ = net.blocks[0].shared.calls[5].output
        with pytest.raises(OutOfOrderError, match=r"stands behind blocks.0.shared.output \(call 5\), asked for at"):
            _ = net.blocks[0].output
    with net.trace(X) as tracer:
        _ = tracer.result
        with pytest.raises(OutOfOrderError) as error:
            _ = net.output
    assert "the model.output was asked for" in str(error.value)
    assert "it stands behind its end, asked for at" in str(error.value)
    assert "tracer.iter" not in str(error.value)
