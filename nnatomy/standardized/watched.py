"""Who is told of what a block reads and puts by its standard names: the recording of a plan (`nnatomy.plans`)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Protocol


class Watcher(Protocol):
    """What is told, in the thread of the block, in the order of the block."""

    def read(self, of: Any, name: str, layer: int | None, value: Any) -> None:
        """A block of the model `of` (or of its blocks) has been given that value."""

    def put(self, of: Any, name: str, layer: int | None, value: Any) -> None:
        """It has put it there."""

    def skip(self, model: Any, layers: tuple[int, int], skip_with: Any) -> None:
        """Is to do `model.skip_layers(*layers, skip_with)`."""

    def chosen(self, own: Any, where: Any) -> Any:
        """Is to do `own.chosen(where)`, of positions."""

    def asked_step(self, step: int) -> None:
        """What is done depends on whether that step has come."""

    def paused(self) -> AbstractContextManager[None]:
        """Within, nothing is watched."""

    def refuse(self, why: str) -> None:
        """It is something that is not to be watched: raises."""


#: None where nobody watches.
watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
