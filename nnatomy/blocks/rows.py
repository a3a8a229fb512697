"""Rows: which part of a joined batch's tensor is one block's.

A tensor's rows are found by its shape, in a batch of B prompts of S positions. The first line that fits decides:

| shape | what it is |
|---|---|
| () or (1, ...) | one for all blocks |
| (B, ...) | prompts first |
| (B * S, ...) | prompts and positions in one axis, as routers and experts see them |
| (S, B, ...) | positions first |
| (B * n, *, *, ...) | prompts and heads in one axis |
| (*, B, ...) | prompts second |
| (S, ...), or whole numbers | one for all blocks |

A tensor that none of the lines fits is refused, and so is one that both "prompts and heads in one axis" and "prompts second" fit.
Positions that only pad the block's prompts on the left are left out.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.core.points import Axes, Slot, described, versions
from nnatomy.errors import AssignmentError, RowsError

#: Where the positions of a stream are: (prompts, positions, width).
FIRST = Axes(here=(1,))


class Rows(NamedTuple):
    """The rows `start` to `stop` of a `batch` of prompts of `seq` positions, the first `pad` of them padding.

    `axes`: which axes of the tensor are of positions; None: any of that size may be. An axis of all positions so far may have more
    places than there are positions (a static cache has them from the beginning) or fewer (a sliding window has let go of the first).
    """

    start: int
    stop: int
    batch: int
    seq: int
    pad: int = 0
    axes: Axes | None = None

    def times(self, batch: int) -> "Rows":
        """The same where each prompt has several rows (num_return_sequences, beams), of `batch` in all."""
        times = batch // self.batch
        if times < 2 or batch % self.batch:
            return self
        return self._replace(start=self.start * times, stop=self.stop * times, batch=batch)

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor, as a view where that can be; the tensor itself if it has no rows (one for all).

        Raises:
            RowsError: if nobody can tell.
        """
        mine = self.part(tensor)
        if mine is None:
            return tensor
        return mine if mine.ndim == tensor.ndim else mine.flatten(0, 1)

    def check(self, whole: Tensor, mine: Any) -> None:
        """Raise AssignmentError unless that can be these rows of the tensor."""
        old = self.of(whole)
        if not isinstance(mine, Tensor) or old is whole or old.shape != mine.shape:
            was = "one tensor for all prompts" if old is whole else described(old)
            raise AssignmentError(f"This block's rows of the value are {was}; what was assigned is {described(mine)}.")
        if mine.dtype != whole.dtype or mine.device != whole.device:
            raise AssignmentError(
                f"The value is {whole.dtype} on {whole.device}; what was assigned is {mine.dtype} on {mine.device}."
            )

    def part(self, tensor: Tensor) -> Tensor | None:
        """These rows of a tensor, without padded positions: a view, where prompts have an axis of their own. None: it has no
        rows."""
        form = self._form(tensor)
        if form is None:
            return None
        apart, axis, others = form
        mine = apart.narrow(axis, self.start, self.stop - self.start)
        if not self.pad:
            return mine
        if self.axes == FIRST and mine.ndim > 3:
            raise RowsError(
                f"In a later step of a generation without a KV cache nobody can tell which axes of a tensor of shape "
                f"{tuple(apart.shape)} hold padded positions. Read it in a block without a prompt, or give prompts of one length."
            )
        for axis in others:
            size, pad = mine.shape[axis], self.pad
            if self.axes is not None and {axis, axis - mine.ndim} & {*self.axes.so_far}:
                pad = max(pad - max(self.seq - size, 0), 0)  # a window has let go of padding first
            elif size != self.seq or (self.axes and not {axis, axis - mine.ndim} & {*self.axes.here}):
                continue
            mine = mine.narrow(axis, pad, size - pad)
        return mine

    def _form(self, tensor: Tensor) -> tuple[Tensor, int, tuple[int, ...]] | None:
        """A tensor with an axis of prompts alone, which axis that is, and which may be of positions. None: it has no rows.
        (See the table above.)"""
        shape, batch, seq = tensor.shape, self.batch, self.seq
        axes = tuple(range(tensor.ndim))
        if tensor.ndim == 0 or (shape[0] == 1 != batch):
            return None
        if shape[0] == batch:
            return tensor, 0, axes[1:]
        second, by_heads = tensor.ndim > 1 and shape[1] == batch, tensor.ndim > 2 and not shape[0] % batch
        if shape[0] == batch * seq and not (second and tensor.ndim > 2):
            return tensor.unflatten(0, (batch, seq)), 0, (*axes[1:], tensor.ndim)
        if second and (shape[0] == seq or not by_heads):
            return tensor, 1, (0, *axes[2:])
        if by_heads and (not second or seq == batch):
            return tensor.unflatten(0, (batch, -1)), 0, (*axes[2:], tensor.ndim)
        if not second and (shape[0] == seq or not tensor.is_floating_point()):
            return None
        raise RowsError(
            f"A tensor of shape {tuple(shape)} in a batch of {batch} prompts of {seq} positions: nobody can tell which of its rows "
            "are this block's. Read it in a block without a prompt (`with tracer.invoke():`), which sees the whole batch."
        )


def merged(whole: Tensor, parts: Sequence[tuple[Rows, Tensor]]) -> Tensor:
    """A tensor with other rows of several blocks in it.

    They are put into one copy: what autograd has recorded is not changed, and a copy for each of many blocks would be kept by what
    each has read.
    """
    if len(parts) == 1 and parts[0][1].shape == whole.shape:
        return parts[0][1]
    result = whole.clone()
    for rows, new in parts:
        mine = rows.part(result)
        assert mine is not None
        mine.copy_(new.reshape(mine.shape))
    return result


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
