"""The pass that writes: a change of any part of a layer shows, and what is written back is there again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from nnatomy.core import Collector, Slot
from nnatomy.validation.collectors import Each
from nnatomy.validation.internals import Internals
from nnatomy.validation.near import distance
from nnatomy.validation.passes import Passes
from nnatomy.validation.reading import Reading


class Writing:
    """The checks of what is written; `reading`: what has been read before."""

    def __init__(self, passes: Passes, internals: Internals, reading: Reading) -> None:
        self._passes, self._internals, self._reading = passes, internals, reading
        self._seen = reading.seen
        self.model, self.expect = passes.model, passes.expect
        anatomy = self.model._anatomy
        self._layers = {layer: i for i, layer in enumerate(anatomy.layers) if layer in anatomy.ran}
        prompts = {self.model.mixers_output: 0, self.model.attentions_output: 0, self.model.mlps_output: 1}
        #: By module: the name of its output, its layer, the prompt it is changed for.
        self._parts: dict[Module, tuple[Any, int, int]] = {
            module: (accessor, i, prompt)
            for accessor, prompt in prompts.items()
            for i, module in enumerate(accessor.modules)
            if module is not None
        }

    def run(self, others: Sequence[Collector]) -> None:
        """Change every part of every layer, and put back what each layer gives; `others` go first."""
        model, internals = self.model, self._internals
        collectors = [
            *others,
            Each(internals.modules, internals.kinds, partial(internals.change, seen=self._seen.only)),
            Each(set(self._parts), {"output": None}, self._change),
            Each(set(self._layers), {"input": None, "output": None}, self._put_back),
        ]
        last, norm = model.num_layers - 1, model._anatomy.ln_final
        with self._passes.trace(collectors) as tracer:
            if model.layers_output.modules[-1] is None:  # what has not been put back is not back
                tracer.result  # noqa: B018
            elif norm is not None and len(self._seen.of(norm, "input")) == 1:
                args, kwargs = model.ln_final.inputs
                clean = tree_leaves(self._seen.only(norm, "input"))
                for now, before in zip(tree_leaves((args, kwargs)), clean, strict=True):
                    if isinstance(now, Tensor):
                        self._expect_back(last, "the final norm its input", now, before)
            else:
                logits = self._passes.given(tracer.result)
                self._expect_back(last, "the logits", logits, self._reading.logits)

    def _change(self, slot: Slot) -> None:
        accessor, i, prompt = self._parts[slot.module]
        clean, now = accessor.get(self._seen.only(slot.module, "output")), accessor.get(slot.value)
        if slot.module in self._internals.modules:
            self._internals.output(slot.module, i, now, clean)
        new = (clean if slot.module in self._internals.modules else now).clone()
        new[prompt] = clean[prompt] + _ramp(clean)
        slot.value = accessor.put(slot.value, new)

    def _put_back(self, slot: Slot) -> None:
        layer, model = self._layers[slot.module], self.model
        accessor = model.layers_input if slot.kind == "input" else model.layers_output
        clean, now = accessor.get(self._seen.only(slot.module, slot.kind)), accessor.get(slot.value)
        handed_on = layer > 0 and model.layers_output.modules[layer - 1] is not None
        if slot.kind == "input" and slot.module in accessor.modules and handed_on:
            self._expect_back(layer - 1, f"layers_input[{layer}] its value", now, clean)
        elif slot.kind == "output":
            self._expect_moved(layer, now, clean)
        if slot.module in accessor.modules:
            slot.value = accessor.put(slot.value, clean)

    def _expect_moved(self, layer: int, now: Tensor, clean: Tensor) -> None:
        for module, (changed, i, prompt) in self._parts.items():
            if i == layer:
                # The larger part of the entries moves with the change; a change for the other prompt moves
                # them by rounding alone (in a mixture of experts, that sorts the tokens of all).
                least = 1e-5 * _ramp(changed.get(self._seen.only(module, "output"))).abs().max()
                moved = float(((now[prompt] - clean[prompt]).abs() > least).float().mean())
                self.expect(moved > 0.5, changed.name, i, "writing it changes no layer output")

    def _expect_back(self, layer: int, what: str, now: Tensor, clean: Tensor) -> None:
        off = distance(now, clean)
        why = f"writing it back does not give {what} back, off by {off:.1e} (relative)"
        self.expect(torch.equal(now, clean), "layers_output", layer, why, off)


def _ramp(value: Tensor) -> Tensor:
    """As large as the largest entry of `value`, different in each entry of the hidden states: zeros may be there already."""
    ramp = torch.linspace(-1, 1, value.shape[-1], device=value.device, dtype=value.dtype)
    return ramp * (1 + value.abs().max())
