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

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nnatomy.core.points import Axes, described
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

    def times(self, batch: int) -> Rows:
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
                f"{tuple(apart.shape)} hold padded positions. Read it in a block without a prompt, or give prompts "
                "of one length."
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
            f"A tensor of shape {tuple(shape)} in a batch of {batch} prompts of {seq} positions: nobody "
            "can tell which of its rows are this block's. Read it in a block without a prompt "
            "(`with tracer.invoke():`), which sees the whole batch."
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
