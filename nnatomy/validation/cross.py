"""What the names of a cross-attention promise: its rows are distributions, and writing it shows in the layer's output.

Writing is a pass of its own, as the other changes of a layer would hide what this one does: for the first prompt what the
module gives is changed, for the second the pattern is turned round; then the layer's output is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core import Slot
from nnatomy.validation.names import CROSS
from nnatomy.validation.report import Findings


class CrossAttentions:
    """The checks on a model.

    Args:
        findings: where what does not hold is noted.
        tolerance: how far rows may be from summing up to 1.
    """

    def __init__(self, model: Any, findings: Findings, tolerance: float) -> None:
        self._expect = findings.expect
        self._tolerance = tolerance
        self._outputs, self._patterns = model.cross_attentions_output, model.cross_attention_probabilities
        self._heads = model.dimensions.num_heads
        self._layers_output = model.layers_output
        self._parts = {module: i for i, module in enumerate(self._outputs.modules) if module is not None}
        self._layers = {model._anatomy.layers[i]: module for module, i in self._parts.items()}
        self.modules = {*self._parts, *self._layers}
        self.kinds = {"output": None, self._patterns.kind: self._patterns.tap}
        self.names = [name for name in CROSS[:2] if self._parts]

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
            self._note(i, off <= self._tolerance, f"has rows that do not sum to 1, off by {off:.3g}", off)
            self._note(
                i, bool((pattern >= 0).all()), f"has entries below 0, down to {float(pattern.min()):.3g}"
            )

    def _note(self, layer: int, holds: bool, why: str, error: float | None = None) -> None:
        self._expect(holds, self._patterns.name, layer, why, error)

    def change(self, slot: Slot, seen: Callable[[Module, str], Any]) -> None:
        """Check what has become of the earlier changes of this layer, and change this."""
        module, kind = slot.module, slot.kind
        if kind == self._patterns.kind:
            if module in self._patterns.modules:
                new = slot.value.clone()
                new[1] = new[1].flip(-1)
                slot.value = new
        elif module in self._outputs.modules:
            clean, now = (self._outputs.get(value) for value in (seen(module, "output"), slot.value))
            if module in self._patterns.modules:
                moved = self._moved(now[1], clean[1])
                self._note(self._parts[module], moved, "writing it changes no attention")
            new = now.clone()
            new[0] += 1 + clean.abs().max()
            new[0, :, ::2] *= -1
            slot.value = self._outputs.put(slot.value, new)
        elif module in self._layers_output.modules and self._layers[module] in self._outputs.modules:
            clean, now = (self._layers_output.get(value) for value in (seen(module, "output"), slot.value))
            moved = self._moved(now[0], clean[0])
            i = self._parts[self._layers[module]]
            self._expect(moved, self._outputs.name, i, "writing it changes no layer output")
            slot.value = self._layers_output.put(slot.value, clean)

    @staticmethod
    def _moved(now: Tensor, clean: Tensor) -> bool:
        return float(((now - clean).abs() > 1e-5 * clean.abs().max()).float().mean()) > 0.5
