"""Where a value is in the engine's model: a module's call, and the tensors in what it is given or gives.

Many of the engine's layers hand on the stream as a pair, `(hidden, residual)`, whose sum it is: the next norm adds them up and
normalises in one kernel. A name gives the sum; put back, it is the first of the pair, and the other one is zeros, so that the sum is
what was written, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.core.points import Slot
from nnatomy.errors import OutOfOrderError
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.run import Once

#: How to come to a tensor in a value: of what a call is given, (0, 1) is its second positional argument, (1, "residual") one by name.
Path = tuple[Any, ...]


def at(value: Any, path: Path) -> Any:
    """What is there."""
    for step in path:
        value = value[step]
    return value


def with_at(value: Any, path: Path, new: Any) -> Any:
    """The value with something else there; what holds it is copied."""
    if not path:
        return new
    inner = with_at(value[path[0]], path[1:], new)
    if isinstance(value, dict):
        return {**value, path[0]: inner}
    others = [inner if i == path[0] else one for i, one in enumerate(value)]
    return type(value)(others) if type(value) in (tuple, list) else type(value)(*others)


def tensors_in(value: Any, wanted: Callable[[Tensor], bool], path: Path = ()) -> list[tuple[Path, Tensor]]:
    """The tensors in a value, with the paths to them."""
    if isinstance(value, Tensor):
        return [(path, value)] if wanted(value) else []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    return [found for key, one in items for found in tensors_in(one, wanted, (*path, key))]


@dataclass(frozen=True)
class Place:
    """Where a name is on a layer.

    Attributes:
        module: whose call it is.
        kind: "input" or "output" of it.
        only_read: why it cannot be assigned; "" where it can.
    """

    module: Module
    kind: str
    only_read: str = ""

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        """The value by rows, in memory of its own."""
        raise NotImplementedError

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> Once | None:
        """Put another one in its place; gives what has to be put at a later point for that."""
        raise NotImplementedError


class Summed(tuple[Any, ...]):
    """A point's value in which a sum has been written.

    Attributes:
        before: what it was: what has been added up in it does not change by that.
    """

    before: Any


@dataclass(frozen=True)
class StreamPlace(Place):
    """(batch, seq, width): one tensor, or the sum of two.

    Attributes:
        in_batch: whether there is an axis of one before that of the tokens.
        summand: whether it is the first of a pair whose sum is a name, too.
    """

    paths: tuple[Path, ...] = ((),)
    in_batch: bool = False
    summand: bool = False

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        return layout.rows(self.whole(slot.value))

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> None:
        slot.value = self.with_whole(slot.value, layout.put(self.whole(slot.value), new))

    def whole(self, value: Any) -> Tensor:
        """The tensor of all tokens in a point's value."""
        if self.summand and isinstance(value, Summed):
            value = value.before
        first, *others = (one for path in self.paths if (one := at(value, path)) is not None)
        for other in others:
            first = first + other
        return first[0] if self.in_batch else first

    def with_whole(self, value: Any, new: Tensor) -> Any:
        """The value with another one. Raises OutOfOrderError for a summand of a sum that has been written."""
        if isinstance(value, Summed) and self.summand:
            raise OutOfOrderError(
                "What a layer adds to the stream is written before the stream with it: here the sum of both has been written before."
            )
        before = value.before if isinstance(value, Summed) else value
        value = tuple(value) if isinstance(value, Summed) else value
        value = with_at(value, self.paths[0], new[None] if self.in_batch else new)
        if len(self.paths) == 1:
            return value
        for path in self.paths[1:]:
            if (other := at(value, path)) is not None:
                value = with_at(value, path, torch.zeros_like(other))
        summed = Summed(value)
        summed.before = before
        return summed


@dataclass(frozen=True)
class HeadsPlace(Place):
    """(batch, head, query, head_dim), or (batch, seq, head, head_dim): a tensor of all heads of all tokens.

    Attributes:
        heads, size: how many heads there are, and the size of each.
        positions_first: whether heads come behind positions.
    """

    path: Path = ()
    heads: int = 1
    size: int = 1
    positions_first: bool = False

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        rows = layout.rows(self.flat(slot.value))
        return rows if self.positions_first else rows.transpose(1, 2)

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> None:
        rows = new if self.positions_first else new.transpose(1, 2)
        slot.value = self.with_flat(slot.value, layout.put(self.flat(slot.value), rows))

    def flat(self, value: Any) -> Tensor:
        """(tokens, head, head_dim)."""
        return at(value, self.path).reshape(-1, self.heads, self.size)

    def with_flat(self, value: Any, new: Tensor) -> Any:
        """The value with others of them."""
        return with_at(value, self.path, new.reshape(at(value, self.path).shape))
