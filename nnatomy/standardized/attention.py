"""The inside of any attention module, found while its forward runs.

What multiplies the values is the pattern. Inside one call of an attention module, a
`TorchFunctionMode` follows the result of a softmax through casts, dropouts, slices and reshapes to
the first matrix product that takes it: that operand is the pattern, whatever the architecture, with
attention sinks too. The other operand is the values, and the result what each head gives. What went
into the softmax is the scores; the product that they come of is that of queries and keys. Another tensor
put in the place of any of them is what the model goes on with.

Scaled-dot-product attention (SDPA) is given queries, keys and values, and gives what each head does; it never
holds its pattern. Its output stays the model's own, bit for bit; scores and pattern are computed aside, by
SDPA's definition from the same query, key, value and mask, and take effect only if they are assigned, changed in
place, or asked to keep their gradient.

In one call they come in this order: queries, keys, values, scores, probabilities, weighted values, what the heads give. (Values
after the probabilities, where hand-written code calls them by no name that shows.)

A fused kernel that torch does not see (flash attention) has none of them to find.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.core.frames import is_ours
from nnatomy.core.gates import is_gate
from nnatomy.core.points import Axes, Report
from nnatomy.names import TABLE
from nnatomy.standardized.record import leaves_of
from nnatomy.standardized.sdpa import (
    as_taken,
    aside_of,
    awaits_gradient,
    same_bits,
    sdpa_pattern,
    sdpa_scores,
    wide,
)

#: By attention module, the module in it that queries and keys are multiplied in.
_scored_in: WeakKeyDictionary[Module, ref[Module]] = WeakKeyDictionary()

#: What is found, and which of its axes are of positions.
KINDS = {row.kind: Axes(row.here, row.so_far) for row in TABLE if row.place == "attention"}
#: What a pattern is computed aside for, beside scores.
_OF_PATTERNS = ("attention_probabilities", "values_weighted")
_SOFTMAX: frozenset[Any] = frozenset((F.softmax, torch.softmax, Tensor.softmax, torch._softmax))
_EINSUM: frozenset[Any] = frozenset((torch.einsum, torch.functional.einsum))
_PRODUCT: frozenset[Any] = _EINSUM | {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
}
#: What arranges entries, or repeats them for neighbouring heads, and computes nothing, by the function's name.
_ARRANGING = frozenset(
    (
        *("transpose", "permute", "swapaxes", "view", "view_as", "reshape", "flatten", "unflatten"),
        *("unsqueeze", "squeeze", "expand", "expand_as", "repeat_interleave", "__getitem__"),
        *("contiguous", "to", "type", "float", "half", "bfloat16"),
    )
)


class _Arranged(NamedTuple):
    """How a tensor came of another one by arranging its entries."""

    result: Tensor  # kept alive so that no identity is used twice
    source: Tensor
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class AttentionMode(TorchFunctionMode):
    """Find the inside of the attention in one call of a module and report it to `report`.

    Args:
        heads: how many query heads there are; None if that varies.
        split: how they are split over processes, if they are: see `nnatomy.parallel.split`.

    Attributes:
        module: the attention.
        keys: how many keys there were in the newest sum of values.
    """

    keys = 0

    def __init__(self, heads: int | None, module: Module, report: Report, split: Any = None) -> None:
        super().__init__()
        self._heads = heads if split is None else split.heads(module, heads)
        self._split = split
        self.module = module
        self._report = report
        self._arranged: dict[int, _Arranged] = {}
        self._begin()

    def _begin(self) -> None:
        #: What has come of the product of queries and keys, and of the softmax, by identity; kept alive.
        self._scores: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._product: tuple[Tensor, Tensor] | None = None
        self._is_scored = False  # whether the softmax was that of this product
        self._early: tuple[Tensor, Tensor | None] | None = None  # values shown before the scores, and what for them
        self._arranged.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            result = self._sdpa(*args, **kwargs)
            self._begin()
            return result
        if func in _PRODUCT:
            left, right = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)][-2:]
            if self._product is None and id(left) not in self._weights and self._may_score(func, left, right):
                return self._score(func, args, kwargs, left, right)
            if id(left) in self._weights or id(right) in self._weights:
                result = self._weigh(func, args, kwargs, left, right)
                self._begin()
                return result
        if func in _SOFTMAX:
            return self._soften(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.ndim >= 3:
            self._follow(result, func, args, kwargs)
        return result

    def _follow(self, result: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = leaves_of(args, kwargs) if self._scores or self._weights else ()
        for followed in (self._scores, self._weights):
            if any(id(leaf) in followed for leaf in leaves):
                followed[id(result)] = result
        if func.__name__ in _ARRANGING and isinstance(args[0], Tensor) and args[0] is not result:
            self._arranged[id(result)] = _Arranged(result, args[0], func, args, kwargs)

    # The model's own steps.

    def _may_score(self, func: Any, left: Tensor, right: Tensor) -> bool:
        """Whether it has the form of the product of queries and keys."""
        if func in _EINSUM or left.ndim < 3 or left.ndim != right.ndim:
            return False
        if isinstance(left, Parameter) or isinstance(right, Parameter) or left.shape[-1] != right.shape[-2]:
            return False
        if left.shape[-1] == 1:  # frequencies by positions: some compute their rotary embedding inside
            return False
        if self._heads is not None and (
            left.shape[0] % self._heads if left.ndim == 3 else left.shape[1] != self._heads
        ):
            return False
        # Not in a module within that chooses keys, say: its positions may be as many as there are heads.
        known = _scored_in.get(self.module)
        if known is None and self._heads is None:
            known = ref(self.module)
        return known is None or known() is _innermost_module()

    def _note_where(self) -> None:
        if self.module not in _scored_in and (inside := _innermost_module()) is not None:
            _scored_in[self.module] = ref(inside)

    def _score(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], left: Tensor, right: Tensor) -> Tensor:
        self._product = left, right
        self._note_where()
        self._weights.clear()  # of a softmax before, which weighs what keys are made of (DeepSeek-V4)
        query = self._show("queries", left)
        key = self._show_shared("keys", right, transposed=True)
        early = self._local_values(right.shape[-1])
        if early is not None:
            awaited = self._report.awaited("values")
            self._early = early, self._show_shared("values", early) if awaited else None
        args, kwargs = _replaced((args, kwargs), {id(left): query, id(right): key})
        result: Tensor = func(*args, **kwargs)
        self._scores[id(result)] = result
        return result

    def _soften(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        scored = id(given) in self._scores
        by_heads = given.ndim >= 3 and by_head(given, self._heads).shape[1] == (self._heads or given.shape[1])
        if by_heads and (scored or self._product is None):
            self._is_scored = scored
            chosen = self._show("attention_scores", given)
            args, kwargs = _replaced((args, kwargs), {id(given): chosen})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.ndim >= 3:
            self._weights[id(result)] = result
        return result

    def _weigh(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], left: Tensor, right: Tensor) -> Tensor:
        first = id(left) in self._weights
        pattern, value = (left, right) if first else (right, left)
        if self._product is not None and not self._is_scored and first:  # it was another product
            self._show("queries", self._product[0])
            self._show_shared("keys", self._product[1], transposed=True)
        put = {id(pattern): self._show("attention_probabilities", pattern)}
        known = func not in _EINSUM and first
        if known:
            put[id(value)] = self._late_values(value)
        args, kwargs = _replaced((args, kwargs), put)
        result: Tensor = func(*args, **kwargs)
        if not known:
            return result
        self.keys = pattern.shape[-1]
        return self._show("heads_output", self._show_weighted(put[id(pattern)], put[id(value)], result))

    def _late_values(self, value: Tensor) -> Tensor:
        if self._early is not None:
            early, chosen = self._early
            if early is value or any(step.source is early for step in self._steps(value)):
                return value if chosen is None else self._again(value, early, chosen)
        return self._show_shared("values", value)

    def _local_values(self, keys: int) -> Tensor | None:
        """What the code that is at the product of queries and keys calls its values.

        A name alone; that it is what the pattern multiplies shows when it does. Code that has no such name gives
        them then.
        """
        for frame in _model_frames():
            for name, local in frame.f_locals.items():
                is_tensor = isinstance(local, Tensor) and local.is_floating_point()
                if name.startswith("v") and is_tensor and local.ndim in (3, 4) and local.shape[-2] == keys:
                    return local
        return None

    # SDPA.

    def _sdpa(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*kv_batch key dim"],
        value: Float[Tensor, "*kv_batch key v_dim"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self._note_where()
        query = self._show("queries", query)
        key = self._show_shared("keys", key)
        value = self._show_shared("values", value)
        groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
        pattern, changed = self._aside(query, key, attn_mask, is_causal, scale, groups)
        if not changed:
            result = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        else:
            assert pattern is not None
            with aside_of(value):
                pattern = F.dropout(pattern, dropout_p)
                result = (wide(pattern) @ wide(value).repeat_interleave(groups, -3)).to(pattern.dtype)
        self.keys = key.shape[-2]
        if pattern is not None:
            result = self._show_weighted(pattern, value, result)
        return self._show("heads_output", result)

    def _aside(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        groups: int,
    ) -> tuple[Tensor | None, bool]:
        """The pattern, where anybody waits for something that it is in, and whether it or its scores have been changed."""
        awaited = self._report.awaited("attention_scores")
        if not awaited and not any(map(self._report.awaited, _OF_PATTERNS)):
            return None, False
        query, key = as_taken(query), as_taken(key)
        with aside_of(query):
            scores = sdpa_scores(query, key.repeat_interleave(groups, -3), mask, is_causal, scale)
        changed = False
        if awaited:
            scores, changed = self._offer("attention_scores", scores)
            if not changed and not any(map(self._report.awaited, _OF_PATTERNS)):
                return None, False
        with aside_of(query):
            pattern = sdpa_pattern(scores, is_masked=is_causal or mask is not None).to(query.dtype)
        if self._report.awaited("attention_probabilities"):
            pattern, also = self._offer("attention_probabilities", pattern)
            changed = changed or also
        return pattern, changed

    def _offer(self, kind: str, computed: Tensor) -> tuple[Tensor, bool]:
        """Show what has been computed aside; what has been made of it, and whether anything has.

        An edit through `.data` or `.numpy()` leaves no mark on the tensor, so that it is compared with a copy.
        """
        before = computed.detach().clone()
        with torch._C.DisableTorchFunction():
            shown = by_head(computed, self._heads)
        chosen = self._reported(kind, shown, aside=True)
        with torch._C.DisableTorchFunction():
            changed = chosen is not shown or awaits_gradient(shown) or not same_bits(computed, before)
            return (chosen.reshape(computed.shape) if changed else computed), changed

    # Showing.

    def _reported(self, kind: str, shown: Tensor, *, aside: bool = False) -> Tensor:
        """Report it; what to go on with."""
        if self._split is not None:
            return self._split.show_heads(self._report, shown, kind, KINDS[kind], aside)
        return self._report(shown, kind, KINDS[kind]).value

    def _show(self, kind: str, own: Tensor) -> Tensor:
        """Show a tensor of query heads as the standard name has it; what to go on with, in the model's form.

        Going on with what has been shown, and not with what it is a view of, is what lets a gradient reach it.
        """
        if not self._report.awaited(kind):
            return own
        with torch._C.DisableTorchFunction():
            cut = own[..., : self._product[1].shape[-1]] if kind == "attention_scores" and self._product else own
            shown = by_head(cut, self._heads)
            if kind == "heads_output":
                shown = shown.transpose(-3, -2)
        chosen = self._reported(kind, shown)
        with torch._C.DisableTorchFunction():
            if kind == "heads_output":
                chosen = chosen.transpose(-3, -2)
            chosen = chosen.reshape(cut.shape)
            if cut.shape != own.shape:  # sinks
                chosen = torch.cat([chosen, own[..., cut.shape[-1] :]], -1)
            return _as_contiguous_as(own, chosen)

    def _show_weighted(self, pattern: Tensor, value: Tensor, result: Tensor) -> Tensor:
        """Show the values times the pattern, computed aside; what the heads give if it has been changed: its sum over keys."""
        if not self._report.awaited("values_weighted"):
            return result
        with torch._C.DisableTorchFunction():
            pattern = by_head(pattern, self._heads)
            value = by_head(value, self._heads) if value.ndim == 3 else value
            if pattern.ndim != 4 or value.ndim != 4 or pattern.shape[1] % value.shape[1]:
                return result
            value = value.repeat_interleave(pattern.shape[1] // value.shape[1], 1)
            weighted = pattern[..., None] * value[:, :, None]
        weighted, changed = self._offer("values_weighted", weighted)
        with torch._C.DisableTorchFunction():
            return weighted.sum(-2).to(result.dtype).reshape(result.shape) if changed else result

    def _show_shared(self, kind: str, own: Tensor, *, transposed: bool = False) -> Tensor:
        """The same for keys or values, of which several query heads may share one."""
        if not self._report.awaited(kind):
            return own
        with torch._C.DisableTorchFunction():
            by_key = own.mT if transposed else own
            whole = by_head(by_key, self._heads) if by_key.ndim == 3 else by_key
        shared = self._before_repeats(own, whole)
        if shared is not None:
            chosen = self._visit_kept(shared, kind)
            with torch._C.DisableTorchFunction():
                return self._again(own, shared, chosen)
        chosen = self._visit_kept(whole, kind)
        with torch._C.DisableTorchFunction():
            chosen = chosen.reshape(by_key.shape)
            return _as_contiguous_as(own, chosen.mT if transposed else chosen)

    def _visit_kept(self, shown: Tensor, kind: str) -> Tensor:
        """Show keys or values, and what to go on with.

        A static cache's are one buffer, into which later steps write: a copy of that is shown, so that what is read stays what it
        was. What is changed in it in place is changed in the cache, as in that of other caches.
        """
        with torch._C.DisableTorchFunction():
            copy = shown.clone() if _is_written_into(shown) else shown
            before = None if copy.is_inference() else copy._version
        chosen = self._reported(kind, copy)
        if chosen is not copy or copy is shown or copy.requires_grad:
            return chosen
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if before is None or copy._version != before:
                shown.copy_(copy)
        return shown

    def _before_repeats(self, own: Tensor, whole: Tensor) -> Tensor | None:
        """The heads that have been repeated to give `whole`, one for several query heads; None if they have not."""
        for step in self._steps(own):
            source = step.source
            alike = source.ndim == 4 and (source.shape[0], *source.shape[2:]) == (
                whole.shape[0],
                *whole.shape[2:],
            )
            if alike and source.shape[1] < whole.shape[1]:
                return source
        return None

    def _steps(self, tensor: Tensor) -> list[_Arranged]:
        """How it has been arranged, the last step first."""
        steps: list[_Arranged] = []
        while (step := self._arranged.get(id(tensor))) is not None:
            steps.append(step)
            tensor = step.source
        return steps

    def _again(self, tensor: Tensor, source: Tensor, new: Tensor) -> Tensor:
        """What `tensor` would be, had it been made of `new` and not of `source`."""
        if tensor is source:
            return new
        for step in reversed(self._steps(tensor)):
            if step.source is source:
                args, kwargs = _replaced((step.args, step.kwargs), {id(source): new})
                source, new = step.result, step.func(*args, **kwargs)
        return new


def _model_frames() -> Iterator[FrameType]:
    """The frames of the model's code between here and the innermost module that is watched, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_gate(frame):
        if not is_ours(frame):
            yield frame
        frame = frame.f_back


def _innermost_module() -> Module | None:
    selves = (frame.f_locals.get("self") for frame in _model_frames())
    return next((one for one in selves if isinstance(one, Module)), None)


def _replaced(arguments: tuple[Any, Any], new: dict[int, Tensor]) -> Any:
    return pytree.tree_map(lambda x: new.get(id(x), x), arguments)


def _is_written_into(tensor: Tensor) -> bool:
    """Whether it is a static cache's, which are marked for the compiler, or may be (in inference mode a view has no base)."""
    base = tensor if tensor._base is None else tensor._base
    return tensor.is_inference() or hasattr(base, "_dynamo_static_input_type")


def _as_contiguous_as(own: Tensor, new: Tensor) -> Tensor:
    """What the model does with its own it can do with the other."""
    return new.contiguous() if own.is_contiguous() else new


def by_head(own: Float[Tensor, ...], heads: int | None) -> Float[Tensor, "batch ..."]:
    """What is one for each query head, by query heads, from what a model holds.

    (batch, head, query, _); LongT5's encoder holds (batch, block, head, query, _), some hold (batch * head, query, _). What is
    neither, a router's softmax say, stays as it is. Transformers packs the single
    query of a padded generation step under SDPA, where heads share keys, as (batch, key head, head of its group, _).
    """
    if heads is None:  # they vary from layer to layer
        return own
    if own.ndim == 3 and own.shape[0] % heads == 0:
        return own.unflatten(0, (-1, heads))
    if own.ndim == 4 and own.shape[1] != heads and own.shape[1] * own.shape[2] == heads:
        return own.flatten(1, 2)[:, :, None]
    return own
