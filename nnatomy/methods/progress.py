"""How far a method has come: a bar in the terminal, or told to whoever runs it for somebody elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

#: Is told, in the place of a bar: what is done, how many are, and of how many.
told: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("told", default=None)


@contextmanager
def counting(total: int, what: str, on: bool, delay: float = 0.0) -> Iterator[Callable[[int], Any]]:
    """Gives what is called with how many more are done.

    Args:
        on: show a bar, after `delay` seconds.
    """
    tell = told.get()
    if tell is None:
        with tqdm(total=total, desc=what, disable=not on, delay=delay) as bar:
            yield bar.update
        return
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        tell(what, done, total)

    count(0)
    yield count


def shown(items: Iterable[Item], what: str, on: bool, delay: float = 0.0) -> Iterator[Item]:
    """The items one by one, counted as they are done. Arguments as `counting`."""
    items = list(items)
    with counting(len(items), what, on, delay) as count:
        for item in items:
            yield item
            count(1)
