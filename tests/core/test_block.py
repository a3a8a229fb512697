"""Which block a line means, when several are open in one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from helpers import net, no_leaks, x
from torch import Tensor

from nnatomy.errors import OutsideTraceError
from nnatomy.tracing import Traceable


class Wrapped:
    """A context manager of the user's own around a trace."""

    def __init__(self, view: Traceable, value: Tensor) -> None:
        self.trace = view.trace(value)

    def __enter__(self) -> Any:
        return self.trace.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.trace.__exit__(*error)


@contextmanager
def by_generator(view: Traceable, value: Tensor) -> Iterator[Any]:
    with view.trace(value) as tracer:
        yield tracer


@contextmanager
def by_two_generators(view: Traceable, value: Tensor) -> Iterator[Any]:
    with by_generator(view, value) as tracer:
        yield tracer


@contextmanager
def by_stack(view: Traceable, value: Tensor) -> Iterator[Any]:
    with ExitStack() as stack:
        yield stack.enter_context(view.trace(value))


WAYS = [Traceable.trace, Wrapped, by_generator, by_two_generators, by_stack]


@pytest.mark.parametrize("way", WAYS)
def test_interleaved_generators_each_have_their_own_block(way: Any) -> None:
    model = net()
    view = Traceable(model)

    def read(value: Tensor) -> Iterator[Tensor]:
        with way(view, value):
            for layer in view.layers:
                yield layer.input

    with torch.no_grad():
        expected = [[], []]
        for into, value in zip(expected, (x(), 2 * x()), strict=True):
            hidden = model.shared(model.embed(value))
            for layer in model.layers:
                into.append(hidden)
                hidden, _ = layer(hidden, scale=0.5)
        with no_leaks(model):
            got = [[], []]
            for one, two in zip(read(x()), read(2 * x()), strict=True):
                got[0].append(one)
                got[1].append(two)
    for mine, theirs in zip(got, expected, strict=True):
        assert len(mine) == 3
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_line_outside_a_suspended_generator_means_the_block_it_stands_in(way: Any) -> None:
    model = net()
    view = Traceable(model)

    def suspended() -> Iterator[Tensor]:
        with way(view, 2 * x()):
            yield view.embed.input
            yield view.head.input

    with no_leaks(model), way(view, x()):
        generator = suspended()
        assert torch.equal(next(generator), 2 * x())
        assert torch.equal(view.embed.input, x())
        assert next(generator).shape == (2, 4)
        assert torch.equal(view.layers[0].attn.input, model.shared(model.embed(x())))
        generator.close()


@pytest.mark.parametrize("way", WAYS)
def test_the_inner_one_of_nested_blocks_is_meant_and_then_the_outer(way: Any) -> None:
    model = net()
    view = Traceable(model)

    def inner() -> Tensor:
        with way(view, 3 * x()):
            return view.embed.input

    with no_leaks(model), way(view, x()):
        with way(view, 2 * x()):
            assert torch.equal(view.embed.input, 2 * x())
            assert torch.equal(inner(), 3 * x())
            assert torch.equal(view.embed.input, 2 * x())
        assert torch.equal(view.embed.input, x())


def test_tasks_of_an_event_loop() -> None:
    model = net()
    view = Traceable(model)

    async def task(factor: int) -> bool:
        with view.trace(factor * x()):
            await asyncio.sleep(0)
            embedded = view.embed.input
            await asyncio.sleep(0)
            inner = view.layers[0].input
        return torch.equal(embedded, factor * x()) and torch.equal(inner, model.shared(model.embed(factor * x())))

    async def main() -> list[bool]:
        return await asyncio.gather(*(task(factor) for factor in range(1, 5)))

    with no_leaks(model):
        assert asyncio.run(main()) == [True] * 4


def test_a_block_that_is_over_is_not_meant() -> None:
    view = Traceable(net())
    with view.trace(x()), view.trace(x()):
        pass
    with pytest.raises(OutsideTraceError, match="embed: values exist only while the model runs"):
        view.embed.output
