"""Accessors: a standard name on every block of the denoiser, `model.layers_output[i]`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Slot, Tap
from nnatomy.diffusion.halves import Half, Halves, given_to, put_rows
from nnatomy.errors import LayerIndexError, NotInThisModelError, counted
from nnatomy.names import Name
from nnatomy.standardized.accessors import check_fits, one_for_each
from nnatomy.standardized.pickling import NotPickled
from nnatomy.whole_number import whole_number


@dataclass(frozen=True)
class At:
    """Where a name is on a layer.

    Attributes:
        get: from the point's value to the tensor.
        put: from the value and another tensor to the value with that.
        copies: whether the model changes the tensor in place later on, so that a copy is read.
    """

    module: Module
    kind: str
    get: Callable[[Any], Any] = lambda value: value
    put: Callable[[Any, Any], Any] = lambda _, new: new
    tap: Tap | None = None
    copies: bool = False


class Accessor(NotPickled):
    """A standard name: `accessor[i]` reads it on block `i`, `accessor[i] = x` puts `x` in its place; a slice reads several.

    Raises:
        LayerIndexError: for a block that the denoiser does not have.
        NotInThisModelError: for a block that has no such thing; the text says why.
        AssignmentError: for a tensor that does not fit.
        OutsideTraceError, OutOfOrderError, NotReachedError: see `ModuleView.output`.
    """

    def __init__(self, row: Name, places: Sequence[At | str], blocks: OpenBlocks, halves: Halves) -> None:
        self.row = row
        self.name = row.name
        self.places = list(places)  #: where it is on each layer, or why it is not there
        self.half: Half | None = None
        self._blocks = blocks
        self._halves = halves

    def of_half(self, half: Half, halves: Halves) -> Accessor:
        """The same name on one half of guidance."""
        other = copy.copy(self)
        other.half, other._halves = half, halves
        return other

    def refuse(self, layer: int, why: str) -> None:
        """Give it on that layer no more, for this reason."""
        self.places[layer] = why

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that have it."""
        return tuple(i for i, place in enumerate(self.places) if isinstance(place, At))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, layer: int | slice) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        place, slot, rows = self._reach(layer)
        value = place.get(slot.value)[rows]
        return value.clone() if place.copies else value

    def __setitem__(self, layer: int | slice, value: Any) -> None:
        if isinstance(layer, slice):
            for i, one in one_for_each(f"{self.half}.{self.name}" if self.half else self.name, layer, len(self), value):
                self[i] = one
            return
        place, slot, rows = self._reach(layer)
        whole = place.get(slot.value)
        check_fits(self._said(layer), whole[rows], value)
        slot.value = place.put(slot.value, put_rows(whole, rows, value.clone() if place.copies else value))

    def at(self, layer: int) -> At:
        """Where it is on that layer. Raises LayerIndexError or NotInThisModelError."""
        count = len(self.places)
        try:
            layer = whole_number(layer)
        except TypeError:
            raise LayerIndexError(f"{self.name}[{layer!r}]: layers are counted, 0 to {count - 1}, or sliced.") from None
        if not -count <= layer < count:
            raise LayerIndexError(
                f"{self.name}[{layer}]: the denoiser has {counted(count, 'layer')}, 0 to {count - 1}."
            )
        place = self.places[layer]
        if isinstance(place, str):
            raise NotInThisModelError(f"{self.name}[{layer}]: {place}.")
        return place

    def _said(self, layer: Any) -> str:
        return f"{self.half}.{self.name}[{layer}]" if self.half else f"{self.name}[{layer}]"

    def _reach(self, layer: int) -> tuple[At, Slot, slice]:
        place = self.at(layer)
        block = self._blocks.current(self.name)
        given = given_to(block.run)
        if self.half is None:
            given.whole = self._said(layer)
        slot = block.reach(place.module, place.kind, self._said(layer), self._halves.call(self.half), place.tap)
        rows = self._halves.rows(self.half, f"{self.name}[{layer}]", len(place.get(slot.value)), given.images)
        return place, slot, rows

    def __repr__(self) -> str:
        return f"<{self.name} on {len(self.layers)} of {len(self)} layers>"
