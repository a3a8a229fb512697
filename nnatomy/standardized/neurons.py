"""The neurons of an MLP: what its down projection reads, found in the record of a layer's call.

Going back from what the MLP gives, the first products with a matrix that are met are its down projection's: one, or all in
one module (a linear with an adapter beside it). What that module reads from outside of it are the neurons.
"""

from __future__ import annotations

from torch.nn import Module

from nnatomy.arch_configs import Anatomy
from nnatomy.names import EXPERTS, NEURONS
from nnatomy.standardized.record import MATRIX_PRODUCTS, Findings, Record, Value


def find_neurons(
    anatomy: Anatomy, i: int, record: Record, output: Value, routing: Findings
) -> tuple[Findings, Module | None]:
    """Where layer `i` has its neurons, and the module that reads them if it is one.

    Args:
        output: what the layer gave.
        routing: what has been found of its experts.
    """
    try:
        reading, place, down = _Neurons(anatomy, i, record, routing).find(output)
    except _NoNeuronsError as error:
        return Findings(absent={NEURONS: str(error)}), None
    return Findings(shown={NEURONS: (reading, place)}), down


class _NoNeuronsError(Exception):
    """There are none to show; the text says why."""


class _Neurons:
    def __init__(self, anatomy: Anatomy, i: int, record: Record, routing: Findings) -> None:
        self.layer, self.mlp, self.no_mlp = anatomy.layers[i], anatomy.mlps[i], anatomy.absent["mlp"][i]
        self.mixers: set[Module | None] = {*anatomy.mixers[i], anatomy.cross_attentions[i]} - {None}
        self.record = record
        self.routing = routing

    def find(self, output: Value) -> tuple[Value, int, Module | None]:
        """The first function that reads them, where among its arguments they are, and the module that it is in."""
        products = self._products(output)
        if EXPERTS in self.routing.shown:
            self._refuse_experts(products)
        shared = [steps[0] for steps in zip(*(one.stack for one in products), strict=False) if len(set(steps)) == 1]
        outer = self.layer if self.mlp is None else self.mlp  # (a compiled one has no truth value)
        if outer not in shared:
            raise _NoNeuronsError(f"no matrix of its MLP leads to what {type(outer).__name__} gives")
        inside = shared[shared.index(outer) + 1 :]
        if inside:
            down = inside[-1]
            own = [one for one in self.record.order if down in one.modules]
            read = {
                before
                for one in own
                for before in one.inputs
                if self._is_computed(before) and down not in before.modules
            }
        elif len(products) == 1:
            down, own = None, products
            read = {before for before in products[0].inputs if self._is_computed(before)}
        else:
            raise _NoNeuronsError(f"what its MLP gives comes of several matrices: {self._names(products)}")
        if len(read) != 1:
            raise _NoNeuronsError(f"{self._names(products)} reads {len(read)} values, not one")
        (neurons,) = read
        if neurons is self.record.stream or not neurons.function:
            raise _NoNeuronsError("its MLP is one matrix")
        reading = next(one for one in own if neurons in one.inputs)
        return reading, reading.places[reading.inputs.index(neurons)], down

    def _products(self, output: Value) -> list[Value]:
        """The last products with a matrix in what the MLP gives."""
        ends = [output]
        if self.mlp is not None:
            before = output.back(lambda one: self.mlp in one.modules or one is self.record.stream)
            ends = [one for one in before if self.mlp in one.modules]
        elif not self.mixers:
            raise _NoNeuronsError(self.no_mlp)

        def is_far(one: Value) -> bool:
            return one.function in MATRIX_PRODUCTS or bool(one.modules & self.mixers) or one is self.record.stream

        found = dict.fromkeys(one for end in ends for one in end.back(is_far))
        products = [one for one in found if one.function in MATRIX_PRODUCTS and not one.modules & self.mixers]
        if not products:
            why = "what its MLP gives does not show in what the layer gives" if self.mlp else self.no_mlp
            raise _NoNeuronsError(why)
        return products

    def _is_computed(self, value: Value) -> bool:
        """Whether it comes of the stream (and is no parameter, position or mask)."""
        return self.record.stream in value.back(lambda one: one is self.record.stream)

    def _refuse_experts(self, products: list[Value]) -> None:
        why = "it is a mixture of experts, each with neurons of its own"
        routing = {one for one, _ in self.routing.shown.values()}
        beside = [one for one in products if one not in routing and routing.isdisjoint(one.back(lambda _: False))]
        if beside:
            why += f", and beside them {self._names(beside)}"
        raise _NoNeuronsError(why)

    def _names(self, values: list[Value]) -> str:
        paths = {module: path for path, module in self.layer.named_modules() if path}
        named = [next((paths[m] for m in reversed(one.stack) if m in paths), "its own forward") for one in values]
        return ", ".join(dict.fromkeys(named))
