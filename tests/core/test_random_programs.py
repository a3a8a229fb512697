"""Random programs of reads, edits and skips on random module trees, against plain PyTorch hooks.

A play is what a researcher may write: lasting edits, blocks of `invoke` with rows of their own, the caller's block, each
a program of questions for some steps. `Traced` plays it in a trace. `Hooked` answers the same questions from PyTorch's own
hooks and patched forwards, and knows from the calls it has seen which are too late and which never come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from helpers import no_leaks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnatomy.blocks.joining import Joining
from nnatomy.errors import NotReachedError, OutOfOrderError, RowsError
from nnatomy.tracing import Trace, Traceable

#: A program may name steps that do not come.
pytestmark = pytest.mark.filterwarnings(r"ignore:tracer\.iter\[.*did not come:UserWarning")

LEAVES = ("linear", "tanh", "double", "affine")
CONTAINERS = ("chain", "tuple", "dict", "keyword", "residual")


def tensor_in(value: Any) -> Tensor:
    """The one tensor in what a node returns or is given."""
    if isinstance(value, dict):
        value = next(iter(value.values()))
    return value if isinstance(value, Tensor) else tensor_in(value[0])


def with_tensor(value: Any, new: Tensor) -> Any:
    """`value` with `new` in the place of its one tensor."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, dict):
        first = next(iter(value))
        return {**value, first: with_tensor(value[first], new)}
    return (with_tensor(value[0], new), *value[1:])


class Node(nn.Module):
    """A module of a random tree, which calls its children in some order. `ran` notes that its forward has begun.

    Each row's result is the same, bit for bit, whatever other rows there are.
    """

    def __init__(
        self,
        name: str,
        form: str,
        ran: list[str],
        children: tuple[Node, ...] = (),
        order: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.name, self.form, self.ran, self.order = name, form, ran, order
        for i, child in enumerate(children):
            self.add_module(f"c{i}", child)
        if form == "linear":
            torch.manual_seed(len(name))
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def wrap(self, x: Tensor) -> Any:
        return {"tuple": (x, 7), "dict": {"hidden": (x, None), "other": 1}}.get(self.form, x)

    def forward(self, x: Any) -> Any:
        self.ran.append(self.name)
        x = start = tensor_in(x)
        match self.form:
            case "linear":
                return x[:, :1] * self.weight[0] + x[:, 1:2] * self.weight[1] + x[:, 2:] * self.weight[2]
            case "tanh":
                return x.tanh()
            case "double":
                return 2 * x
            case "affine":
                return 1 - 0.5 * x
        children = list(self.children())
        for i in self.order:
            child = children[i % len(children)]
            x = tensor_in(child(x=x) if self.form == "keyword" else child(x))
        if self.form == "residual":  # an edit of `start` in place shows here
            x = start + x
        return self.wrap(x)


class Ask(NamedTuple):
    """One question: `what` to do at a point of a module's `call`."""

    what: str
    path: str
    call: int = 0

    @property
    def kind(self) -> str:
        return "input" if self.what.endswith(("input", "inputs")) or self.what == "skip" else "output"


WHATS = ("read input", "read output", "replace input", "replace inputs", "replace output")
WHATS += ("change input", "change output", "skip")

#: A value that passes from the block that gives it to those that take it; functions meet at a barrier for it.
GIVE, TAKE, MEET = "give output", "take output", "meet"

Program = dict[int, list[Ask]]


class Part(NamedTuple):
    """One block.

    Attributes:
        program: what it asks, by step.
        rows: its rows of the batch; None for all.
        iterates: whether it asks inside `for step in tracer.iter[...]`; else it means the first step.
        result: whether it asks for the result at its end.
    """

    program: Program
    rows: slice | None = None
    iterates: bool = True
    result: bool = False

    def has(self, what: str) -> bool:
        return any(ask.what == what for asked in self.program.values() for ask in asked)


class Play(NamedTuple):
    """Lasting edits, blocks of `invoke`, and the caller's block, on so many steps.

    Attributes:
        steps: how often the root is called by the traced function; None: the root's own call is traced.
        functions: whether the blocks are given as functions, not as bodies of `with`.
    """

    caller: Part = Part({})
    blocks: tuple[Part, ...] = ()
    edits: tuple[tuple[Ask, ...], ...] = ()
    steps: int | None = None
    functions: bool = False
    early_stop: bool = True

    def inputs(self) -> Tensor:
        count = max([part.rows.stop for part in self.blocks if part.rows is not None], default=2)
        return torch.linspace(-1, 1.2, 3 * count, dtype=torch.float64).view(count, 3)

    def call(self, root: Any) -> Callable[[Tensor], Any]:
        if self.steps is None:
            return root
        return lambda x: [root(x * (step + 1)) for step in range(self.steps or 0)]


def replacement(old: Tensor) -> Tensor:
    return old * 0.5 + 1


def taking(old: Tensor, passed: Tensor) -> Tensor:
    return old * 0.5 + passed.mean(0, keepdim=True)


class Traced:
    """Plays it in a trace.

    Attributes:
        logs: what each edit, each block and the caller's block has seen.
        result: the traced call's result, where it is to be had.
    """

    def __init__(self, root: Node, play: Play) -> None:
        self.root, self.play = root, play
        self.view = view = Traceable(root)
        self.logs: list[list[Any]] = [[] for _ in range(len(play.edits) + len(play.blocks) + 1)]
        for log, asks in zip(self.logs, play.edits, strict=False):
            view = view.edit(partial(self.edit, asks, log))
        logs = self.logs[len(play.edits) :]
        self.edited = view
        self.result: Any = None
        with self.trace(view) as tracer:
            passed = "stale"  # as in a notebook's second run
            self.passed: Any = None
            if meeting := sum(part.has(MEET) for part in play.blocks):
                self.barrier = tracer.barrier(meeting)
            for log, part in zip(logs, play.blocks, strict=False):
                inputs = () if part.rows is None else (play.inputs()[part.rows],)
                if play.functions:
                    tracer.invoke(*inputs, partial(self.function, tracer, part, log))
                elif part.has(GIVE):
                    with tracer.invoke(*inputs):
                        for ask in self.asks(tracer, part, log):
                            if ask.what == GIVE:
                                passed = self.answer(ask, log)
                            else:
                                self.answer(ask, log)
                else:
                    with tracer.invoke(*inputs):
                        for ask in self.asks(tracer, part, log):
                            self.answer(ask, log, passed if ask.what == TAKE else None)
            for ask in self.asks(tracer, play.caller, logs[-1]):
                self.answer(ask, logs[-1])
        if not play.early_stop:
            self.result = tracer.result

    def trace(self, view: Traceable) -> Trace:
        play = self.play
        if play.blocks and play.steps is not None:
            joining = Joining(play.call(self.root))
            return Trace(view, joining, early_stop=play.early_stop)
        if play.blocks:
            return view.trace(early_stop=play.early_stop)
        if play.steps is None:
            return view.trace(play.inputs(), early_stop=play.early_stop)
        return view.trace_call(play.call(self.root), play.inputs(), early_stop=play.early_stop)

    def asks(self, tracer: Trace, part: Part, log: list[Any]) -> Iterator[Ask]:
        """The questions of a block, each in its step."""
        if part.iterates:
            for step in tracer.iter[sorted(part.program)]:
                log.append(step)
                yield from part.program[step]
        else:
            yield from part.program[0]
        if part.result:
            log.append(tracer.result)

    def edit(self, asks: tuple[Ask, ...], log: list[Any]) -> None:
        for ask in asks:
            self.answer(ask, log)

    def function(self, tracer: Trace, part: Part, log: list[Any]) -> None:
        for ask in self.asks(tracer, part, log):
            if ask.what == MEET:
                self.barrier()
            elif ask.what == GIVE:
                self.passed = self.answer(ask, log)
            else:
                self.answer(ask, log, self.passed)

    def answer(self, ask: Ask, log: list[Any], passed: Any = None) -> Any:
        try:
            return self.do(ask, log, passed)
        except (OutOfOrderError, NotReachedError) as error:
            log.append(type(error).__name__)

    def do(self, ask: Ask, log: list[Any], passed: Any) -> Any:
        at = (self.view[ask.path] if ask.path else self.view).calls[ask.call]
        match ask.what:
            case "read input":
                log.append(at.input.clone())
            case "read output" | "give output":
                value = tensor_in(at.output).clone()
                log.append(value)
                return value
            case "replace input":
                at.input = replacement(at.input)
            case "replace inputs":
                args, kwargs = at.inputs
                if args:
                    at.inputs = (with_tensor(args, replacement(args[0])), kwargs)
                else:
                    at.inputs = (), with_tensor(kwargs, replacement(tensor_in(kwargs)))
            case "replace output":
                at.output = with_tensor(at.output, replacement(tensor_in(at.output)))
            case "take output":
                if passed is None:
                    log.append("nothing to take")
                else:
                    at.output = with_tensor(at.output, taking(tensor_in(at.output), passed))
                    log.append("taken")
            case "change input":
                at.input.mul_(-0.5)
            case "change output":
                tensor_in(at.output).mul_(-0.5)
            case "skip":
                at.skip(self.root.get_submodule(ask.path).wrap(3 * at.input))
                log.append("skipped")
        return None


class Point(NamedTuple):
    path: str
    kind: str
    call: int
    step: int


class Enough(Exception):
    """Nothing more is asked for."""


class Player:
    """One block, as hooks know it: what it has yet to ask, and what it has seen."""

    def __init__(self, part: Part, lasting: bool = False) -> None:
        self.log: list[Any] = []
        self.rows = part.rows
        self.lasting = lasting
        self.result = part.result
        self.met = False
        #: A step that begins (and is told), or a question in it.
        self.pending: list[tuple[int, Ask | None]] = [
            (step, ask)
            for step in sorted(part.program)
            for ask in (*([None] if part.iterates and not lasting else []), *part.program[step])
        ]

    def mine(self, whole: Tensor) -> Tensor:
        return whole if self.rows is None else whole[self.rows]

    def put(self, whole: Tensor, mine: Tensor) -> Tensor:
        """A new tensor with other rows of this block."""
        if self.rows is None:
            return mine
        new = whole.clone()
        new[self.rows] = mine
        return new


class Hooked:
    """Answers the same questions from plain hooks."""

    def __init__(self, root: Node, play: Play, x: Tensor | None = None) -> None:
        self.root = root
        edits = [
            Player(Part({step: list(asks) for step in range(play.steps or 1)}), lasting=True) for asks in play.edits
        ]
        # In the order in which they come to one point.
        self.players = [*edits, *map(Player, play.blocks), Player(play.caller)]
        self.meeting = sum(ask.what == MEET for player in self.players for _, ask in player.pending if ask)
        self.given, self.passed = False, None
        self.step = 0
        self.value: Any = None
        self.past: set[Point] = set()
        self.counts: dict[Node, int] = {}
        self.skipped: dict[tuple[Node, int], Any] = {}
        self.skipped_rows: dict[tuple[Node, int], list[tuple[Player, Any]]] = {}
        #: Inputs that a block with rows has read with gradients, and what tells that they are changed in place.
        self.read: dict[tuple[Node, int], tuple[Tensor, int]] = {}
        self.replaced: set[tuple[Node, int]] = set()
        self.is_refused = False
        self.to_end = not play.early_stop or any(player.result for player in self.players)
        result = self.run(play.call(root), play.inputs() if x is None else x)
        self.result = None if play.early_stop else result
        for player in self.players:
            if player.result:
                player.log.append(self.rows_of(result, player))
        self.logs = [player.log for player in self.players]

    def rows_of(self, result: Any, player: Player) -> Any:
        if isinstance(result, list):
            return [self.rows_of(entry, player) for entry in result]
        return with_tensor(result, player.mine(tensor_in(result)))

    def run(self, call: Callable[[Tensor], Any], x: Tensor) -> Any:
        paths: dict[Node, str] = {module: path for path, module in self.root.named_modules()}  # type: ignore[misc]
        in_flight: dict[Node, list[int]] = {module: [] for module in paths}
        handles: list[Any] = []
        for module, path in paths.items():
            patch_forward(module, lambda m: self.skipped.pop((m, in_flight[m][-1]), None))

            def pre(m: Node, args: Any, kwargs: Any, path: str = path) -> Any:
                call = self.counts.get(m, 0)
                self.counts[m] = call + 1
                in_flight[m].append(call)
                return self.at(m, Point(path, "input", call, self.step), (args, kwargs))

            def post(m: Node, _: Any, output: Any, path: str = path) -> Any:
                call = in_flight[m].pop()
                tensor, version = self.read.pop((m, call), (output, None))
                self.is_refused |= version is not None and tensor._version != version
                for player, instead in self.skipped_rows.pop((m, call), []):
                    output = with_tensor(output, player.put(tensor_in(output), tensor_in(instead)))
                output = self.at(m, Point(path, "output", call, self.step), output)
                if m is self.root:
                    self.end_step()
                return output

            handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
            handles.append(module.register_forward_hook(post))
        try:
            self.enough()
            result = call(x)
            assert all(step >= self.step for player in self.players for step, _ in player.pending)
            return result
        except Enough:
            return None
        finally:
            for handle in handles:
                handle.remove()
            for module in paths:
                del module.forward

    def enough(self) -> None:
        if not self.to_end and not any(player.pending for player in self.players if not player.lasting):
            raise Enough

    def at(self, module: Node, here: Point, value: Any) -> Any:
        """The forward pass is at a point: answer what is asked for here, refuse what is past."""
        self.value = value
        while any(self.advance(player, module, here) for player in self.players):
            pass  # one block may have waited for another
        self.enough()
        self.past.add(here)
        return self.value

    def advance(self, player: Player, module: Node | None, here: Point | None) -> bool:
        """Answer as much as can be, in this order. Returns whether anything was."""
        before = len(player.pending)
        while player.pending:
            step, ask = player.pending[0]
            if ask is None:
                if step != self.step or not self.counts or here is None:
                    break
                player.log.append(step)
            elif step > self.step:
                break
            elif ask.what == MEET:
                self.meeting -= not player.met
                player.met = True
                if self.meeting:
                    break
            elif ask.what == TAKE and not self.given:
                break
            elif ask.what == TAKE and self.passed is None:
                player.log.append("nothing to take")
            else:
                point = Point(ask.path, ask.kind, ask.call, step)
                if point == here:
                    assert module is not None
                    self.do(player, ask, module, here)
                elif point in self.past or step < self.step:
                    player.log.append("OutOfOrderError")
                elif here is None:
                    player.log.append("NotCalledError")
                else:
                    break
                self.given = self.given or ask.what == GIVE
            del player.pending[0]
        return len(player.pending) < before

    def note_read(self, player: Player, ask: Ask, key: tuple[Node, int], tensor: Tensor) -> None:
        """The model goes on with a copy of what blocks with rows have only read with gradients: a change in place is refused."""
        if player.rows is not None and ask.what.startswith("replace"):
            self.read.pop(key, None)
            self.replaced.add(key)
        elif player.rows is not None and tensor.requires_grad and key not in self.replaced:
            self.read[key] = tensor, tensor._version

    def do(self, player: Player, ask: Ask, module: Node, here: Point) -> None:
        value = self.value
        tensor = tensor_in(value if here.kind == "output" else (value[0] or value[1]))
        mine = player.mine(tensor)
        if ask.what.startswith("read"):
            player.log.append(mine.clone())
        elif ask.what == GIVE:
            self.passed = mine.clone()
            player.log.append(self.passed)
        elif ask.what.startswith("change"):
            mine.mul_(-0.5)
        elif ask.what == "skip":
            instead = module.wrap(3 * mine)
            if player.rows is None:
                self.skipped[module, here.call] = instead
            else:
                self.skipped_rows.setdefault((module, here.call), []).append((player, instead))
            player.log.append("skipped")
        else:
            new = player.put(tensor, replacement(mine) if ask.what != TAKE else taking(mine, self.passed))
            if here.kind == "output":
                self.value = with_tensor(value, new)
            elif value[0]:
                self.value = (new, *value[0][1:]), value[1]
            else:
                self.value = (), with_tensor(value[1], new)
            if ask.what == TAKE:
                player.log.append("taken")
        if here.kind == "input":
            self.note_read(player, ask, (module, here.call), tensor)

    def end_step(self) -> None:
        """What was asked for in this step and has not come will not come."""
        while any(self.advance(player, None, None) for player in self.players):
            pass
        self.enough()
        self.step += 1
        self.past.clear()
        self.counts.clear()


def patch_forward(module: Node, instead_of: Callable[[Node], Any]) -> None:
    forward = module.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        instead = instead_of(module)
        return forward(*args, **kwargs) if instead is None else instead

    module.forward = patched


STEPS = 3


@st.composite
def trees(draw: st.DrawFn, containers: tuple[str, ...] = CONTAINERS) -> Node:
    """A root. A node may be the child of several, and be called several times by one; or most are called once, as in layers."""
    ran: list[str] = []
    if draw(st.booleans()):
        return draw(layers("root", ran, containers, 3))
    nodes = [Node(f"leaf{i}", draw(st.sampled_from(LEAVES)), ran) for i in range(draw(st.integers(1, 3)))]
    for i in range(draw(st.integers(1, 4))):
        children = tuple(draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3)))
        order = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
        nodes.append(Node(f"node{i}", draw(st.sampled_from(containers)), ran, children, order))
    return nodes[-1]


@st.composite
def layers(draw: st.DrawFn, name: str, ran: list[str], containers: tuple[str, ...], depth: int) -> Node:
    """A node with children of its own, each of which it calls once, but for some."""
    if not depth:
        return Node(name, draw(st.sampled_from(LEAVES)), ran)
    count = draw(st.integers(1, 2))
    children = tuple(draw(layers(f"{name}{i}", ran, containers, depth - 1)) for i in range(count))
    order = tuple(range(count)) if draw(st.integers(0, 5)) else (0, 0)
    return Node(name, draw(st.sampled_from(containers)), ran, children, order)


def calls_of(root: Node) -> dict[tuple[str, str, int], int]:
    """The points of one forward pass, numbered in their order, as plain hooks see them."""
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
    root(torch.ones(2, 3, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return {point: i for i, point in enumerate(points)}


@st.composite
def asks(draw: st.DrawFn, root: Node, most: int = 8) -> list[Ask]:
    """Questions in the model's order but for some that are not, or that never come."""
    order = calls_of(root)
    paths = [path for path, _ in root.named_modules()]
    calls = st.sampled_from([0, 0, 0, 1, 2])
    asked = draw(st.lists(st.builds(Ask, st.sampled_from(WHATS), st.sampled_from(paths), calls), max_size=most))
    if draw(st.booleans()):
        asked.sort(key=lambda ask: order.get((ask.path, ask.kind, ask.call), len(order)))
        if draw(st.booleans()):
            asked = [ask for ask in asked if (ask.path, ask.kind, ask.call) in order]
    return asked


@st.composite
def parts(draw: st.DrawFn, root: Node, rows: slice | None = None, most: int = 8) -> Part:
    result = draw(st.booleans())
    if draw(st.booleans()):
        return Part({0: draw(asks(root, most))}, rows, False, result)
    steps = draw(st.lists(st.integers(0, STEPS), unique=True, min_size=1))
    return Part({step: draw(asks(root, most)) for step in steps}, rows, True, result)


@st.composite
def blocks(draw: st.DrawFn, root: Node, steps: int | None, passing: bool, functions: bool) -> tuple[Part, ...]:
    """Two to four blocks with rows of their own, perhaps one with all, perhaps a value that passes between them."""
    made: list[Part] = []
    start = 0
    for _ in range(draw(st.integers(2, 4))):
        count = draw(st.integers(1, 3))
        made.append(draw(parts(root, slice(start, start + count), 5)))
        start += count
    if passing:
        if draw(st.booleans()):
            made.insert(draw(st.integers(0, len(made))), draw(parts(root, None, 5)))
        giver = draw(st.integers(0, len(made) - 1))
        in_step = draw(st.integers(0, (steps or 1) - 1))
        points = sorted({path for path, kind, call in calls_of(root)})
        for i, part in enumerate(made):
            if i == giver or draw(st.booleans()):
                what = [Ask(GIVE if i == giver else TAKE, draw(st.sampled_from(points)))]
                if functions:
                    what.insert(i == giver, Ask(MEET, ""))
                step = in_step if part.iterates else 0
                asked = part.program.get(step, [])
                at = draw(st.integers(0, len(asked)))
                made[i] = part._replace(program=part.program | {step: [*asked[:at], *what, *asked[at:]]})
    return tuple(made)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def differences(root: Node, play: Play, by_hooks: Play | None = None) -> list[str]:
    """In what the trace and the hooks differ."""
    root.ran.clear()
    expected = Hooked(root, by_hooks or play)
    ran = list(root.ran)
    root.ran.clear()
    if expected.is_refused:
        with pytest.raises(
            RowsError, match="was read in a block of tracer.invoke, with gradients, and is changed in place"
        ):
            Traced(root, play)
        met["refused"] += 1
        return []
    with no_leaks(root):
        got = Traced(root, play)
    found = [f"{i}: {a} != {b}" for i, (a, b) in enumerate(zip(got.logs, expected.logs, strict=True)) if not same(a, b)]
    if not same(got.result, expected.result):
        found.append(f"result: {got.result} != {expected.result}")
    if root.ran != ran:  # no forward more, no forward less
        found.append(f"forwards: {root.ran} != {ran}")
    for log in got.logs:
        met.update(entry if isinstance(entry, str) else type(entry).__name__ for entry in log)
    return found


#: How often the random programs of one test have come to what they may come to.
met: Counter[str] = Counter()


def run_often(check: Callable[[], None], *kinds: str) -> None:
    met.clear()
    check()
    assert all(met[kind] > 10 for kind in kinds), met  # the rarest come 25 to 60 times, as chance has it


often = partial(settings, deadline=None, suppress_health_check=list(HealthCheck))


def test_the_callers_block() -> None:
    @often(max_examples=400)
    @given(data=st.data(), grad=st.booleans(), steps=st.sampled_from([None, STEPS]), early=st.booleans())
    def check(data: st.DataObject, grad: bool, steps: int | None, early: bool) -> None:
        with torch.set_grad_enabled(grad):
            root = data.draw(trees())
            play = Play(data.draw(parts(root)), steps=steps, early_stop=early)
            assert differences(root, play) == []

    run_often(check, "Tensor", "int", "OutOfOrderError", "NotCalledError", "skipped")


@pytest.mark.parametrize("functions", [False, True])
def test_blocks_of_invoke(functions: bool) -> None:
    """Also as each would be with its own rows alone, where nothing passes between them."""

    @often(max_examples=250)
    @given(data=st.data(), grad=st.booleans(), steps=st.sampled_from([None, STEPS]), early=st.booleans())
    def check(data: st.DataObject, grad: bool, steps: int | None, early: bool) -> None:
        with torch.set_grad_enabled(grad):
            passing = data.draw(st.booleans())
            root = data.draw(trees() if passing else trees(CONTAINERS[:-1]))
            made = data.draw(blocks(root, steps, passing, functions))
            caller = data.draw(parts(root, most=3)) if passing else Part({})
            play = Play(caller, made, steps=steps, functions=functions, early_stop=early)
            assert differences(root, play) == []
            if not passing:
                whole = Traced(root, play)
                for part, log in zip(made, whole.logs, strict=False):
                    assert same(log, alone(root, play, part)), (log, part)

    run_often(check, "Tensor", "int", "OutOfOrderError", "NotCalledError", "skipped", "taken")


def alone(root: Node, play: Play, part: Part) -> list[Any]:
    """By hooks: what a block sees of a batch that has nothing but its rows."""
    mine = play._replace(blocks=(part._replace(rows=slice(None)),))
    return Hooked(root, mine, play.inputs()[part.rows]).logs[len(play.edits)]


def test_lasting_edits() -> None:
    @often(max_examples=300)
    @given(data=st.data(), grad=st.booleans(), steps=st.sampled_from([None, STEPS]), early=st.booleans())
    def check(data: st.DataObject, grad: bool, steps: int | None, early: bool) -> None:
        with torch.set_grad_enabled(grad):
            root = data.draw(trees())
            edits = tuple(tuple(data.draw(asks(root, 4))) for _ in range(data.draw(st.integers(1, 3))))
            functions = data.draw(st.booleans())
            made = data.draw(blocks(root, steps, True, functions)) if data.draw(st.booleans()) else ()
            caller = data.draw(parts(root, most=4))
            assert differences(root, Play(caller, made, edits, steps, functions, early)) == []

    run_often(check, "Tensor", "int", "OutOfOrderError", "NotCalledError", "skipped")


@torch.no_grad()
def test_plain_calls_of_an_edited_view() -> None:
    @often(max_examples=100)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        root = data.draw(trees())
        play = Play(edits=tuple(tuple(data.draw(asks(root, 4))) for _ in range(2)), early_stop=False)
        traced, expected = Traced(root, play), Hooked(root, play)
        for entry, log in zip(traced.logs, expected.logs, strict=True):
            entry.clear()
            log[:] = 2 * log
        with no_leaks(root):
            for _ in range(2):
                assert same(traced.edited(play.inputs()), expected.result)
            assert same(traced.logs, expected.logs)
            assert same(traced.edited.without_edits()(play.inputs()), root(play.inputs()))

    check()


def tree() -> Node:
    ran: list[str] = []
    leaf = Node("leaf", "affine", ran)
    return Node("root", "residual", ran, (Node("chain", "chain", ran, (leaf,), (0, 0)),), (0,))


READ, DOUBLED = Ask("read output", "c0.c0", 1), Ask("replace input", "c0")
CROSSING = (Ask(GIVE, "c0.c0"), Ask(TAKE, "c0.c0", 1))
TWO = Play(
    blocks=(
        Part({0: [READ, CROSSING[0]]}, slice(0, 1)),
        Part({0: [CROSSING[1], READ]}, slice(1, 3), result=True),
    )
)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # Another edit, another call, another point.
        (Play(Part({0: [DOUBLED, READ]})), Play(Part({0: [Ask("change input", "c0"), READ]}))),
        (Play(Part({0: [READ]})), Play(Part({0: [READ._replace(call=0)]}))),
        (
            Play(Part({0: [Ask("skip", "c0.c0")]}, result=True)),
            Play(Part({0: [Ask("skip", "c0")]}, result=True)),
        ),
        # An error where there is none, and the other way round.
        (Play(Part({0: [READ, DOUBLED]})), Play(Part({0: [DOUBLED, READ]}))),
        # Another step.
        (Play(Part({1: [DOUBLED, READ]}), steps=3), Play(Part({2: [DOUBLED, READ]}), steps=3)),
        (Play(Part({1: [DOUBLED]}, result=True), steps=3), Play(Part({1: []}, result=True), steps=3)),
        # A forward more.
        (Play(Part({0: [READ]})), Play(Part({0: [READ]}), early_stop=False)),
        # Another block's rows; another value that passes.
        (TWO, TWO._replace(blocks=(TWO.blocks[0]._replace(rows=slice(2, 3)), TWO.blocks[1]))),
        (TWO, TWO._replace(blocks=(Part({0: [READ, Ask(GIVE, "c0")]}, slice(0, 1)), TWO.blocks[1]))),
        # A lasting edit that is missing, one too many, in another order.
        (Play(Part({0: [READ]}), edits=((DOUBLED,),)), Play(Part({0: [READ]}), edits=((),))),
        (
            Play(Part({0: [READ]}), edits=((DOUBLED,), (Ask("change input", "c0"),))),
            Play(Part({0: [READ]}), edits=((Ask("change input", "c0"),), (DOUBLED,))),
        ),
    ],
)
def test_the_comparison_can_fail(right: Play, wrong: Play) -> None:
    root = tree()
    with torch.no_grad():
        assert differences(root, right) == []
        assert differences(root, right, wrong)


def test_the_comparison_sees_what_is_left_behind() -> None:
    root = tree()
    with pytest.raises(AssertionError), no_leaks(root):
        root.forgotten = 1
