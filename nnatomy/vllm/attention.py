"""Keys and values of all positions so far, and the pattern, which the engine's kernels never hold: rebuilt of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnatomy.core.points import Collector, Slot
from nnatomy.errors import AssignmentError, NotInThisModelError
from nnatomy.vllm.cache import PagedCache
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.places import HeadsPlace, Place
from nnatomy.vllm.run import Once

#: Why keys and values of a later step are only read.
LATER = (
    "in a later step those of the earlier positions are in the engine's cache. Assign them in the step that computes them, or "
    "assign attention_probabilities or heads_output"
)


@dataclass(frozen=True)
class KeysPlace(HeadsPlace):
    """(batch, kv_head, key, head_dim): of this step's tokens what the attention is given, of those before what its cache has.

    What is assigned is for this step's attention alone, as with Transformers: the cache then gets what it would have had.
    """

    which: int = 0  #: 0 for keys, 1 for values

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        if any(layout.before) and any(map(PagedCache.of(self.module).gone, layout.before)):
            raise NotInThisModelError(
                f"{('keys', 'values')[self.which]} of this layer, in this step: it looks back over a window of "
                f"{self.module.sliding_window}, and the engine has let go of blocks before it. Read them in earlier steps; "
                "attention_probabilities are there."
            )
        return self.in_window(slot, layout)

    def in_window(self, slot: Slot, layout: Layout) -> Tensor:
        """The same, with zeros where the engine has let go of what is before a window."""
        here = layout.rows(self.flat(slot.value)).transpose(1, 2)
        if not any(layout.before):
            return here
        inner: Any = self.module
        cached = PagedCache.of(inner).read(self.which, layout)
        rows = []
        for i, (before, length) in enumerate(zip(layout.before, layout.lengths, strict=True)):
            row = torch.cat([cached[i][:before].transpose(0, 1), here[i, :, layout.seq - length :]], dim=1)
            rows.append(torch.nn.functional.pad(row, (0, 0, layout.so_far - row.shape[1], 0)))
        return torch.stack(rows)

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> Once:  # type: ignore[override]
        if any(layout.before):
            raise AssignmentError(f"{('keys', 'values')[self.which]}: {LATER}.")
        keeps = _KeepsCache(slot)
        super().write(slot, layout, new)
        return keeps


@dataclass(frozen=True)
class PatternPlace(Place):
    """Scores, pattern, or weighted values: (batch, head, query, key, ...), made of what the engine's attention is given.

    One that is assigned takes the place of the kernel's: what the heads give is the sum that it says.
    """

    what: str = "attention_probabilities"

    def read(self, slot: Slot, layout: Layout) -> Tensor:
        scores, values = self._parts(slot, layout)
        if self.what == "attention_scores":
            return scores.to(values.dtype)
        pattern = self._pattern(scores, layout).to(values.dtype)
        return pattern if self.what == "attention_probabilities" else pattern[..., None] * values[:, :, None]

    def write(self, slot: Slot, layout: Layout, new: Tensor) -> Once:
        new = new.detach()
        if self.what == "values_weighted":
            heads = new.sum(3)
        else:
            _, values = self._parts(slot, layout)
            pattern = self._pattern(new.float(), layout).to(values.dtype) if self.what == "attention_scores" else new
            heads = pattern @ values
        return _HeadsOutput(slot, layout, heads.transpose(1, 2))

    def _parts(self, slot: Slot, layout: Layout) -> tuple[Tensor, Tensor]:
        """The scores, in single precision, and the values of each head."""
        inner: Any = self.module
        heads, shared = inner.num_heads, inner.num_kv_heads
        queries = HeadsPlace(inner, "input", path=(0, 0), heads=heads, size=inner.head_size).read(slot, layout)
        keys = KeysPlace(inner, "input", path=(0, 1), heads=shared, size=inner.head_size).in_window(slot, layout)
        values = KeysPlace(inner, "input", path=(0, 2), heads=shared, size=inner.head_size_v, which=1).in_window(
            slot, layout
        )
        keys, values = (one.repeat_interleave(heads // shared, 1) for one in (keys, values))
        impl = inner.impl
        scores = queries.float() @ keys.float().transpose(-1, -2) * impl.scale
        if cap := getattr(impl, "logits_soft_cap", None):
            scores = cap * torch.tanh(scores / cap)
        distance = _distance(layout).to(scores.device)
        if (slopes := getattr(impl, "alibi_slopes", None)) is not None:
            scores = scores - slopes.to(scores)[:, None, None] * distance[:, None]
        hidden = distance < 0
        if (window := inner.sliding_window) is not None and window > 0:
            hidden = hidden | (distance >= window)
        hidden = hidden | ~layout.mask_so_far[:, None].to(scores.device)
        return scores.masked_fill(hidden[:, None], float("-inf")), values

    def _pattern(self, scores: Tensor, layout: Layout) -> Tensor:
        sinks = getattr(self.module.impl, "sinks", None)
        if sinks is not None:
            column = sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
            pattern = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            pattern = scores.softmax(-1)
        padding = ~layout.mask[:, None, :, None].to(scores.device)
        return pattern.masked_fill(padding, 0)


def _distance(layout: Layout) -> Tensor:
    """(batch, query, key): how far a key is before the query; padded on the left as both are."""
    query = torch.arange(layout.so_far - layout.seq, layout.so_far)
    key = torch.arange(layout.so_far)
    return (query[:, None] - key[None]).expand(layout.batch, -1, -1)


class _KeepsCache(Once):
    """Writes into the cache what it would have had without edits of keys and values, when the attention is done."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot.module, "output", (slot.call, slot.step))
        self._given = [one.clone() for one in slot.value[0][1:3]]

    def is_done_by(self, other: Collector) -> bool:
        return isinstance(other, _KeepsCache) and (other.modules, other.call) == (self.modules, self.call)

    def act(self, slot: Slot) -> None:
        from vllm.model_executor.layers.attention.attention import get_attention_context

        inner: Any = slot.module
        _, _, cache, slots = get_attention_context(inner.layer_name)
        keys, values = self._given
        inner.impl.do_kv_cache_update(
            inner,
            keys.reshape(-1, inner.num_kv_heads, inner.head_size),
            values.reshape(-1, inner.num_kv_heads, inner.head_size_v),
            cache,
            slots,
        )


class _HeadsOutput(Once):
    """Puts what the heads give in the place of what the kernel gives."""

    def __init__(self, slot: Slot, layout: Layout, heads: Tensor) -> None:
        super().__init__(slot.module, "output", (slot.call, slot.step))
        self._layout, self._heads = layout, heads

    def act(self, slot: Slot) -> None:
        whole = slot.value.reshape(len(slot.value), *self._heads.shape[2:])
        slot.value = self._layout.put(whole, self._heads).reshape(slot.value.shape)
