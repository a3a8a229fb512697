"""Random programs on random module trees, against a reference made of plain PyTorch hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers import no_leaks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnatomy.core import Traceable
from nnatomy.errors import NotReachedError, OutOfOrderError


class Leaf(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, v: Tensor) -> Tensor:
        return v * self.scale + 1


class Node(nn.Module):
    """Calls its children one after the other, some of them twice; may return a tuple."""

    def __init__(self, children: list[nn.Module], order: list[int], pair: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)
        self.order = [k % len(children) for k in order]
        self.pair = pair

    def forward(self, v: Tensor) -> Any:
        for k in self.order:
            out = self.parts[k](v)
            v = out[0] if isinstance(out, tuple) else out
        return (v, "rest") if self.pair else v


@st.composite
def trees(draw: Any) -> Node:
    leaves = [Leaf(draw(st.sampled_from([0.5, -1.0, 2.0]))) for _ in range(draw(st.integers(1, 3)))]

    def make(depth: int) -> nn.Module:
        if depth == 0 or draw(st.booleans()):
            return draw(st.sampled_from(leaves))  # often shared
        return node(depth - 1)

    def node(depth: int) -> Node:
        children = [make(depth) for _ in range(draw(st.integers(1, 3)))]
        return Node(children, draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)), draw(st.booleans()))

    return node(2)


@dataclass
class Step:
    """One line of a program: what to do at a point."""

    which: int
    call: int
    kind: str
    action: str


steps = st.builds(
    Step,
    which=st.integers(0, 11),
    call=st.sampled_from([0, 0, 0, 1, 2]),
    kind=st.sampled_from(["input", "output"]),
    action=st.sampled_from(["read", "replace", "in place", "skip", "skip"]),
)


def tensor_of(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def with_tensor(value: Any, tensor: Tensor) -> Any:
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def like(module: nn.Module, tensor: Tensor) -> Any:
    return (tensor, "skipped") if getattr(module, "pair", False) else tensor


def by_hooks(tree: Node, modules: list[nn.Module], program: list[Step]) -> tuple[list[Any], Any]:
    """What a program gives: for each step a value or the error due, and the model's result.

    The model runs once, with hooks on every module that walk through the program as the points come:
    an event that the next step means is answered. Whether a step is out of order is known from the
    events that have been. `skip` puts another forward in the module's place for that call.
    """
    log: list[Any] = []
    position = 0
    entered: dict[int, int] = {}
    past: set[tuple[int, int, str]] = set()

    def act(step: Step, module: nn.Module, value: Any) -> Any:
        tensor = tensor_of(value)
        if step.action == "skip" and step.kind == "input":
            log.append("skipped")
            return value
        log.append(tensor.clone())
        if step.action == "replace":
            return with_tensor(value, tensor * 2 - 1)
        if step.action == "in place":
            tensor.mul_(3)
        return value

    def advance(event: tuple[int, int, str], module: nn.Module, value: Any) -> tuple[Any, list[Any]]:
        """Do the steps that are due now; returns the value to go on with, and what is put in its place."""
        nonlocal position
        instead = []
        past.add(event)
        while position < len(program):
            step = program[position]
            point = (step.which % len(modules), step.call, step.kind)
            if point == event:
                value = act(step, module, value)
                if step.action == "skip" and step.kind == "input":
                    instead.append(like(module, tensor_of(value) * 7))
            elif point in past:
                log.append(OutOfOrderError)
            else:
                break
            position += 1
        return value, instead

    index = {id(module): k for k, module in enumerate(modules)}
    forwards = {id(module): module.forward for module in modules}

    def wrap(module: nn.Module) -> Any:
        def forward(v: Tensor) -> Any:
            k = index[id(module)]
            call = entered.get(k, 0)
            entered[k] = call + 1
            v, instead = advance((k, call, "input"), module, v)
            out = instead[-1] if instead else forwards[id(module)](v)
            return advance((k, call, "output"), module, out)[0]

        return forward

    for module in modules:
        module.forward = wrap(module)
    try:
        result = tree(torch.tensor([1.0, -2.0]))
    finally:
        for module in modules:
            del module.forward
    for step in program[position:]:  # nothing more comes
        point = (step.which % len(modules), step.call, step.kind)
        log.append(OutOfOrderError if point in past else NotReachedError)
    return log, result


def by_trace(tree: Node, modules: list[nn.Module], program: list[Step]) -> tuple[list[Any], Any]:
    view = Traceable(tree)
    paths = {module: path for path, module in tree.named_modules()}
    log: list[Any] = []
    with view.trace(torch.tensor([1.0, -2.0])) as tracer:
        for step in program:
            module = modules[step.which % len(modules)]
            point = (view[paths[module]] if paths[module] else view).calls[step.call]
            try:
                value = getattr(point, step.kind)
            except (OutOfOrderError, NotReachedError) as error:
                log.append(type(error))
                continue
            tensor = tensor_of(value)
            if step.action == "skip" and step.kind == "input":
                point.skip(like(module, tensor * 7))
                log.append("skipped")
                continue
            log.append(tensor.clone())
            if step.action == "replace":
                setattr(point, step.kind, with_tensor(value, tensor * 2 - 1))
            elif step.action == "in place":
                tensor.mul_(3)
        result = tracer.result
    return log, result


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


seen = {"values": 0, "OutOfOrderError": 0, "NotReachedError": 0, "skipped": 0}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(tree=trees(), program=st.lists(steps, max_size=7), ordered=st.booleans())
def check(tree: Node, program: list[Step], ordered: bool) -> None:
    modules = list(tree.modules())
    modules = [module for module in modules if not isinstance(module, nn.ModuleList)]
    if ordered:  # in the order the model comes to the points, mostly
        order: list[tuple[int, int, str]] = []
        entered: dict[int, int] = {}

        def note(k: int, kind: str) -> Any:
            def hook(*_: Any) -> None:
                if kind == "input":
                    entered[k] = entered.get(k, -1) + 1
                order.append((k, entered[k], kind))

            return hook

        handles = [m.register_forward_pre_hook(note(k, "input")) for k, m in enumerate(modules)]
        handles += [m.register_forward_hook(note(k, "output")) for k, m in enumerate(modules)]
        tree(torch.zeros(2))
        for handle in handles:
            handle.remove()
        chosen = sorted((step.which * 7 + step.call) % len(order) for step in program)
        program = [
            Step(order[at][0], order[at][1], order[at][2], step.action)
            for at, step in zip(chosen, program, strict=True)
        ]
    with torch.no_grad():
        expected, result = by_hooks(tree, modules, program)
        with no_leaks(tree):
            got, traced = by_trace(tree, modules, program)
    assert len(got) == len(expected)
    assert all(map(same, got, expected)), (got, expected)
    assert same(traced, result), (traced, result)
    for entry in got:
        seen["values" if isinstance(entry, Tensor) else getattr(entry, "__name__", "skipped")] += 1


def test_programs_agree_with_plain_pytorch() -> None:
    check()
    assert min(seen.values()) > 50, seen  # the programs have met everything
