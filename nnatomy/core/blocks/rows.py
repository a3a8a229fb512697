"""Rows: what one block sees and edits of a batch that several blocks have been joined in.

A tensor's rows are found by its shape: batch first, batch second, or batch and positions in one axis (as routers and
experts of a mixture of experts see them). Positions that only pad the block's prompts on the left are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.core.points import Slot, described, versions
from nnatomy.errors import AssignmentError, RowsError

#: How many entries torch computes in one thread (its GRAIN_SIZE is 32,768).
_SERIAL = 1 << 14


class Rows(NamedTuple):
    """The rows `start` to `stop` of a `batch` of prompts of `seq` positions, the first `pad` of them padding.

    `axes`: those that may be of positions; any of that size if None.
    """

    start: int
    stop: int
    batch: int
    seq: int
    pad: int = 0
    axes: tuple[int, ...] | None = None

    def times(self, batch: int) -> Rows:
        """The same where each prompt has several rows (num_return_sequences, beams), of `batch` in all."""
        times = batch // self.batch
        if times < 2 or batch % self.batch:
            return self
        return self._replace(start=self.start * times, stop=self.stop * times, batch=batch)

    def of(self, tensor: Tensor) -> Tensor | None:
        """These rows of a tensor, as a view where that can be. None: the tensor has no rows (one for all).

        Raises:
            RowsError: if nobody can tell.
        """
        view = self._view(tensor)
        if view is None or view.ndim == tensor.ndim:
            return view
        return view[0] if len(view) == 1 else view.flatten(0, 1)

    def _view(self, tensor: Tensor) -> Tensor | None:
        """These rows as a view; where the batch shares an axis, with an axis of its own."""
        shape = tensor.shape
        if tensor.ndim == 0 or (shape[0] == 1 != self.batch):
            return None
        mine = slice(self.start, self.stop)
        if shape[0] == self.batch:
            return self._unpadded(tensor[mine], 1)
        if shape[0] == self.batch * self.seq:
            return self._unpadded(tensor.unflatten(0, (self.batch, self.seq))[mine], 1)
        if tensor.ndim > 1 and shape[1] == self.batch:
            return self._unpadded(tensor[:, mine], 2)
        if shape[0] % self.batch == 0 and tensor.ndim > 2:  # batch and heads in one axis
            return self._unpadded(tensor.unflatten(0, (self.batch, -1))[mine], 2)
        if shape[0] == self.seq or not tensor.is_floating_point():
            return None
        raise RowsError(
            f"A tensor of shape {tuple(shape)} in a batch of {self.batch} prompts of {self.seq} positions: nobody "
            "can tell which of its rows are this block's. Read it in a block without a prompt "
            "(`with tracer.invoke():`), which sees the whole batch."
        )

    def _unpadded(self, tensor: Tensor, first: int) -> Tensor:
        if self.pad:
            if self.axes == (1,) and tensor.ndim > 3:
                raise RowsError(
                    f"In a later step of a generation without a KV cache nobody can tell which axes of a tensor of shape "
                    f"{tuple(tensor.shape)} hold padded positions. Read it in a block without a prompt, or give prompts "
                    "of one length."
                )
            for axis in range(first, tensor.ndim):
                may_be = self.axes is None or axis in self.axes or axis - tensor.ndim in self.axes
                if may_be and tensor.shape[axis] == self.seq:
                    tensor = tensor.narrow(axis, self.pad, self.seq - self.pad)
        return tensor

    def put(self, whole: Tensor, mine: Any, in_place: bool = False) -> Tensor:
        """`whole` with these rows replaced, in a new tensor or in place."""
        old = self.of(whole)
        if not isinstance(mine, Tensor) or old is None or old.shape != mine.shape:
            was = "one tensor for all prompts" if old is None else described(old)
            raise AssignmentError(
                f"This block's rows of the value are {was}; what was assigned is {described(mine)}."
            )
        if mine.dtype != whole.dtype or mine.device != whole.device:
            raise AssignmentError(
                f"The value is {whole.dtype} on {whole.device}; what was assigned is {mine.dtype} on {mine.device}."
            )
        if old.shape == whole.shape:
            return mine
        new = whole if in_place else _copy(whole)
        place = self._view(new)
        assert place is not None
        place.copy_(mine.reshape(place.shape))
        return new


def is_opaque(value: Any) -> bool:
    """Whether it is a leaf for us: not a KV cache's contents, which are the model's own."""
    return not isinstance(value, (tuple, list, dict))


_TENSOR = pytree.tree_structure(0)


def _flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Its leaves and its structure. Most values are one tensor, of which pytree takes as long as of a tree."""
    return ([value], _TENSOR) if isinstance(value, Tensor) else pytree.tree_flatten(value, is_leaf=is_opaque)


def _unflatten(leaves: list[Any], structure: pytree.TreeSpec) -> Any:
    return leaves[0] if structure is _TENSOR else pytree.tree_unflatten(leaves, structure)


def _leaves_in(value: Any, structure: pytree.TreeSpec) -> list[Any]:
    leaves, same = _flatten(value)
    if same != structure:
        raise AssignmentError(f"The value is a {structure}; what was assigned is a {same}.")
    return leaves


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


class RowSlot(Slot):
    """A slot as one block sees it: its own rows."""

    __slots__ = ("_given", "_leaves", "_rows", "_structure", "_value", "_versions", "replace_output", "whole")

    def __init__(self, whole: Slot, rows: Rows, replace_output: Any) -> None:
        self.whole = whole
        self.replace_output = replace_output
        self._rows = rows
        self._given: list[Any] | None = None
        self.module, self.kind, self.call, self.step = whole.module, whole.kind, whole.call, whole.step
        self.skipped = whole.skipped

    @property
    def value(self) -> Any:
        if self._given is None:
            self._leaves, self._structure = _flatten(self.whole.value)
            first = next((i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)), 0)
            self._given = [self._mine(leaf, i == first) for i, leaf in enumerate(self._leaves)]
            self._versions = [versions(leaf) if isinstance(leaf, Tensor) else None for leaf in self._given]
            self._value = _unflatten(self._given, self._structure)
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        given = self._given
        self.settle()
        leaves, structure = _flatten(self.whole.value)
        mine = _leaves_in(new, structure)
        for i, (leaf, part) in enumerate(zip(leaves, mine, strict=True)):
            if isinstance(leaf, Tensor) and not (given and part is given[i]):
                leaves[i] = self._put(leaf, part)
        self.whole.value = _unflatten(leaves, structure)
        self._given = None

    def _mine(self, leaf: Any, is_first: bool) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        try:
            mine = self._rows.of(leaf)
        except RowsError as error:
            if is_first:
                raise
            return UnknownRows(str(error))
        return leaf if mine is None else mine

    def settle(self) -> None:
        """Make in-place edits of what had to be copied to be given; go on with what is to get a gradient."""
        if self._given is None:
            return
        leaves, changed = self._leaves, False  # nobody else has been at work since
        given_then, self._given = self._given, None
        now = _leaves_in(self._value, self._structure)
        for i, (leaf, given, version) in enumerate(zip(leaves, given_then, self._versions, strict=True)):
            if now[i] is not given and isinstance(leaf, Tensor):  # put into a dict or list
                leaves[i] = self._put(leaf, now[i])
                changed = True
                continue
            if not isinstance(given, Tensor) or given is leaf:
                continue
            # Where another block's rows have one, `requires_grad_()` does not show.
            gradient = _awaits_gradient(given) or (given.requires_grad and self._is_fresh(leaf))
            if gradient or (versions(given) != version and not _shares(given, leaf)):
                leaves[i] = self._put(leaf, given)
                changed = True
        if changed:
            self.whole.value = _unflatten(leaves, self._structure)
        del self._leaves, self._value

    def _put(self, leaf: Tensor, mine: Any) -> Tensor:
        # What autograd has recorded must not change. (A new tensor for each of many blocks costs: its pages are new.)
        fresh = self._is_fresh(leaf) and not torch.is_grad_enabled()
        new = self._rows.put(leaf, mine, in_place=fresh)
        if new is not leaf and new is not mine:
            self.whole.fresh = (*self.whole.fresh, new)
        return new

    def _is_fresh(self, leaf: Tensor) -> bool:
        return any(leaf is other for other in self.whole.fresh)

    def skip(self, value: Any) -> None:
        self.replace_output(value)


def _copy(whole: Tensor) -> Tensor:
    """A clone; where it can be, in pieces too small for this thread to start OpenMP's helpers (see `openmp`)."""
    if whole.requires_grad or whole.device.type != "cpu" or not whole.is_contiguous():
        return whole.clone()
    new = torch.empty_like(whole)
    for piece, part in zip(whole.view(-1).split(_SERIAL), new.view(-1).split(_SERIAL), strict=True):
        part.copy_(piece)
    return new


def _shares(view: Tensor, whole: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _awaits_gradient(rows: Tensor) -> bool:
    """Whether a block has asked for the gradient of its rows, which as a view no result is computed from."""
    return rows.requires_grad and (rows.is_leaf or rows.retains_grad or bool(rows._backward_hooks))
