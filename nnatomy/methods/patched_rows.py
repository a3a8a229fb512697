"""Prompts many times over, each time with something else put in from one position on, as the rows of a few forward passes.

What is put in changes no position before it. So where the model has a KV cache, each distinct prompt is run once, and the
rows go on from the keys and values of the positions before. That this gives what whole prompts give is seen each time: the
prompts with nothing put in, and one row that has, are run both ways. Where it does not, where there is no such cache (a
recurrent mixer, an encoder) or little to be saved, whole prompts are run. Which, and why, is logged here, at INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nnatomy.arch_configs import cache_name
from nnatomy.methods.ends import end_logits, ends
from nnatomy.methods.patched_runs import NOT_THERE, is_close
from nnatomy.methods.progress import counting
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.prompt_trace import Given, PromptTrace

#: Puts in, in a trace, what each row has put in (a number; -1: nothing), given these and the rows' prompts.
Put = Callable[[Int[Tensor, " row"], Int[Tensor, " row"]], None]

#: The layers of a cache that has nothing but keys and values.
_STANDARD = (DynamicLayer, DynamicSlidingWindowLayer)

_log = logging.getLogger(__name__)


class PatchedRows:
    """Rows of prompts, with something put in.

    Args:
        inputs: of the prompts, as `model.prepare` gives them.
        columns: of each prompt, the first position at which something is put in, counted from the end.
        put: puts it in.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        inputs: dict[str, Any],
        columns: Int[Tensor, " prompt"],
        put: Put,
    ) -> None:
        self._model, self._inputs, self._put = model, inputs, put
        self._first, self._length = int(columns.min()), inputs["input_ids"].shape[1]
        #: By prompt, which of the distinct ones it is; and the first of each of these.
        tokens = torch.cat([inputs["input_ids"], inputs["attention_mask"]], 1).cpu()
        self._kind = tokens.unique(dim=0, return_inverse=True)[1]
        self._distinct = torch.stack([(self._kind == kind).nonzero()[0, 0] for kind in self._kind.unique()])

    def probs(self, rows: Int[Tensor, "row 2"], size: int, progress: bool) -> Float[Tensor, "row vocab"]:
        """The next-token probabilities, on the CPU.

        Args:
            rows: what is put in, and into which prompt.
            size: how many rows run at once.
        """
        found = []
        with counting(len(rows), "Patching", progress) as count:
            for end in self._ends(rows, size):
                found.append(end)
                count(len(end))
        # Only now, when the keys and values are gone: logits are large.
        return torch.cat([end_logits(self._model, end).softmax(-1).cpu() for end in found])

    def _ends(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """What `ends` gives of the rows, part by part."""
        plain = torch.stack([torch.full_like(self._distinct, -1), self._distinct], 1)
        first, *rest = torch.cat([plain, rows]).split(size)
        checked, cache = torch.cat([plain, rows[:1]]), DynamicCache()
        try:
            self._look_before(len(rows), size)
            whole = self._end(**self._whole(checked), rows=checked, cache=cache, use_cache=True)
            end = self._end(**self._rest(first, cache), rows=first)
            if not is_close(end[: len(whole)], whole):
                raise _WholePromptsError("going on from the keys and values gives something else")
        except (_WholePromptsError, *NOT_THERE) as error:
            _log.info("Whole prompts: %s", error)
        else:
            _log.info("Positions from %d on, after the keys and values of the others", self._first)
            yield end[len(plain) :]
            yield from (self._end(**self._rest(part, cache), rows=part) for part in rest)
            return
        yield from (self._end(**self._whole(part), rows=part) for part in rows.split(size))

    def _look_before(self, count: int, size: int) -> None:
        """Raise if half of the positions cannot be saved, or the model has another cache than of keys and values."""
        model, kinds = self._model, len(self._distinct)
        positions = (kinds + 1) * self._length - (kinds + count) * self._first
        if kinds >= size or 2 * positions > count * self._length:
            raise _WholePromptsError(f"of {count * self._length} positions {positions} would be run")
        if model.edits:
            raise _WholePromptsError("edits may count positions")
        if not cache_name(model.steps_of) or "decoder_input_ids" in self._inputs:
            raise _WholePromptsError("the model takes no keys and values")
        if other := other_caches(model):
            raise _WholePromptsError(f"the model's cache has {other}")

    def _end(self, rows: Tensor, **inputs: Any) -> Tensor:
        # (`trace` would run such a pass to its end, for the cache. This one has no more to give after the last layer.)
        inputs, given = self._model.prepare(**inputs), Given()
        given.mask, given.seq = inputs["attention_mask"], inputs["attention_mask"].shape[1]
        with PromptTrace(self._model, self._model._forward(inputs), given=given):
            self._put(*rows.T)
            end = ends(self._model)
        return end.clone()  # without the other positions

    def _whole(self, rows: Tensor) -> dict[str, Any]:
        """The arguments of the model's forward for these rows."""
        return of_rows(self._inputs, rows[:, 1])

    def _rest(self, rows: Tensor, cache: Cache) -> dict[str, Any]:
        """The same for the positions from the first patched one on."""
        before = self._length + self._first
        layers: list[Any] = cache.layers
        if {layer.keys.shape[-2] for layer in layers if layer.is_initialized} != {self._length}:
            raise _WholePromptsError("the model leaves no keys and values of all positions")
        inputs = {
            name: value if name == "attention_mask" else value[:, before:] for name, value in self._whole(rows).items()
        }
        kept: list[Any] = [_Kept(layer, self._kind[rows[:, 1]], before) for layer in layers]
        return {**inputs, "cache": Cache(layers=kept), "use_cache": True}


def other_caches(model: StandardizedTransformer) -> str:
    """What the model's cache has beside keys and values."""
    config: Any = model.steps_of.config
    layers = DynamicCache(config=config).layers
    return ", ".join(sorted({type(layer).__name__ for layer in layers if type(layer) not in _STANDARD}))


def of_rows(inputs: dict[str, Any], prompts: Int[Tensor, " row"]) -> dict[str, Any]:
    """The inputs of rows of these prompts."""
    return {name: one[prompts] if isinstance(one, Tensor) else one for name, one in inputs.items()}


class _Kept(DynamicLayer):
    """A layer's keys and values of the first positions, for rows that go on from them. Of theirs none are kept.

    Args:
        rows: of which prompt each row is.
        length: how many positions.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, rows: Int[Tensor, " row"], length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized, self._rows = layer.is_initialized, rows
        if layer.is_initialized:
            self.keys, self.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        kept = self.keys[self._rows], self.values[self._rows]
        return torch.cat([kept[0], key_states], -2), torch.cat([kept[1], value_states], -2)


class _WholePromptsError(Exception):
    """Why whole prompts are run."""
