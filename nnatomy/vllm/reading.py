"""Reading and changing places while the engine goes on, and values without their padding: what proofs are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core.gates import unseen
from nnatomy.core.points import Collector, Slot
from nnatomy.errors import NnatomyError
from nnatomy.names import Name
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.places import Place

#: A place of a name on a layer.
Placed = tuple[str, int, Place]
#: A place, and what is to be made of its value.
Change = tuple[Place, Callable[[Tensor], Tensor]]
#: Scores below this are of what is not attended to, which each side writes in its own way.
_LOWEST = -1e4


class Reader(Collector):
    """Reads places as the engine goes on.

    Attributes:
        values: by name and layer, of each place.
        logits: of all positions.
    """

    def __init__(self, places: Iterable[Placed], step: int, root: Module, head: Any) -> None:
        self._at: dict[tuple[Module, str], list[Placed]] = {}
        for name, layer, place in places:
            self._at.setdefault((place.module, place.kind), []).append((name, layer, place))
        self.modules = {module for module, _ in self._at} | {root}
        self.kinds = {"input": None, "output": None}
        self.values: dict[tuple[str, int], dict[Place, Any]] = {}
        self.logits: Any = None
        self.layout: Any = None
        self.outputs: list[Any] = []
        self.run: Any = None
        self._step, self._root, self._head = step, root, head

    def take(self, slot: Slot) -> None:
        if slot.step != self._step or slot.call:
            return
        layout = self.run.layout
        for name, layer, place in self._at.get((slot.module, slot.kind), ()):
            try:
                value: Any = place.read(slot, layout)
            except NnatomyError as error:
                value = str(error).rstrip(".")
            self.values.setdefault((name, layer), {})[place] = value
        if slot.module is self._root and slot.kind == "output" and self._head is not None:
            self.layout = layout
            with unseen():
                self.logits = layout.rows(self._head(slot.value))


class Writer(Collector):
    """Adds to what is at places."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._at: dict[tuple[Module, str], list[Change]] = {}
        for place, change in changes:
            self._at.setdefault((place.module, place.kind), []).append((place, change))
        self.modules = {module for module, _ in self._at}
        self.kinds = {"input": None, "output": None}
        self.run: Any = None

    def take(self, slot: Slot) -> None:
        if slot.step or slot.call:
            return
        for place, change in self._at.get((slot.module, slot.kind), ()):
            layout = self.run.layout
            self.run.once(place.write(slot, layout, change(place.read(slot, layout))))


def unpadded(row: Name, value: Tensor, layout: Layout) -> Tensor:
    """The value, in single precision, with zeros where a row is padded; and of scores one number for what is not attended to."""
    value = value.float().cpu()
    if row.name == "attention_scores":
        value = value.masked_fill(value < _LOWEST, 0)
    for axes, mask in ((row.here, layout.mask), (row.so_far, layout.mask_so_far)):
        for axis in axes:
            shape = [1] * value.ndim
            shape[0], shape[axis] = mask.shape
            value = value.masked_fill(~mask.view(shape), 0)
    return value
