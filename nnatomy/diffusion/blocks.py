"""One block of a denoiser, called again on what it was given: what its names are is proven there.

- Which attention is which: the keys of a cross-attention move with the text, and not with the picture's stream; those of any other
  move with that. Of a joint attention the keys that move with the text alone are the text's.
- Put back as read, a value leaves what the block gives as it was, bit for bit (a pattern, which SDPA never holds: but for rounding);
  zeros in its place change it.
- A pattern's rows are distributions, its sums of the values are what the heads give, and it is the softmax of the products of queries
  and keys.
- With a modulation of zeros, gates among them, the stream leaves the block as it came, but for what a cross-attention adds.
- Of a block with two streams, the next block is given the picture's as the picture's, and the text's as the text's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.diffusion.accessors import At
from nnatomy.diffusion.anatomy import Layer, inside, is_attention
from nnatomy.errors import NotReachedError
from nnatomy.tracing import Traceable
from nnatomy.validation.near import TOLERANCE, distance, is_same

_UNSEEN = "its inside does not show (a fused kernel, or several calls)"
_PATTERNS = ("attention_probabilities", "cross_attention_probabilities")
_MODULATIONS = ("modulation", "text_modulation")
_OUTPUTS = ("layers_output", "image_layers_output", "text_layers_output")


class Replay:
    """Calls of a block on what it was given."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, edits: dict[At, Callable[[Tensor], Tensor]] | None = None, **given: Tensor) -> list[Any]:
        """What the block gives, with values of its calls changed, or some of its arguments."""
        args, kwargs = self.layer.call.given
        names = self.layer.call.names
        args = tuple(given.get(names[i], one) for i, one in enumerate(args))
        kwargs = {name: given.get(name, one) for name, one in kwargs.items()}
        view = Traceable(self.layer.module)
        with view.trace(*args, **kwargs) as tracer:
            for place, change in (edits or {}).items():
                slot = tracer.block.reach(place.module, place.kind, place.kind, 0, place.tap)
                slot.value = place.put(slot.value, change(place.get(slot.value)))
            result = tracer.result
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def read(self, places: list[At], **given: Tensor) -> list[Tensor | None]:
        """Values inside of the block's calls; None for what does not come."""
        found: list[Tensor | None] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value.clone())
            return value

        try:
            self(dict.fromkeys(places, keep), **given)
        except NotReachedError:
            return [None] * len(places)
        return found


def classify(layer: Layer, taps: dict[Module, Any]) -> None:
    """Find the block's attention within the stream (or of both streams jointly), and the one to the text."""
    attentions = [one for one in layer.module.modules() if is_attention(one)]
    if not attentions:
        return
    replay = Replay(layer)
    noisy = {layer.image_argument: _noisy(layer.stream)}
    text = layer.text_given
    within: list[tuple[Module, slice | None]] = []
    crossing: list[Module] = []
    for attention in attentions:
        place = inside(attention, "keys", taps)
        keys = replay.read([place])[0]
        if keys is None:
            continue
        moved = replay.read([place], **noisy)[0]
        by_image = moved is None or not is_same(keys, moved)
        by_text = None
        if isinstance(text, Tensor) and layer.text_argument is not None:
            by_text = replay.read([place], **{layer.text_argument: _noisy(text)})[0]
        if by_image:
            within.append((attention, None if by_text is None else _moved(keys, by_text)))
        elif by_text is not None and not is_same(keys, by_text):
            crossing.append(attention)
    joint = [one for one in within if one[1] is not None]
    chosen = joint if len(joint) == 1 else within
    unseen = len(within) + len(crossing) < len(attentions)
    none = _UNSEEN if unseen else "the block has none"
    layer.attention = chosen[0][0] if len(chosen) == 1 else (f"the block has {len(chosen)}" if chosen else none)
    moved_by_text = chosen[0][1] if len(chosen) == 1 else None
    if moved_by_text is not None and isinstance(text, Tensor):
        image, words = layer.stream.shape[1], text.shape[1]
        if moved_by_text in (slice(0, words), slice(image, image + words)):
            layer.text_first = moved_by_text == slice(0, words)
    layer.cross = crossing[0] if len(crossing) == 1 else (f"the block has {len(crossing)}" if crossing else none)


def _moved(keys: Tensor, other: Tensor) -> slice | None:
    """Which keys are not the same; None if none is, or if they are no run of them."""
    if keys.shape != other.shape:
        return None
    where = (keys != other).flatten(0, 1).any(-1).any(0).nonzero().flatten().tolist()
    if not where or where[-1] - where[0] + 1 != len(where):
        return None
    return slice(where[0], where[-1] + 1)


def _noisy(value: Tensor) -> Tensor:
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return value + noise.to(value)


class BlockCheck:
    """What is proven of the names on one block.

    Attributes:
        refused: by name, why.
        errors: by name, the largest relative error that was measured.
    """

    def __init__(self, layer: Layer, following: Layer | None, places: dict[str, At]) -> None:
        self.layer = layer
        self.following = following
        self.places = places
        self.refused: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self._replay = Replay(layer)

    def run(self) -> None:
        """All checks."""
        own = self._replay()
        recorded = [leaf for leaf in pytree.tree_leaves(self.layer.call.output) if isinstance(leaf, Tensor)]
        if self.layer.call.written or not _all_same(own, recorded):
            own = self._replay()  # what it gave is not known any more, or it was another half's
            if not _all_same(own, self._replay()):
                self.refused = dict.fromkeys(self.places, "the block gives something else when it is called again")
                return
        for name, place in self.places.items():
            why = self._modulated(name, place, own) if name in _MODULATIONS else self._put_back(name, place, own)
            if why:
                self.refused[name] = why
        for which in ("", "cross_"):
            self._sums(which)
            self._scores(which)
        self._chain()

    def _put_back(self, name: str, place: At, own: list[Any]) -> str:
        try:
            same = self._replay({place: torch.clone})
            other = self._replay({place: torch.zeros_like})
        except NotReachedError:
            return _UNSEEN
        tolerance = TOLERANCE.get(own[0].dtype, 1e-4)
        off = max(distance(one, was) for one, was in zip(same, own, strict=True))
        if name in _PATTERNS:
            self.errors[name] = off
            if off > tolerance:
                return f"assigned as read, the block gives something else, off by {off:.1e} (relative)"
        elif not _all_same(same, own):
            return "put back as read, the block gives something else"
        if name not in _OUTPUTS and _all_same(other, own):
            return "zeros in its place change nothing"
        return ""

    def _modulated(self, name: str, place: At, own: list[Any]) -> str:
        try:
            if not _all_same(self._replay({place: torch.clone}), own):
                return "put back as read, the block gives something else"
            self._replay({place: torch.zeros_like})
        except NotReachedError:
            return "the block is not modulated by a tensor of its own, or it does not show"
        layer = self.layer
        which = layer.image if name == "modulation" else layer.text
        before = layer.stream if name == "modulation" else layer.text_given
        if which is None or not isinstance(layer.gave(which), Tensor):
            return "the block does not give the stream that it would modulate"
        edits: dict[At, Callable[[Tensor], Tensor]] = {place: torch.zeros_like}
        if isinstance(layer.cross, Module):  # no gate stands behind that (PixArt)
            edits[At(layer.cross, "output")] = torch.zeros_like
        if not is_same(self._output(edits, which), before):
            return "the stream does not leave the block as it came where it is zero"
        return "" if not is_same(self._output({}, which), before) else "the block changes nothing, so nothing shows"

    def _output(self, edits: Any, which: int) -> Tensor:
        leaves = self._replay(edits)
        return leaves[[i for i, one in enumerate(self.layer.call.outputs) if isinstance(one, Tensor)].index(which)]

    def _sums(self, which: str) -> None:
        names = [f"{which}values", "attention_probabilities", f"{which}heads_output"]
        names[1] = f"{which}attention_probabilities"
        if any(name not in self.places for name in names):
            return
        values, pattern, heads = self._replay.read([self.places[name] for name in names])
        if values is None or pattern is None or heads is None:
            return
        tolerance = TOLERANCE.get(values.dtype, 1e-4)
        if values.shape[1] != pattern.shape[1]:
            values = values.repeat_interleave(pattern.shape[1] // values.shape[1], 1)
        sums = (pattern.float() @ values.float()).transpose(1, 2)
        off = distance(heads.float(), sums)
        rows = float((pattern.float().sum(-1) - 1).abs().max())
        for name in names:
            if off > tolerance:
                self.refused.setdefault(
                    name, f"the pattern's sums of the values are not what the heads give: {off:.1e}"
                )
            self.errors[name] = max(off, self.errors.get(name, 0.0))
        if rows > max(1e-3, tolerance):
            self.refused.setdefault(names[1], f"its rows sum to 1 but for {rows:.1e}")

    def _scores(self, which: str) -> None:
        """Whether the pattern is the softmax of what queries and keys give, but for a scale and for what is added (masks).

        So with other queries its logarithm moves as the products do, but for a constant in each row.

        What is multiplied first in an attention without a softmax (a linear one) is neither.
        """
        keys, pattern = f"{which}keys", f"{which}attention_probabilities"
        names = [name for name in ("queries", keys) if name in self.places and (name == keys or not which)]
        if not names:
            return
        if pattern not in self.places or pattern in self.refused:
            self.refused |= dict.fromkeys(names, "it has no softmax that shows, so that nothing shows which is which")
            return
        queries = replace(self.places[keys], kind="queries")
        q, k, p = self._replay.read([queries, self.places[keys], self.places[pattern]])
        assert q is not None
        assert k is not None
        assert p is not None
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        others = q + 0.5 * q.std() * _noisy(torch.zeros_like(q))
        moved: list[Tensor] = []

        def keep(one: Tensor) -> Tensor:
            moved.append(one.clone())
            return one

        self._replay({queries: lambda _: others, self.places[pattern]: keep})
        seen = (p > 1e-6) & (moved[0] > 1e-6)
        count = seen.sum(-1, keepdim=True).clamp(min=1)

        def centred(values: Tensor) -> Tensor:
            values = values.where(seen, 0.0)
            return (values - values.sum(-1, keepdim=True) / count).where(seen, 0.0)

        products = centred((others - q).float() @ k.float().transpose(-2, -1))
        logs = centred(moved[0].float().clamp(min=1e-30).log() - p.float().clamp(min=1e-30).log())
        scale = (products * logs).sum() / (products * products).sum()
        off = float((scale * products - logs).abs().max() / logs.abs().max())
        for name in names:
            self.errors[name] = off
            if not off <= max(1e-2, TOLERANCE.get(q.dtype, 1e-4)):
                self.refused[name] = f"the pattern is not the softmax of their products, off by {off:.1e}"

    def _chain(self) -> None:
        """Whether the next block is given what this one gives, each stream as itself."""
        layer, following = self.layer, self.following
        if not layer.has_two:
            return
        if following is None:
            if not layer.is_known:
                self.refused.setdefault("image_layers_output", "nothing shows which stream is the picture's")
            return
        for name, given, gave in (
            ("image_layers_output", following.stream, layer.gave(layer.image)),
            ("text_layers_output", following.text_given, layer.gave(layer.text)),
        ):
            if name not in self.places or not isinstance(gave, Tensor):
                continue
            if isinstance(given, Tensor) and is_same(given, gave):
                continue
            joined = isinstance(following.stream, Tensor) and following.stream.shape[1] > gave.shape[1]
            if joined and _is_part(gave, following.stream):
                continue
            self.refused.setdefault(name, "the next block is not given it as that")


def _is_part(part: Tensor, whole: Tensor) -> bool:
    """Whether it is the beginning or the end of the other's tokens."""
    count = part.shape[1]
    return is_same(whole[:, :count], part) or is_same(whole[:, -count:], part)


def _all_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(is_same(one, other) for one, other in zip(some, others, strict=True))
