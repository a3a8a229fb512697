"""Which token of a step is whose: the engine has the tokens of all requests in one axis, and names have rows of prompts.

A row is a request that takes part in the step, in the order of the prompts; its positions are the tokens that the step computes of it
(the whole prompt, a part of it, or the newest token), padded with zeros on the left to those of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Layout:
    """The requests of one step.

    Args:
        requests: which prompt each request is of, in the engine's order.
        starts: where the tokens of each begin in the engine's axis.
        lengths: how many it has in this step.
        before: how many it has had in the steps before.

    Attributes:
        requests, starts, lengths, before: the same in the order of the rows.
        order: of each row, which of the engine's requests it is.
    """

    def __init__(
        self, requests: Sequence[int], starts: Sequence[int], lengths: Sequence[int], before: Sequence[int]
    ) -> None:
        self.order = sorted(range(len(requests)), key=requests.__getitem__)
        self.requests, self.starts, self.lengths, self.before = (
            tuple(one[i] for i in self.order) for one in (requests, starts, lengths, before)
        )

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return len(self.requests)

    @cached_property
    def seq(self) -> int:
        """How many positions the longest row has."""
        return max(self.lengths)

    @cached_property
    def so_far(self) -> int:
        """How many positions it has with those of the steps before."""
        return max(length + before for length, before in zip(self.lengths, self.before, strict=True))

    @cached_property
    def mask(self) -> Tensor:
        """(batch, seq): which positions are tokens and no padding."""
        return _padded_left(self.lengths, self.seq)

    @cached_property
    def mask_so_far(self) -> Tensor:
        """(batch, key): the same of all positions so far."""
        return _padded_left([a + b for a, b in zip(self.lengths, self.before, strict=True)], self.so_far)

    @cached_property
    def _together(self) -> slice | None:
        """Where all rows are, if they are of one length and lie one behind the other in their order."""
        stride = self.seq
        if any(length != stride for length in self.lengths) or any(
            start != self.starts[0] + i * stride for i, start in enumerate(self.starts)
        ):
            return None
        return slice(self.starts[0], self.starts[0] + self.batch * stride)

    @cached_property
    def _index(self) -> Tensor:
        """(batch, seq): where each position is in the engine's axis; of padding anywhere."""
        ends = torch.tensor([start + length for start, length in zip(self.starts, self.lengths, strict=True)])
        index = ends[:, None] - torch.arange(self.seq, 0, -1)
        return torch.where(self.mask, index, torch.zeros_like(index))

    def rows(self, flat: Tensor) -> Tensor:
        """(tokens, ...) to (batch, seq, ...), in memory of its own."""
        if (together := self._together) is not None:
            return flat[together].unflatten(0, (self.batch, self.seq)).clone()
        mask = self.mask.to(flat.device)
        found = flat[self._index.to(flat.device)]
        return found.masked_fill_(~mask.view(*mask.shape, *(1,) * (flat.ndim - 1)), 0)

    def put(self, flat: Tensor, rows: Tensor) -> Tensor:
        """The engine's tensor with other rows, of (batch, seq, ...), in a copy. What stands where padding is goes nowhere."""
        rows = rows.detach()
        if (together := self._together) is not None:
            if len(flat) == self.batch * self.seq:
                return rows.flatten(0, 1).clone()
            result = flat.clone()
            result[together] = rows.flatten(0, 1)
            return result
        mask = self.mask.to(flat.device)
        result = flat.clone()
        result[self._index.to(flat.device)[mask]] = rows[mask]
        return result

    def by_request(self, flat: Tensor) -> Tensor:
        """What the engine has one of for each request, in the order of the rows."""
        return flat[self.order]

    def put_by_request(self, flat: Tensor, rows: Tensor) -> Tensor:
        """The engine's tensor with others of them, in a copy."""
        result = flat.clone()
        result[self.order] = rows.detach()
        return result


def _padded_left(lengths: Sequence[int], width: int) -> Tensor:
    return torch.arange(width, 0, -1)[None] <= torch.tensor(lengths)[:, None]
