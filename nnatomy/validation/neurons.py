"""What `neurons` promises: all that an MLP gives comes of them, by a matrix.

For the first prompt they are made zero, but for one neuron at the last position. Then the MLP gives the same at the other two
positions, although it is given other things there, and something else at the last one: what a plain down projection gives
there is its column of that neuron more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers.pytorch_utils import Conv1D

from nnatomy.core import Collector, Slot
from nnatomy.core.points import versions
from nnatomy.names import MLPS, NEURONS
from nnatomy.validation.near import is_near


class Neurons(Collector):
    """Checks it in a pass in which each layer is given what it was, and refuses on each layer what does not hold.

    Args:
        outputs: of each layer, as read.
    """

    def __init__(self, model: Any, outputs: dict[Module, Tensor]) -> None:
        self.accessor = model.neurons
        self._get = model.layers_output.get
        self._mlps = model.mlps_contribution
        self._inside = model._sums.layers
        self._outputs = outputs
        for i, layer in enumerate(model._anatomy.layers):
            if layer not in outputs and self.accessor.modules[i] is not None:
                self.accessor.refuse(i, "layers_output is refused here, so that nothing shows what they are")
        layers = {layer: i for i, layer in enumerate(self.accessor.modules) if layer is not None}
        self._layers = layers
        self._downs = {down: layer for layer in layers if (down := self._inside[layer].down) is not None}
        self.modules = {*layers, *self._downs}
        self.kinds = {"output": None, NEURONS: self.accessor.tap, MLPS: self._mlps.tap} if layers else {}
        #: What came: the neurons, and what the down projection, the MLP and the layer gave.
        self._now: dict[tuple[Module, str], Tensor] = {}
        self._seen: list[tuple[Module, Tensor, Any]] = []

    def take(self, slot: Slot) -> None:
        layer, kind = slot.module, slot.kind
        value = self._get(slot.value)
        if layer in self._downs:
            layer, kind = self._downs[layer], "down"
            value = value.reshape(*self._outputs[layer].shape[:2], -1)
            # Here, as a layer's parameters may be gathered while it runs, and be a shard at any other time.
            if (column := self._column(layer, value)) is not None:
                self._now[layer, "column"] = column
        self._now[layer, kind] = value.clone()
        if kind == NEURONS:
            new = value.clone()
            new[0] = 0
            new[0, -1, self._neuron(new)] = 1 + value.abs().max()
            slot.value = new
            self._seen.append((layer, new, versions(new)))

    @staticmethod
    def _neuron(neurons: Tensor) -> int:
        return neurons.shape[-1] // 3

    def check(self) -> None:
        """Refuse what has not held."""
        for layer, i in self._layers.items():
            if why := self._why_not(layer):
                self.accessor.refuse(i, f"none that passes validation: {why}")
        changed = {layer for layer, new, before in self._seen if new.is_inference() or versions(new) != before}
        self.accessor.changed_later = changed

    def _why_not(self, layer: Module) -> str:
        neurons, down, mlp = (self._now.get((layer, kind)) for kind in (NEURONS, "down", MLPS))
        output, clean = self._now[layer, "output"], self._outputs[layer]
        if neurons is None:
            return "they do not show again where they were found"
        if neurons.shape[:2] != clean.shape[:2] or not neurons.isfinite().all():
            return f"they are of shape {tuple(neurons.shape)}, or not finite"
        given = down if mlp is None else mlp
        if given is None:
            return "nothing shows what comes of them"
        if not is_near(given[0, 0], given[0, 1], 16):
            return "the MLP gives something that does not come of them"
        if torch.equal(given[0, -1], given[0, 0]) or (mlp is None and torch.equal(output[0], clean[0])):
            return "writing one changes nothing"
        column = self._now.get((layer, "column"))
        if down is not None and column is not None and not is_near(down[0, -1], down[0, 0] + column, 16):
            return "writing one does not give its column of the down projection"
        return ""

    def _column(self, layer: Module, down: Tensor) -> Tensor | None:
        """What the one neuron adds, where the down projection is a plain linear."""
        module, neurons = self._inside[layer].down, self._now.get((layer, NEURONS))
        weight: Any = getattr(module, "weight", None)
        if neurons is None or type(module) not in (Linear, Conv1D):
            return None
        if type(weight) not in (Parameter, Tensor) or weight.device != down.device:
            return None  # quantized, a shard, offloaded
        columns = weight.T if type(module) is Conv1D else weight
        return columns[:, self._neuron(neurons)].to(down.dtype) * (1 + neurons.abs().max())
