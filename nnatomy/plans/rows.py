"""The prompts of a batch, each by itself: which part of a value is a prompt's own, without padding.

What pads a prompt stands at one end of it, so that a prompt's part is a view of the value: what is changed in it in place is changed
in the value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.names import row_of
from nnatomy.standardized.positions import OwnPositions, is_fake, own_positions
from nnatomy.standardized.prompt_trace import tokens_of


class Row:
    """One prompt's part of a batch, or all of it where no prompt is padded.

    Args:
        number: which; None for all.
        columns: those of this step that are its own.
        total: how many positions it has so far.
        width: how many columns the step has.

    Attributes:
        sizes: see `graph.Size`.
    """

    def __init__(self, number: int | None, columns: slice, total: int, width: int) -> None:
        self.number, self._columns, self._width = number, columns, width
        self.sizes = {"seq": columns.stop - columns.start, "key": total}

    def place(self, name: str, value: Tensor, keys: slice | None) -> tuple[slice, ...]:
        """Where its part of the value of a name is.

        Args:
            keys: which of the positions so far are its own; None if all are.
        """
        if self.number is None:
            return ()
        found = []
        axes = ("batch", "key") if name == "attention_mask" else row_of(name).axes
        for axis, size in zip(axes, value.shape, strict=True):
            if axis == "batch":
                found.append(slice(self.number, self.number + 1))
            elif axis in ("seq", "query"):
                found.append(self._own_columns(name, size))
            elif axis == "key" and keys is not None and keys.stop - keys.start != size:
                found.append(keys)
            else:
                found.append(slice(None))
        return tuple(found)

    def _own_columns(self, name: str, size: int) -> slice:
        left_out = self._width - size  # generate, and logits_to_keep, have the last logits alone
        if left_out < 0 or (left_out and name != "logits") or self._columns.stop <= left_out:
            raise InputError(
                f"{name} has {size} positions, and the step {self._width}: nothing says which are which prompt's."
            )
        return slice(max(0, self._columns.start - left_out), self._columns.stop - left_out)


class Rows:
    """The rows of a step, as a plan is done to them.

    Args:
        model: a view of the model whose trace is open.
        together: whether all may be done at once where none is padded.

    Raises:
        InputError: if nothing says which tokens are padding.
    """

    def __init__(self, model: Any, together: bool) -> None:
        arguments, total = model._root_inputs("a plan")
        tokens = tokens_of(arguments)
        batch, width = (1, total) if tokens is None else tokens.shape[:2]
        self.shape = batch, width
        self.ids: Tensor | None = tokens if tokens is None or not tokens.is_floating_point() else None
        self.is_all = width == total  # no cache has earlier positions
        self._model = model
        self._masks: list[list[bool]] = []
        if is_fake(tokens):
            self.own: Any = None
            self.each = [Row(None, slice(0, width), total, width)]
            return
        self.own = own = own_positions(model, "a plan", (batch, width))
        real = (own.own >= 0).tolist()
        totals = (own.own.max(1).values + 1).tolist()
        if (all(map(all, real)) and len({*totals}) == 1 and totals[0] == total) and (together or batch == 1):
            self.each = [Row(None, slice(0, width), total, width)]
        else:
            self.each = [Row(i, _run(one), totals[i], width) for i, one in enumerate(real)]

    def keys(self, row: Row, name: str, value: Tensor) -> slice | None:
        """Which of the positions so far are the row's own, of a value that has such an axis."""
        axes = ("batch", "key") if name == "attention_mask" else row_of(name).axes
        if row.number is None or "key" not in axes:
            return None
        masks = self._masks = self._masks or (self._model.attention_mask != 0).tolist()
        if len(masks[row.number]) != value.shape[axes.index("key")]:
            raise InputError(
                f"{name} has {value.shape[axes.index('key')]} keys, and the attention mask {len(masks[row.number])} columns: nothing "
                "says which are padding. Give each prompt a trace of its own."
            )
        return _run(masks[row.number])

    def chosen(self, where: Any, row: Row) -> Tensor:
        """A mask of (batch, seq): the positions of the row that are meant."""
        if self.own is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self._model.device)
        own: OwnPositions = self.own
        found = own.chosen(where)
        return found if row.number is None else found[row.number : row.number + 1, row._columns]


def _run(real: list[bool]) -> slice:
    """Where the ones are, which stand together."""
    start = real.index(True) if True in real else len(real)
    stop = start + sum(real)
    if not all(real[start:stop]):
        raise InputError(
            "The attention mask leaves out tokens in the midst of a prompt: a plan is of prompts without such."
        )
    return slice(start, stop)
