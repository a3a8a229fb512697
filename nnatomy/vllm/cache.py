"""What the engine's paged cache has of the positions before a step.

Each backend lays keys and values out in its own way, some entry by entry. So nothing here knows a layout: a scratch cache is written
by the backend's own function, with numbers that say which entry is which, and where they are found is where the entries are.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nnatomy.errors import NotInThisModelError
from nnatomy.vllm.layout import Layout

#: Numbers up to this are exact in every dtype of a cache that can be read.
_BASE = 128
_known: WeakKeyDictionary[Any, PagedCache] = WeakKeyDictionary()


class PagedCache:
    """The cache of one of the engine's attentions.

    Attributes:
        entries: of keys and of values, (position in a block, kv_head, head_dim) to where that is in a block's memory.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._size = _block_size(inner)
        self.entries = [self._find(which) for which in (0, 1)]

    @classmethod
    def of(cls, inner: Any) -> PagedCache:
        """That of an attention, looked at once. Raises NotInThisModelError where it cannot be read."""
        if inner not in _known:
            _known[inner] = cls(inner)
        return _known[inner]

    def gone(self, before: int) -> int:
        """How many of so many positions the engine has let go of: in blocks before a window, which other prompts write over."""
        return max(0, before + 1 - (self._inner.sliding_window or before + 1)) // self._size * self._size

    def read(self, which: int, layout: Layout) -> list[Tensor]:
        """Of each row (position, kv_head, head_dim): its keys (0) or values (1) of the steps before; of those that are gone zeros."""
        from vllm.forward_context import get_forward_context

        inner, size = self._inner, self._size
        table = get_forward_context().attn_metadata[inner.layer_name].block_table
        entries = self.entries[which]
        found = []
        for order, before in zip(layout.order, layout.before, strict=True):
            blocks = table[order][: -(-before // size)].long()
            memory = inner.kv_cache[blocks].flatten(1)  # of a row that has just begun there are none
            row = memory[:, entries.flatten()].reshape(-1, *entries.shape[1:])[:before]
            row[: self.gone(before)] = 0
            found.append(row)
        return found

    def _find(self, which: int) -> Tensor:
        inner, size = self._inner, self._size
        cache = inner.kv_cache
        if not cache.is_floating_point() or cache.element_size() < 2:
            raise NotInThisModelError(
                f"keys and values of earlier steps: the engine's cache is of {cache.dtype}, which is rounded."
            )
        width = inner.head_size_v if which else inner.head_size
        shape = size, inner.num_kv_heads, width
        numbers = torch.arange(size * inner.num_kv_heads * width, device=cache.device)
        place = torch.zeros(cache[0].numel(), dtype=torch.long, device=cache.device)
        seen = torch.zeros_like(place, dtype=torch.bool)
        for digit in range(3):
            scratch = torch.zeros_like(cache[:2])
            digits = (numbers // _BASE**digit) % _BASE + 1
            given = [torch.zeros(size, inner.num_kv_heads, one, dtype=inner.dtype, device=cache.device)
                     for one in (inner.head_size, inner.head_size_v)]  # fmt: skip
            given[which] = digits.to(inner.dtype).reshape(shape)
            slots = torch.arange(size, 2 * size, device=cache.device)
            with torch.no_grad():
                inner.impl.do_kv_cache_update(inner, *given, scratch, slots)
            memory = scratch[1].reshape(-1)
            seen |= memory != 0
            place += (memory.long() - 1).clamp(min=0) * _BASE**digit
        where = seen.nonzero().flatten()
        entries = torch.full((len(numbers),), -1, dtype=torch.long, device=cache.device)
        if len(where) == len(numbers):
            entries[place[where]] = where
        if bool((entries < 0).any()):
            raise NotInThisModelError(
                f"keys and values of earlier steps: the layout of the cache of {type(inner.impl).__name__} is not one entry for each."
            )
        return entries.reshape(shape)


def _block_size(inner: Any) -> int:
    """How many positions a block has: those of a cache's block that its keys and values fill."""
    of_one = inner.num_kv_heads * (inner.head_size + inner.head_size_v)
    return int(inner.kv_cache[0].numel()) // of_one
