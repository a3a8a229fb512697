"""Values inside a layer that are no module's input or output, found by what happens in its forward.

Once, at load, `Finder` records every torch function called in a layer: what came of what, and in which module.
`contributions`, `neurons` and `routers` say where in that record the standard names are.

In a trace, `ShowMode` knows these places by where they stand in the model's code, and shows the operands and results of
the functions called there: the tensors themselves, which the model goes on with.

What has all positions in one axis (OPT's MLP, routers) is shown by prompt and position, as the layer's own input has them. A mode may
be put on while the layer is at work, and is given no arguments of the call: they are read from the frame of the gate that the
call came through, which is the one rule that holds here of frames: the gate's `args` and `kwargs`, never a local of the model's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.arch_configs import Anatomy
from nnatomy.core import Collector, Slot
from nnatomy.core.frames import frames
from nnatomy.core.gates import is_gate
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Axes, Report
from nnatomy.names import ATTENTIONS, CROSS_ATTENTIONS, MIXERS, NO_CROSS, ROWS, SUMS, TABLE
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.contributions import find_contributions
from nnatomy.standardized.hidden import input_of, output_of
from nnatomy.standardized.neurons import find_neurons
from nnatomy.standardized.record import LayerSums, Record, Result, leaves_of, where
from nnatomy.standardized.routers import find_routers

#: In this order where one call has several.
NAMES = tuple(row.name for row in TABLE if row.place == "layer")


class Sums:
    """What is shown inside all layers of a model; the tap of the names that speak of it."""

    def __init__(self, anatomy: Anatomy, blocks: OpenBlocks, width: int, split: Any = None) -> None:
        self.anatomy = anatomy
        self.split = split
        self.width = width
        self.layers: dict[Module, LayerSums] | None = None
        layers: dict[str, tuple[Module, ...]] = dict.fromkeys(NAMES, anatomy.layers)
        if not any(anatomy.cross_attentions):
            layers[CROSS_ATTENTIONS] = ()
        self.accessors = {name: SumAccessor(name, layers[name], blocks, self) for name in NAMES}
        self._blocks = blocks

    def __call__(self, module: Module, report: Report) -> TorchFunctionMode:
        return ShowMode(module, (self.layers or {}).get(module, LayerSums()), report, self.split)

    def finder(self) -> Finder:
        """What finds it in a forward pass."""
        return Finder(self)

    def find(self) -> None:
        """Find it on a short prompt, if validation has not."""
        if self.layers is not None:
            return
        finder = self.finder()
        assert self._blocks.example is not None
        try:
            with self._blocks.example(self._blocks) as tracer:
                tracer.block.run.collect(finder)
                tracer.result  # noqa: B018
        except Exception as error:  # noqa: BLE001
            why = f"its inside does not show, as the model cannot be run on token ids alone ({error})"
            finder.found = {layer: LayerSums(absent=dict.fromkeys(NAMES, why)) for layer in finder.modules}
        self.learn(finder)
        for sums in finder.found.values():
            sums.values.clear()

    def learn(self, finder: Finder) -> None:
        """This is what was found."""
        self.layers = finder.found
        for i, layer in enumerate(self.anatomy.layers):
            absent = self.anatomy.absent
            why = absent["layer"][i] or absent["input"][i] or "it is never called"
            sums = self.layers.get(layer) or LayerSums(absent=dict.fromkeys(NAMES, why))
            for name, why in sums.absent.items():
                if len(self.accessors[name]):
                    self.accessors[name].refuse(i, why)
        # One point, where both are one operand: then it does not matter which is asked for first.
        shown = [one for sums in self.layers.values() for one in sums.shown.values()]
        if not any(name == ATTENTIONS for place in shown for name, _ in place):
            self.accessors[ATTENTIONS].kind = MIXERS


class SumAccessor(LayerAccessor):
    """One of the names that speak of the inside of a layer."""

    def __init__(self, name: str, layers: tuple[Module, ...], blocks: OpenBlocks, sums: Sums) -> None:
        super().__init__(ROWS[name], layers, blocks, tap=sums, none=NO_CROSS, layers=layers)
        self.changed_later = None  # until validation has seen it
        self._sums = sums

    def module(self, layer: int) -> Module:
        self._sums.find()
        return super().module(layer)


class ShowMode(TorchFunctionMode):
    """Shows what has been found, in one call of a layer."""

    def __init__(self, module: Module, sums: LayerSums, report: Report, split: Any = None) -> None:
        super().__init__()
        self._split = split
        self._down = sums.down
        self._module = module
        self._shown = sums.shown
        self._functions = sums.functions
        self._report = report
        #: Operands with another tensor in their place, which whatever reads them is to read; kept alive.
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self._read: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # which looks into this method, too
            return func(*args, **kwargs)
        if self._replaced and any(id(leaf) in self._replaced for leaf in leaves_of(args, kwargs)):
            args, kwargs = pytree.tree_map(lambda leaf: self._replaced.get(id(leaf), (leaf, leaf))[1], (args, kwargs))
        shown = self._shown.get(at) if func.__name__ in self._functions and (at := where()) else None
        if not shown:
            return func(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        for name, place in shown:
            if not isinstance(place, Result) and name not in self._read:
                own = leaves[place]
                leaves[place] = self._show(name, own)
                if name not in SUMS:  # an adapter reads neurons too, each expert the weights
                    self._read.add(name)
                    self._replaced[id(own)] = own, leaves[place]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        result = func(*args, **kwargs)
        leaves, structure = pytree.tree_flatten(result)
        for name, place in shown:
            if isinstance(place, Result):
                leaves[place.leaf] = self._show(name, leaves[place.leaf])
        return pytree.tree_unflatten(leaves, structure)

    def _show(self, name: str, tensor: Tensor) -> Tensor:
        if not self._report.awaited(name):
            return tensor
        gates = (frame for frame in frames() if is_gate(frame) and frame.f_locals["self"] is self._module)
        gate = next(gates, None) if tensor.ndim < 3 else None
        if gate is None:
            return self._visited(name, tensor)
        # OPT's MLP, and routers, have all positions in one axis. The model goes on with what is shown, for its gradient.
        stream = input_of((gate.f_locals["args"], gate.f_locals["kwargs"]))
        if tensor.shape[0] != stream.shape[0] * stream.shape[1]:  # of a piece of the positions
            return self._visited(name, tensor)
        new = self._visited(name, tensor.reshape(*stream.shape[:2], tensor.shape[-1]))
        return new.reshape(tensor.shape)

    def _visited(self, name: str, tensor: Tensor) -> Tensor:
        axes = Axes(ROWS[name].here)
        if self._split is None:
            new = self._report(tensor, name, axes).value
        else:
            new = self._split.show_neurons(self._report, tensor, name, axes, self._down)
        assert isinstance(new, Tensor)
        return new


class Finder(Collector):
    """Finds the inside of each layer in one forward pass, in which it changes nothing."""

    def __init__(self, sums: Sums) -> None:
        spread = any(sums.anatomy.absent["input"])
        self.modules: set[Module] = set() if spread else set(sums.anatomy.ran)
        self.kinds = {"input": None, "output": None, "additions": self._record}
        self.found: dict[Module, LayerSums] = {}
        self._anatomy = sums.anatomy
        self._split = sums.split
        self._width = sums.width
        self._streams: dict[Module, Any] = {}
        self._records: dict[Module, Record] = {}

    def _record(self, module: Module, _report: Report) -> TorchFunctionMode:
        self._records[module] = Record(self._streams.pop(module))
        return self._records[module]

    def take(self, slot: Slot) -> None:
        layer = slot.module
        if slot.kind == "input":
            self._streams[layer] = input_of(slot.value)
            return
        record = self._records.pop(layer)
        stream, output = record.stream.tensor, output_of(slot.value)
        why = ""
        if layer in self.found:
            why = "it is called several times in a forward pass"
        elif not isinstance(stream, Tensor) or stream.ndim != 3 or stream.shape[-1] != self._width:
            why = "its input is no stream of (batch, seq, hidden)"
        elif not isinstance(output, Tensor):
            why = "its output is no stream of (batch, seq, hidden)"
        if why:
            self.found[layer] = LayerSums(absent=dict.fromkeys(NAMES, why))
            return
        i = self._anatomy.layers.index(layer)
        end = record.value(output)
        found = self.found[layer] = find_contributions(self._anatomy, i, record, end)
        routing = find_routers(self._anatomy, i, record, end)
        neurons, found.down = find_neurons(self._anatomy, i, record, end, routing)
        if self._split is not None:
            neurons.show_results()
        found.take(record, routing)
        found.take(record, neurons)
        for shown in found.shown.values():
            shown.sort(key=lambda one: NAMES.index(one[0]))  # in this order, whichever operands they are
