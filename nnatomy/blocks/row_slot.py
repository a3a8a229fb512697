"""A slot as one of several blocks sees it: its own rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.blocks.rows import Rows, merged
from nnatomy.core.points import Slot, versions
from nnatomy.errors import AssignmentError, RowsError


def is_opaque(value: Any) -> bool:
    """Whether it is a leaf for us: not a KV cache's contents, which are the model's own."""
    return not isinstance(value, (tuple, list, dict))


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a value, and how they are put together."""
    return pytree.tree_flatten(value, is_leaf=is_opaque)


@dataclass(eq=False)
class UnknownRows:
    """Stands among a module's further arguments or results where nobody can tell which rows are the block's."""

    _why: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RowsError(self._why)


class Edit(NamedTuple):
    """Other rows for one leaf of a slot's value. `only_read`: the same rows, put there for the gradient that they may get."""

    leaf: int
    new: Tensor
    only_read: bool = False


class RowSlot(Slot):
    """One block's rows of a slot.

    Args:
        replaced: the leaves that other blocks have put rows of their own in, which are not there yet. What is changed in
            place in such a one is no change of the tensor that the model has made.

    Attributes:
        whole: the slot.
        skipped: the module is to run for the other blocks alone; this one's rows of its output are `instead`.
        edits: what the block has edited of its rows, which is yet to be made in the whole (see `note_edits`).
    """

    def __init__(self, whole: Slot, rows: Rows, replaced: Collection[int] = ()) -> None:
        self.whole = whole
        self.rows = rows
        self.edits: list[Edit] = []
        self._replaced = replaced
        self._given: list[Any] | None = None
        self.module, self.kind, self.call, self.step = whole.module, whole.kind, whole.call, whole.step
        self.axes, self.skipped, self.instead, self.recomputed = whole.axes, False, None, whole.recomputed

    @property
    def value(self) -> Any:
        if self._given is None:
            self._leaves, self._structure = flatten(self.whole.value)
            first = next((i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)), 0)
            self._given = [self._mine(leaf, i, first) for i, leaf in enumerate(self._leaves)]
            self._versions = [versions(leaf) if isinstance(leaf, Tensor) else None for leaf in self._given]
            self._value = pytree.tree_unflatten(self._given, self._structure)
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        self.value  # noqa: B018  what there is, to compare with
        self.edits, self._value = self._edits_in(new), new

    def _mine(self, leaf: Any, index: int, first: int) -> Any:
        """What the block is given of a leaf."""
        if not isinstance(leaf, Tensor):
            return leaf
        try:
            mine = self.rows.of(leaf)
        except RowsError as error:
            if index == first:
                raise
            return UnknownRows(str(error))
        return mine.clone() if index in self._replaced else mine

    def note_edits(self) -> None:
        """Bring `edits` up to date.

        An edit is what has been assigned, also into a tuple or dict; what has been changed in place, where the rows could not be a
        view; and what may yet get a gradient, which a view that was only read would not.
        """
        if self._given is not None:
            self.edits = self._edits_in(self._value)

    def _edits_in(self, value: Any) -> list[Edit]:
        leaves, structure = flatten(value)
        if structure != self._structure:
            raise AssignmentError(f"The value is a {self._structure}; what was assigned is a {structure}.")
        assert self._given is not None
        edits = []
        for i, (new, given) in enumerate(zip(leaves, self._given, strict=True)):
            whole = self._leaves[i]
            if new is not given and isinstance(whole, Tensor):
                self.rows.check(whole, new)
                edits.append(Edit(i, new))
            elif isinstance(given, Tensor) and given is not whole:
                copied = given.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
                changed = copied and versions(given) != self._versions[i]
                if changed or (given.requires_grad and not self.recomputed):
                    edits.append(Edit(i, given, only_read=not changed))
        return edits


def merge(slot: Slot, views: Iterable[RowSlot]) -> None:
    """Make what several blocks have edited of their rows of a slot in its value."""
    parts: dict[int, list[tuple[Rows, Tensor]]] = {}
    for view in views:
        for edit in view.edits:
            parts.setdefault(edit.leaf, []).append((view.rows, edit.new))
    if parts:
        leaves, structure = flatten(slot.value)
        for leaf, new in parts.items():
            leaves[leaf] = merged(leaves[leaf], new)
        slot.value = pytree.tree_unflatten(leaves, structure)
