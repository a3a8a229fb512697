"""A slot as one of several blocks sees it: its own rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.blocks.rows import Rows, merged
from nnatomy.core.points import Slot, versions
from nnatomy.errors import AssignmentError, RowsError


def is_opaque(value: Any) -> bool:
    """Whether it is a leaf for us: not a KV cache's contents, which are the model's own."""
    return not isinstance(value, (tuple, list, dict))


def _flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(value, is_leaf=is_opaque)


class UnknownRows:
    """Stands among a module's further arguments or results where nobody can tell which rows are the block's."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RowsError(self._why)

    def __repr__(self) -> str:
        return f"<{self._why}>"


class Edit(NamedTuple):
    """Other rows for one leaf of a slot's value. `only_read`: the same rows, put there for the gradient that they may get."""

    leaf: int
    rows: Rows
    new: Tensor
    only_read: bool = False


def merge(slot: Slot, edits: Iterable[Edit]) -> None:
    """Make the edits of several blocks in a slot's value."""
    by_leaf: dict[int, list[tuple[Rows, Tensor]]] = {}
    for edit in edits:
        by_leaf.setdefault(edit.leaf, []).append((edit.rows, edit.new))
    if by_leaf:
        leaves, structure = _flatten(slot.value)
        for leaf, parts in by_leaf.items():
            leaves[leaf] = merged(leaves[leaf], parts)
        slot.value = pytree.tree_unflatten(leaves, structure)


class RowSlot(Slot):
    """One block's rows of a slot; what the block edits of them is in `edits()`."""

    __slots__ = (
        "_given",
        "_leaves",
        "_replaced",
        "_rows",
        "_skip",
        "_structure",
        "_value",
        "_versions",
        "whole",
    )

    def __init__(
        self,
        whole: Slot,
        rows: Rows,
        skip: Callable[[Any], None] | None = None,
        replaced: Collection[int] = (),
    ) -> None:
        """
        Args:
            skip: what skips the module for these rows.
            replaced: the leaves that other blocks have put rows of their own in, which are not there yet. What is changed in
                place in such a one is no change of the tensor that the model has made.
        """
        self.whole = whole
        self._rows = rows
        self._skip = skip
        self._replaced = replaced
        self._given: list[Any] | None = None
        self.module, self.kind, self.call, self.step = whole.module, whole.kind, whole.call, whole.step
        self.axes, self.skipped, self.recomputed = whole.axes, whole.skipped, whole.recomputed

    @property
    def value(self) -> Any:
        if self._given is None:
            self._leaves, self._structure = _flatten(self.whole.value)
            first = next((i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)), 0)
            self._given = [self._mine(leaf, i, first) for i, leaf in enumerate(self._leaves)]
            self._versions = [versions(leaf) if isinstance(leaf, Tensor) else None for leaf in self._given]
            self._value = pytree.tree_unflatten(self._given, self._structure)
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        self.value  # noqa: B018  what there is, to compare with
        for i, leaf, mine in self._assigned(new):
            if isinstance(leaf, Tensor):
                self._rows.check(self._leaves[i], mine)
        self._value = new

    def _mine(self, leaf: Any, place: int, first: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        try:
            mine = self._rows.of(leaf)
        except RowsError as error:
            if place == first:
                raise
            return UnknownRows(str(error))
        if mine is not None and place in self._replaced:
            mine = mine.clone()
        return leaf if mine is None else mine

    def _assigned(self, value: Any) -> list[tuple[int, Any, Any]]:
        """Which leaves of a value are others than were given: where, the whole's, and the new one."""
        leaves, structure = _flatten(value)
        if structure != self._structure:
            raise AssignmentError(f"The value is a {self._structure}; what was assigned is a {structure}.")
        assert self._given is not None
        both = zip(leaves, self._given, strict=True)
        return [(i, self._leaves[i], new) for i, (new, given) in enumerate(both) if new is not given]

    def edits(self) -> list[Edit]:
        """What has been edited: assigned, also into a tuple or dict; changed in place, where the rows could not be
        a view; or may yet get a gradient, which a view that was only read would not."""
        if self._given is None:
            return []
        found = []
        for i, leaf, new in self._assigned(self._value):
            if isinstance(leaf, Tensor):
                self._rows.check(leaf, new)
                found.append(Edit(i, self._rows, new))
        assigned = {edit.leaf for edit in found}
        for i, (leaf, given, version) in enumerate(
            zip(self._leaves, self._given, self._versions, strict=True)
        ):
            if isinstance(given, Tensor) and given is not leaf and i not in assigned:
                copied = given.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
                changed = copied and versions(given) != version
                if changed or (given.requires_grad and not self.recomputed):
                    found.append(Edit(i, self._rows, given, only_read=not changed))
        return found

    def merge(self) -> None:
        """Make the edits in the whole at once."""
        merge(self.whole, self.edits())
        self._given = None

    def skip(self, value: Any) -> None:
        """The module runs for the other blocks; this one's rows of its output are `value`."""
        assert self._skip is not None
        self._skip(value)
