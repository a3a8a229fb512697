"""Random programs of reads, edits and skips on random module trees, against plain hooks.

A program is a list of questions for each step of a generation. `Traced` asks them in a trace;
`Hooked` answers the same ones from PyTorch's own hooks and patched forwards, and knows from the calls
it has seen which of them are too late and which never come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import no_leaks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnatomy.core import Traceable
from nnatomy.errors import NotReachedError, OutOfOrderError

LEAVES = ("linear", "tanh", "double")
CONTAINERS = ("chain", "residual", "tuple", "dict", "keyword", "twice", "quiet")


def tensor_in(value: Any) -> Tensor:
    """The one tensor in what a node returns or is given."""
    if isinstance(value, dict):
        value = next(iter(value.values()))
    return value if isinstance(value, Tensor) else tensor_in(value[0])


class Node(nn.Module):
    """A module of a random tree. `ran` notes that its forward has begun."""

    def __init__(self, name: str, form: str, children: list[Node], ran: list[str]) -> None:
        super().__init__()
        self.name, self.form, self.ran = name, form, ran
        for i, child in enumerate(children):
            self.add_module(f"c{i}", child)
        if form == "linear":
            torch.manual_seed(len(name))
            self.weight = nn.Parameter(torch.randn(3, 3))

    def wrap(self, x: Tensor) -> Any:
        return {"tuple": (x, 7), "dict": {"hidden": (x, None), "other": 1}}.get(self.form, x)

    def forward(self, x: Any) -> Any:
        self.ran.append(self.name)
        x = start = tensor_in(x)
        if self.form == "linear":
            return x @ self.weight
        if self.form == "tanh":
            return x.tanh()
        if self.form == "double":
            return 2 * x
        for _ in range(2 if self.form == "twice" else 1):
            for child in self.children():
                x = tensor_in(child(x=x) if self.form == "keyword" else child(x))
        if self.form == "residual":
            x = start + x
        return self.wrap(x)


class Ask(NamedTuple):
    """One question: `what` to do at a point of a module's `call`."""

    what: str
    path: str
    call: int

    @property
    def kind(self) -> str:
        return "output" if self.what.endswith("output") else "input"


WHATS = ("read input", "read output", "replace input", "replace inputs", "replace output")
WHATS += ("change input", "change output", "skip")


class Point(NamedTuple):
    path: str
    kind: str
    call: int
    step: int


def with_tensor(value: Any, new: Tensor) -> Any:
    """`value` with `new` in the place of its one tensor."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: with_tensor(value[first], new)}
    return (with_tensor(value[0], new), *value[1:])


def replacement(old: Tensor) -> Tensor:
    return old * 0.5 + 1


Program = dict[int, list[Ask]]


class Traced:
    """Asks the questions in a trace."""

    def __init__(self, root: Node, program: Program, *, want_result: bool, early_stop: bool) -> None:
        self.log: list[Any] = []
        self.result: Any = None
        view = Traceable(root)
        with view.trace_call(generate, root, early_stop=early_stop) as tracer:
            for step in tracer.iter[sorted(program)]:
                self.log.append(step)
                for ask in program[step]:
                    try:
                        self.answer(view[ask.path] if ask.path else view, ask, root)
                    except (OutOfOrderError, NotReachedError) as error:
                        self.log.append(type(error).__name__)
            if want_result:
                self.result = tracer.result
        if not early_stop:
            self.result = tracer.result

    def answer(self, view: Any, ask: Ask, root: Node) -> None:
        at = view.calls[ask.call]
        match ask.what:
            case "read input":
                self.log.append(at.input.clone())
            case "read output":
                self.log.append(tensor_in(at.output).clone())
            case "replace input":
                at.input = replacement(at.input)
            case "replace inputs":
                args, kwargs = at.inputs
                at.inputs = (
                    with_tensor((args, kwargs), replacement(tensor_in((*args, kwargs))))
                    if args
                    else (
                        (),
                        with_tensor(kwargs, replacement(tensor_in(kwargs))),
                    )
                )
            case "replace output":
                at.output = with_tensor(at.output, replacement(tensor_in(at.output)))
            case "change input":
                at.input.mul_(-0.5)
            case "change output":
                tensor_in(at.output).mul_(-0.5)
            case "skip":
                at.skip(root.get_submodule(ask.path).wrap(3 * at.input))


class Enough(Exception):
    """Nothing more is asked for."""


class Hooked:
    """Answers the same questions from plain hooks."""

    def __init__(self, root: Node, program: Program, *, want_result: bool, early_stop: bool) -> None:
        self.log: list[Any] = []
        self.result: Any = None
        #: A step that begins, or a question in it.
        self.pending: list[tuple[int, Ask | None]] = [
            (step, ask) for step in sorted(program) for ask in (None, *program[step])
        ]
        self.step = 0
        self.past: set[Point] = set()
        self.counts: dict[Node, int] = {}
        self.skipped: dict[tuple[Node, int], Any] = {}
        self.to_end = want_result or not early_stop
        paths: dict[Node, str] = {module: path for path, module in root.named_modules()}  # type: ignore[misc]
        handles: list[Any] = []
        in_flight: dict[Node, list[int]] = {module: [] for module in paths}
        for module, path in paths.items():
            patch_forward(module, lambda m: self.skipped.pop((m, in_flight[m][-1]), None))

            def pre(m: Node, args: Any, kwargs: Any, path: str = path) -> Any:
                call = self.counts.get(m, 0)
                self.counts[m] = call + 1
                in_flight[m].append(call)
                return self.at(m, Point(path, "input", call, self.step), (args, kwargs))

            def post(m: Node, _: Any, output: Any, path: str = path) -> Any:
                output = self.at(m, Point(path, "output", in_flight[m].pop(), self.step), output)
                if m is root:
                    self.end_step()
                return output

            handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
            handles.append(module.register_forward_hook(post))
        try:
            self.enough()
            result = generate(root)
            self.ended()
            if self.to_end:
                self.result = result
        except Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module in paths:
                del module.forward

    def enough(self) -> None:
        if not self.pending and not self.to_end:
            raise Enough

    def at(self, module: Node, here: Point, value: Any) -> Any:
        """The forward pass is at a point: answer what is asked for here, refuse what is past."""
        while self.pending:
            step, ask = self.pending[0]
            asked = Point("", "input", 0, step) if ask is None else Point(ask.path, ask.kind, ask.call, step)
            if asked == here or (ask is None and step == self.step and self.counts):
                self.log_or_do(ask, step, module, here, value)
                if ask is not None and ask.what.startswith("replace"):
                    value = self.replaced(ask, value)
            elif asked in self.past:
                self.log.append("OutOfOrderError")
            else:
                break
            del self.pending[0]
        self.enough()
        self.past.add(here)
        return value

    def log_or_do(self, ask: Ask | None, step: int, module: Node, here: Point, value: Any) -> None:
        if ask is None:
            self.log.append(step)
            return
        tensor = tensor_in(value if here.kind == "output" else (value[0] or value[1]))
        if ask.what.startswith("read"):
            self.log.append(tensor.clone())
        elif ask.what.startswith("change"):
            tensor.mul_(-0.5)
        elif ask.what == "skip":
            self.skipped[module, here.call] = module.wrap(3 * tensor)

    def replaced(self, ask: Ask, value: Any) -> Any:
        if ask.kind == "output":
            return with_tensor(value, replacement(tensor_in(value)))
        args, kwargs = value
        if args:
            return (replacement(args[0]), *args[1:]), kwargs
        return args, with_tensor(kwargs, replacement(tensor_in(kwargs)))

    def end_step(self) -> None:
        """What was asked for in this step and has not come will not come."""
        while self.pending:
            step, ask = self.pending[0]
            if step != self.step or ask is None:
                break
            past = Point(ask.path, ask.kind, ask.call, step) in self.past
            self.log.append("OutOfOrderError" if past else "NotReachedError")
            del self.pending[0]
        self.enough()
        self.step += 1
        self.past.clear()
        self.counts.clear()

    def ended(self) -> None:
        """The loop over steps ends with the model."""
        assert all(step >= self.step for step, _ in self.pending)


def patch_forward(module: Node, instead_of: Callable[[Node], Any]) -> None:
    forward = module.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        instead = instead_of(module)
        return forward(*args, **kwargs) if instead is None else instead

    module.forward = patched


STEPS = 3


def generate(root: Node) -> list[Any]:
    return [root(torch.tensor([[0.3, -0.7, 1.0], [0.1, 0.2, -0.4]]) * (step + 1)) for step in range(STEPS)]


@st.composite
def trees(draw: st.DrawFn) -> tuple[Node, list[str]]:
    """A root, and the list that notes what has run. A node may be the child of several."""
    ran: list[str] = []
    nodes = [Node(f"leaf{i}", draw(st.sampled_from(LEAVES)), [], ran) for i in range(draw(st.integers(1, 3)))]
    for i in range(draw(st.integers(1, 4))):
        children = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
        nodes.append(Node(f"node{i}", draw(st.sampled_from(CONTAINERS)), children, ran))
    return nodes[-1], ran


def calls_of(root: Node) -> list[tuple[str, str, int]]:
    """The points of one forward pass in their order, as plain hooks see them."""
    points: list[tuple[str, str, int]] = []
    counts: dict[str, int] = {}
    stack: list[int] = []
    handles = []
    for path, module in root.named_modules():

        def pre(_m: Any, _a: Any, path: str = path) -> None:
            stack.append(counts.get(path, 0))
            counts[path] = stack[-1] + 1
            points.append((path, "input", stack[-1]))

        def post(_m: Any, _a: Any, _o: Any, path: str = path) -> None:
            points.append((path, "output", stack.pop()))

        handles += [module.register_forward_pre_hook(pre), module.register_forward_hook(post)]
    root(torch.ones(2, 3))
    for handle in handles:
        handle.remove()
    return points


@st.composite
def programs(draw: st.DrawFn, root: Node) -> Program:
    """Questions of some steps, in the model's order but for some that are not, or that never come."""
    order = {point: i for i, point in enumerate(calls_of(root))}
    paths = [path for path, _ in root.named_modules()]
    asks = st.builds(Ask, st.sampled_from(WHATS), st.sampled_from(paths), st.integers(0, 2))
    program = {}
    for step in draw(st.lists(st.integers(0, STEPS), unique=True, min_size=1)):
        asked = draw(st.lists(asks, max_size=8))
        if draw(st.booleans()):
            asked.sort(key=lambda ask: order.get((ask.path, ask.kind, ask.call), len(order)))
            if draw(st.booleans()):
                asked = [ask for ask in asked if (ask.path, ask.kind, ask.call) in order]
        program[step] = asked
    return program


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), want_result=st.booleans(), early_stop=st.booleans())
def test_a_trace_answers_as_hooks_do(data: st.DataObject, want_result: bool, early_stop: bool) -> None:
    with torch.no_grad():
        root, ran = data.draw(trees())
        program = data.draw(programs(root))
        ran.clear()
        expected = Hooked(root, program, want_result=want_result, early_stop=early_stop)
        ran_with_hooks = list(ran)
        ran.clear()
        with no_leaks(root):
            got = Traced(root, program, want_result=want_result, early_stop=early_stop)
    assert same(got.log, expected.log), (got.log, expected.log)
    assert same(got.result, expected.result)
    assert ran == ran_with_hooks  # no forward more, no forward less


def test_the_comparison_can_fail() -> None:
    ran: list[str] = []
    root = Node("root", "chain", [Node("leaf", "double", [], ran)], ran)
    ask = Ask("read output", "c0", 0)
    with torch.no_grad():
        got = Traced(root, {0: [ask]}, want_result=True, early_stop=True)
        other = Hooked(root, {0: [Ask("change input", "c0", 0), ask]}, want_result=True, early_stop=True)
    assert not same(got.log, other.log)
    assert not same(got.result, other.result)
    with pytest.raises(AssertionError), no_leaks(root):
        root.forgotten = 1
