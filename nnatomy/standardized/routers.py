"""The routing of a mixture of experts, found in the record of a layer's call.

The experts chosen are integers, some for each position, that what the layer gives depends on. Products with a matrix that
depend on them are the experts at work. The weights are the last numbers of the same form that multiply what these give, and
the logits what the last product before them gave, the router.
"""

from __future__ import annotations

from typing import Any

import torch

from nnatomy.arch_configs import Anatomy
from nnatomy.names import EXPERTS, LOGITS, ROUTERS, WEIGHTS
from nnatomy.standardized.record import MATRIX_PRODUCTS, SAME, Findings, Record, Value

NO_EXPERTS = "it has no experts to choose from"

_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.uint8}
_MULTIPLIES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}
#: What leaves each weight what it is, wherever it puts it.
_ARRANGES = {
    *(*SAME, "__getitem__", "index_select", "gather", "transpose", "permute", "expand", "repeat_interleave"),
}


def find_routers(anatomy: Anatomy, i: int, record: Record, output: Value) -> Findings:
    """Where layer `i` has its routing; `output` is what it gave."""
    return _Routing({*anatomy.mixers[i], anatomy.cross_attentions[i]}, record, output).find()


class _Routing:
    def __init__(self, mixers: set[Any], record: Record, output: Value) -> None:
        self.stream = record.stream
        behind = set(output.back(lambda one: one is record.stream))
        #: What the layer's output comes of, but for its token mixers, in order.
        self.order = [one for one in record.order if one in behind and not one.modules & mixers]
        self._behind: dict[Value, set[Value]] = {}

    def find(self) -> Findings:
        """All of it."""
        chosen = [one for one in self.order if one.tensor.dtype in _INTEGERS and self._is_by_position(one)]
        if not chosen:
            return Findings(absent=dict.fromkeys(ROUTERS, NO_EXPERTS))
        products = [one for one in self.order if one.function in MATRIX_PRODUCTS]
        at_work = [one for one in products if self._comes_of(one, chosen)]
        if not at_work:
            return Findings(absent=dict.fromkeys(ROUTERS, "what its experts do does not show"))
        before = self.order[: self.order.index(at_work[0])]
        inside = [module for module in at_work[0].stack if all(module in one.modules for one in at_work)][-1]
        multiplied = self._weights(at_work)
        multiplied = [one for one in multiplied if inside not in one.modules] or multiplied
        shapes = {one.tensor.shape for one in multiplied}
        experts = max(
            (one for one in chosen if one in before),
            key=lambda one: (one.tensor.shape in shapes, inside not in one.modules, before.index(one)),
        )
        findings = Findings()
        findings.add(EXPERTS, experts)
        weights = [one for one in multiplied if one.tensor.shape == experts.tensor.shape][-1:]
        for one in weights:
            is_earlier = one in before[: before.index(experts)] and one.where != experts.where
            if is_earlier:  # to be asked for behind the experts, as in every model
                findings.add_read(WEIGHTS, one, self.order[self.order.index(experts) :])
            else:
                findings.add(WEIGHTS, one)
        if not weights:
            findings.absent[WEIGHTS] = "nothing of (batch, seq, choice) multiplies what its experts give"
        scores = [one for one in before if one in products and self._comes_of(experts, [one])]
        if not scores and weights:  # a table chooses
            scores = [one for one in before if one in products and self._comes_of(weights[0], [one])]
        if scores and self._is_by_position(scores[-1]):
            findings.add(LOGITS, scores[-1])
        else:
            findings.absent[LOGITS] = "no matrix gives a number for each expert"
        return findings

    def _is_by_position(self, value: Value) -> bool:
        """Whether it has some numbers for each position, or for each of all prompts in one axis."""
        batch, seq = self.stream.tensor.shape[:2]
        return value.tensor.shape[:-1] in ((batch, seq), (batch * seq,))

    def _comes_of(self, value: Value, others: list[Value]) -> bool:
        if value not in self._behind:
            self._behind[value] = set(value.back(lambda one: one is self.stream))
        return not self._behind[value].isdisjoint(others)

    def _weights(self, at_work: list[Value]) -> list[Value]:
        """What multiplies something that comes of these, as it is but for its order; in order."""
        found: set[Value] = set()
        for product in self.order:
            if product.function in _MULTIPLIES and len(product.inputs) == 2:
                for one, other in (product.inputs, product.inputs[::-1]):
                    if self._comes_of(one, at_work):
                        found.update(self._arranged(other))
        return [one for one in self.order if one in found]

    @staticmethod
    def _arranged(value: Value) -> list[Value]:
        """It, and what it is an arrangement of."""
        found = [value]
        while value.function in _ARRANGES and value.inputs:
            value = value.inputs[0]
            found.append(value)
        return found
