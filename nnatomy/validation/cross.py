"""What the names of a cross-attention promise: its rows are distributions, and writing it shows in what comes after it.

It is written in the pass that writes the rest of the layer (see `writing`), for the second prompt, for which nothing has been
changed there yet: the pattern is turned round, which has to show in what the module gives; of that the first positions are
changed, which has to show in what the MLP is given, or in what the layer gives where no module is the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core import Slot
from nnatomy.names import CROSS_MODULES
from nnatomy.validation.collectors import Each
from nnatomy.validation.near import slack_of_sums
from nnatomy.validation.report import Findings

#: How many positions are changed: so few that what the MLP changes everywhere shows nevertheless.
_FIRST = 2


class CrossAttentions:
    """The checks on a model.

    Args:
        findings: where what does not hold is noted.
    """

    def __init__(self, model: Any, findings: Findings) -> None:
        self._expect = findings.expect
        self._outputs, self._patterns = model.cross_attentions_output, model.cross_attention_probabilities
        self._heads = model.dimensions.num_heads
        self._parts = {module: i for i, module in enumerate(self._outputs.modules) if module is not None}
        #: By what comes after it: the name under which it is read there, and the layer.
        self._after: dict[Module, tuple[Any, int]] = {}
        for i in self._parts.values():
            accessor = model.layers_output if model.mlps_input.modules[i] is None else model.mlps_input
            if accessor.modules[i] is not None:
                self._after[accessor.modules[i]] = accessor, i
        self.names = [name for name in CROSS_MODULES if self._parts]

    @property
    def parts(self) -> set[Module]:
        """The cross-attentions."""
        return set(self._parts)

    def read(self, seen: Callable[[Module, str], list[Any]], seq: int) -> None:
        """Check the patterns that have been seen."""
        for module, i in self._parts.items():
            calls = seen(module, self._patterns.kind)
            self._note(i, len(calls) == 1, f"fires {len(calls)} times in a forward pass, not once")
            if len(calls) != 1:
                continue
            shape, (pattern,) = tuple(calls[0].shape), calls
            right = pattern.ndim == 4 and shape[:3] == (2, self._heads or shape[1], seq)
            self._note(i, right, f"is {shape}, not (2, {self._heads}, {seq}, key)")
            off = float((pattern.float().sum(-1) - 1).abs().max())
            self._note(
                i,
                off <= slack_of_sums(pattern.dtype),
                f"has rows that do not sum to 1, off by {off:.3g}",
                off,
            )
            self._note(i, bool((pattern >= 0).all()), f"has entries below 0, down to {float(pattern.min()):.3g}")

    def _note(self, layer: int, holds: bool, why: str, error: float | None = None) -> None:
        self._expect(holds, self._patterns.name, layer, why, error)

    def changes(self, seen: Callable[[Module, str], Any]) -> list[Each]:
        """What changes each for the second prompt, and checks what becomes of that; `seen`: what was read."""
        return [
            Each(self.parts, {self._patterns.kind: self._patterns.tap}, self._turn_round),
            Each(self.parts, {"output": None}, partial(self._change, seen=seen)),
            Each(set(self._after), {"input": None, "output": None}, partial(self._check, seen=seen)),
        ]

    def _turn_round(self, slot: Slot) -> None:
        if slot.module in self._patterns.modules:
            new = slot.value.clone()
            new[1] = new[1].flip(-1)
            slot.value = new

    def _change(self, slot: Slot, seen: Callable[[Module, str], Any]) -> None:
        module, outputs = slot.module, self._outputs
        if module not in outputs.modules:
            return
        clean, now = (outputs.get(value) for value in (seen(module, "output"), slot.value))
        if module in self._patterns.modules:
            moved = self._moved(now[1], clean[1])
            self._note(self._parts[module], moved, "writing it changes no attention")
        new = now.clone()
        new[1] = clean[1]
        new[1, :_FIRST] += 1 + clean.abs().max()
        new[1, :_FIRST, ::2] *= -1
        slot.value = outputs.put(slot.value, new)

    def _check(self, slot: Slot, seen: Callable[[Module, str], Any]) -> None:
        accessor, i = self._after[slot.module]
        if slot.kind == accessor.kind and self._outputs.modules[i] is not None:
            clean, now = (accessor.get(value) for value in (seen(slot.module, slot.kind), slot.value))
            moved = self._moved(now[1, :_FIRST], clean[1, :_FIRST])
            self._expect(moved, self._outputs.name, i, f"writing it does not change {accessor.name}")

    @staticmethod
    def _moved(now: Tensor, clean: Tensor) -> bool:
        return float(((now - clean).abs() > 1e-5 * clean.abs().max()).float().mean()) > 0.5
