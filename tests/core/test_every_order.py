"""Every order of two questions, at three modules that a pass calls 0, 1 or 2 times, in any sequence.

The model numbers what happens in a pass: a module is given the number of its input and returns that of its output. So a value says
of which event it is, and the plain list of the events says which answer is right. Every pass of a model has another
sequence than the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from typing import Any, NamedTuple

import pytest
from torch import nn

from nnatomy.core import Traceable
from nnatomy.errors import NotCalledError, OutOfOrderError
from nnatomy.tracing.steps import Steps


class Point(NamedTuple):
    module: str
    kind: str
    call: int


class Next(nn.Module):
    def forward(self, number: int) -> int:
        return number + 1


class Branching(nn.Module):
    """Calls its modules in the sequence that it is given."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Next())

    def forward(self, sequence: tuple[str, ...], number: int = 0) -> int:
        for name in sequence:
            number = self._modules[name](number) + 1
        return number


def sequences(names: str) -> list[tuple[str, ...]]:
    """All in which each comes 0, 1 or 2 times; neighbours differ."""
    counts = product(range(3), repeat=len(names))
    multisets = [[name for name, times in zip(names, count, strict=True) for _ in range(times)] for count in counts]
    return sorted({order for multiset in multisets for order in permutations(multiset)})


def points(names: str) -> list[Point]:
    return [Point(*point) for point in product(names, ("input", "output"), (0, 1))]


def events(sequence: tuple[str, ...], first: int = 0) -> dict[Point, int]:
    """The number of each event of a pass."""
    numbers: dict[Point, int] = {}
    for place, name in enumerate(sequence):
        call = sequence[:place].count(name)
        numbers[Point(name, "input", call)] = first + 2 * place
        numbers[Point(name, "output", call)] = first + 2 * place + 1
    return numbers


def answer(view: Traceable, point: Point) -> Any:
    """The number, or which error came in its place."""
    try:
        return getattr(view[point.module].calls[point.call], point.kind)
    except (NotCalledError, OutOfOrderError) as error:
        return type(error)


def right_answers(happened: dict[Point, int], asked: list[Point]) -> Iterator[set[Any]]:
    """What may be answered, question by question: the number of an event that is still to come, or an error."""
    now: float = -1
    for point in asked:
        number = happened.get(point)
        if number is not None:
            yield {number} if number >= now else {OutOfOrderError}
            now = max(now, number)
        else:  # the pass goes to its end to find out, where everything is past
            yield {NotCalledError} if now < float("inf") else {NotCalledError, OutOfOrderError}
            now = float("inf")


def test_in_one_pass() -> None:
    view = Traceable(Branching("abc"))
    for asked in product(points("abc"), repeat=2):
        for sequence in sequences("abc"):
            with view.trace(sequence):
                answers = [answer(view, point) for point in asked]
            for got, right in zip(answers, right_answers(events(sequence), list(asked)), strict=True):
                assert got in right, (sequence, asked, answers)


@pytest.mark.parametrize("which", [(0, 1), (1, 1)])
def test_in_two_steps(which: tuple[int, int]) -> None:
    """Two passes of one generation, of different sequences: a question in each, or both in the second."""
    model = Branching("ab")
    view = Traceable(model)
    passes = [(one, other) for one in sequences("ab") for other in sequences("ab")]

    def generate(both: tuple[tuple[str, ...], ...]) -> None:
        number = 0
        for sequence in both:
            number = model(sequence, number)

    for asked in product(points("ab"), repeat=2):
        for both in passes:
            answers = []
            with view.trace_call(generate, both) as tracer:
                for step in Steps(tracer.block)[:2]:
                    answers += [answer(view, point) for point, its in zip(asked, which, strict=True) if its == step]
            first = events(both[0]), events(both[1], 2 * len(both[0]))
            right: list[set[Any]] = []
            for step in (0, 1):
                mine = [point for point, its in zip(asked, which, strict=True) if its == step]
                right += right_answers(first[step], mine)
            for got, may_be in zip(answers, right, strict=True):
                assert got in may_be, (both, asked, answers)
