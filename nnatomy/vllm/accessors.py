"""Accessors: a standard name on every layer of the engine's model, `model.layers_output[i]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor

from nnatomy.core.block import Block
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Slot
from nnatomy.errors import AssignmentError, LayerIndexError, NotInThisModelError, UsageError
from nnatomy.names import Name
from nnatomy.standardized.accessors import check_fits, one_for_each
from nnatomy.standardized.pickling import NotPickled
from nnatomy.tracing.attach import Point
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.places import Place, StreamPlace
from nnatomy.vllm.run import EngineRun
from nnatomy.whole_number import whole_number


def run_of(block: Block) -> EngineRun:
    """The engine's run that a block looks into."""
    assert isinstance(block.run, EngineRun)
    return block.run


def layout_of(block: Block) -> Layout:
    """The rows of the step that a block stands in; it has begun."""
    layout = run_of(block).layout
    assert layout is not None
    return layout


class Accessor(NotPickled):
    """A standard name: `accessor[i]` reads it on layer `i`, `accessor[i] = x` puts `x` in its place; a slice reads several.

    What is read has memory of its own. Changed in place, it is put back when the block asks for the next value.

    Raises:
        LayerIndexError: for a layer that the model does not have.
        NotInThisModelError: for a layer that has no such thing; the text says why.
        AssignmentError: for a tensor that does not fit, or a name that is only read.
        OutsideTraceError, OutOfOrderError, NotReachedError: see `ModuleView.output`.
    """

    def __init__(self, row: Name, places: Sequence[Place | str], blocks: OpenBlocks) -> None:
        self.row = row
        self.name = row.name
        self.places = list(places)  #: where it is on each layer, or why it is not there
        self._blocks = blocks

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that have it."""
        return tuple(i for i, place in enumerate(self.places) if isinstance(place, Place))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        place, slot, block = self._reach(layer)
        return held_value(place, slot, block, self._said(layer))

    def __setitem__(self, layer: Any, value: Any) -> None:
        if isinstance(layer, slice):
            for i, one in one_for_each(self.name, layer, len(self), value):
                self[i] = one
            return
        place, slot, block = self._reach(layer)
        put_value(place, slot, block, self._said(layer), value)

    def __call__(self, *layers: Any) -> NoReturn:
        """Raise UsageError: a layer stands in square brackets."""
        raise UsageError(
            f"{self.name}(...): a layer stands in square brackets, {self.name}[{', '.join(map(str, layers)) or 0}]."
        )

    def at(self, layer: Any) -> Place:
        """Where it is on that layer. Raises LayerIndexError or NotInThisModelError."""
        count = len(self.places)
        try:
            layer = whole_number(layer)
        except TypeError:
            raise LayerIndexError(f"{self.name}[{layer!r}]: layers are counted, 0 to {count - 1}, or sliced.") from None
        if not -count <= layer < count:
            raise LayerIndexError(f"{self.name}[{layer}]: the model has {count} layers, 0 to {count - 1}.")
        place = self.places[layer]
        if isinstance(place, str):
            raise NotInThisModelError(f"{self.name}[{layer}]: {place}.")
        return place

    def point(self, layer: int) -> Point:
        """Where a module can be attached (see `Traceable.attach`): it is given all tokens of a step in one axis. Errors as `at`."""
        place, said = self.at(layer), f"{self.name}[{layer}]"
        if not isinstance(place, StreamPlace) or place.only_read:
            raise NotInThisModelError(
                f"{said}: a module is attached where the stream, or what is added to it, is one tensor of all tokens; "
                f"{place.only_read or 'this is one of heads'}. Give an edit: model.edit(function)."
            )
        return Point(said, place.module, place.kind, place.whole, place.with_whole)

    def _said(self, layer: int) -> str:
        return f"{self.name}[{whole_number(layer) % len(self.places)}]"

    def _reach(self, layer: Any) -> tuple[Place, Slot, Block]:
        place = self.at(layer)
        block = self._blocks.current(self.name)
        return place, block.reach(place.module, place.kind, f"{self.name}[{layer}]"), block

    def __repr__(self) -> str:
        return f"<{self.name} on {len(self.layers)} of {len(self)} layers: ({', '.join(self.row.axes)})>"


def held_value(place: Place, slot: Slot, block: Block, said: str) -> Tensor:
    """The value at a point where the block stands: the same object each time it is asked for there."""
    run, layout = run_of(block), layout_of(block)
    if (value := run.held(slot, said)) is None:
        value = place.read(slot, layout)

        def put(new: Tensor) -> None:
            if place.only_read:
                raise AssignmentError(f"{said} was changed in place, and can only be read: {place.only_read}.")
            run.once(place.write(slot, layout, new))

        run.hold(slot, said, value, put)
    return value


def put_value(place: Place, slot: Slot, block: Block, said: str, value: Any) -> None:
    """Put another value at a point where the block stands. Raises AssignmentError."""
    if place.only_read:
        raise AssignmentError(f"{said} can be read, and not assigned: {place.only_read}.")
    run, layout = run_of(block), layout_of(block)
    old = run.held(slot, said)
    check_fits(said, place.read(slot, layout) if old is None else old, value)
    run.let_go(slot, said)
    run.once(place.write(slot, layout, value))
