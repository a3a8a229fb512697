"""The stream's algebra: a layer's input and what it adds for its token mixer and its MLP are its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.core import Collector, Slot
from nnatomy.core.points import versions
from nnatomy.errors import NotReachedError
from nnatomy.names import ATTENTIONS, MID, MIXERS, MLPS, SUMS
from nnatomy.names import CROSS_ATTENTIONS as CROSS
from nnatomy.tracing import Trace
from nnatomy.validation.near import is_near
from nnatomy.validation.neurons import Neurons
from nnatomy.validation.report import Findings
from nnatomy.validation.routers import Routers

#: The prompt for which each is taken out. (Where attention is one of several mixers it is taken out of their sum.)
_ROWS = {MIXERS: 0, ATTENTIONS: 1, CROSS: 0, MLPS: 1}


class Algebra(Collector):
    """Checks it, in values that have been read and in a pass of its own; refuses on each layer what does not hold.

    Args:
        inputs, outputs: of each layer, as read.
        found: of each layer, the contributions as they were found, by name.
        findings: where it is noted how far a sum is off.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[Module, Tensor],
        outputs: dict[Module, Tensor],
        found: dict[Module, dict[str, Tensor]],
        findings: Findings,
    ) -> None:
        self.model = model
        self._findings = findings
        self.accessors = {name: accessor for name in SUMS if len(accessor := getattr(model, name))}
        self.layers = model._anatomy.layers
        self.modules = set(self.layers)
        self.kinds = {"input": None, "output": None}
        self._inputs, self._outputs, self._found = inputs, outputs, found
        self._now: dict[tuple[Module, str], tuple[Tensor, Tensor]] = {}  # as it came, as it went on
        self._versions: list[tuple[str, Module, Tensor, Any]] = []
        self._touched: set[Module] = set()  # layers in which others change what the MLP gives

    def check(
        self,
        trace: Callable[[Iterable[Collector]], AbstractContextManager[Trace]],
        others: Sequence[Neurons | Routers] = (),
        beside: Sequence[Collector] = (),
    ) -> None:
        """Refuse what does not hold. Runs the model only where something does in the values read.

        Args:
            others: what is checked in the same pass; they change what MLPs give.
            beside: the same, of what changes nothing that is seen here.
        """
        for i, layer in enumerate(self.layers):
            if layer in self._inputs and layer in self._outputs:
                self._add_up(i, self._found[layer], self._inputs[layer], self._outputs[layer], "as read")
            else:
                self._refuse(i, "layers_input or layers_output is refused here, so that nothing adds up", *SUMS)
        for accessor in self.accessors.values():
            if any(accessor.modules):
                self.kinds[accessor.kind] = accessor.tap
        others = [one for one in others if one.modules]
        if len(self.kinds) == 2 and not others and not beside:
            return
        # The head is not needed. (One that is never called is no error here: the pass has gone to its end.)
        with suppress(NotReachedError), trace([*beside, *others, self]) as tracer:
            head = self.model._anatomy.lm_head
            tracer.result if head is None else tracer.block.reach(head, "input", "lm_head")
        self._touched = {layer for one in others for layer in one.modules}
        for one in others:
            one.check()
        for i in range(len(self.layers)):
            self._check_taken_out(i)
        for accessor in self.accessors.values():
            accessor.changed_later = {
                module
                for kind, module, tensor, version in self._versions
                if kind == accessor.kind and (tensor.is_inference() or versions(tensor) != version)
            }

    def take(self, slot: Slot) -> None:
        layer, model = slot.module, self.model
        if slot.kind in ("input", "output"):
            accessor = model.layers_input if slot.kind == "input" else model.layers_output
            if layer in accessor.modules:
                came = accessor.get(slot.value)
                clean = (self._inputs if slot.kind == "input" else self._outputs)[layer]
                slot.value = accessor.put(slot.value, clean)
                self._now[layer, slot.kind] = (came.clone(), clean)
            return
        came = slot.value.clone()
        if slot.kind in _ROWS:
            slot.value = slot.value.clone()
            slot.value[_ROWS[slot.kind]] = 0
        self._now[layer, slot.kind] = (came, slot.value.clone())
        self._versions.append((slot.kind, layer, slot.value, versions(slot.value)))

    def _check_taken_out(self, i: int) -> None:
        layer = self.layers[i]
        has = [name for name, accessor in self.accessors.items() if accessor.modules[i] is not None]
        missing = [name for name in has if (layer, self.accessors[name].kind) not in self._now]
        if missing:
            self._refuse(i, f"{', '.join(missing)} does not show again where it was found", *SUMS)
        if not has or missing:
            return
        came = {name: self._now[layer, self.accessors[name].kind][0] for name in has}
        went = {name: self._now[layer, self.accessors[name].kind][1] for name in has}
        clean = self._found[layer]
        part = ATTENTIONS in has and self.accessors[ATTENTIONS].kind == ATTENTIONS
        part = part and not torch.equal(clean[ATTENTIONS], clean[MIXERS])
        parallel = MID not in has and MIXERS in has
        same = {  # the prompts for which what it comes of is as it was
            MIXERS: [0] if part else [0, 1],
            ATTENTIONS: [0, 1],
            CROSS: [1] * (not part),
            MLPS: [0] * (parallel and layer not in self._touched) + [1] * (not part),
        }
        for name, rows in same.items():
            first = slice(1 if name == MLPS and layer in self._touched else None)  # others change it behind
            if name in has and rows and not is_near(came[name][rows, first], clean[name][rows, first]):
                self._refuse(i, f"{name} is another value when it is read", *SUMS)
                return
        if part and not _off(came[MIXERS][1], [clean[MIXERS][1], -clean[ATTENTIONS][1]])[1]:
            self._refuse(i, "taking it out takes something else out of what the token mixers add", ATTENTIONS)
        went[MID] = came.get(MID)  # type: ignore[assignment]
        start, end = self._now[layer, "input"][1], self._now[layer, "output"][0]
        self._add_up(i, went, start, end, "with parts taken out")

    def _add_up(self, i: int, values: dict[str, Tensor], start: Tensor, end: Tensor, when: str) -> None:
        has = [name for name, accessor in self.accessors.items() if accessor.modules[i] is not None]
        mixed = [values[name] for name in (MIXERS, CROSS) if name in has]
        terms = [start, *mixed, *(values[name] for name in (MLPS,) if name in has)]
        off, holds = _off(end, terms)
        if len(terms) > 1 and not holds:
            why = f"input and contributions are not the output, {when}: off by {off:.1e} (relative)"
            self._refuse(i, why, *SUMS)
            return
        for name in has:
            if name == MID:
                off, holds = _off(values[MID], [start, *mixed])
                if not holds:
                    self._refuse(i, f"it is not the input and what the token mixer adds, {when}", MID)
                    return
            self._findings.expect(True, name, i, "", off)

    def _refuse(self, i: int, why: str, *names: str) -> None:
        for name in self.accessors.keys() & names:
            if self.accessors[name].modules[i] is not None:
                self.accessors[name].refuse(i, why)


def _off(total: Tensor, terms: list[Tensor]) -> tuple[float, bool]:
    """How far it is from their sum, relative to the largest, and whether that is the rounding of a few additions."""
    rounding = max(torch.finfo(one.dtype).eps for one in (total, *terms))
    largest = max(float(one.abs().max()) for one in (total, *terms))
    off = float((total.double() - sum(term.double() for term in terms)).abs().max()) / max(largest, 1e-30)
    return off, off <= 3 * rounding
