"""A layer that is left out, and what it would have left for others beside its hidden states.

Many layers leave something: keys and values in a cache (of whose length the model makes its positions), a recurrent state,
the experts or keys that the next layer goes by, keys that later layers share. So the layer is run aside for that, on the
input that it would have had, and its hidden states are thrown away.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core import Collector, Slot
from nnatomy.core.values import Inputs
from nnatomy.standardized.hidden import input_of, with_input
from nnatomy.standardized.kept_state import Kept, states_in


def run_aside(layer: Module, inputs: Inputs, hands_on: bool) -> Any:
    """What the layer returns, in the place of whose hidden states others are put.

    What the layer keeps for later steps is there, but is no numbers: should it run in one of them, what it gives shows that
    it was not there before. Where later layers go by what it makes of that, by its keys or its choice of keys, it is as it
    would have been: they need it in every step.

    Args:
        hands_on: whether they are given some of what it returns.
    """
    states, shared = states_in(inputs), _shared(inputs)
    kept, before = Kept(states, copied=False), [dict(one) for one in shared]
    args, kwargs = with_input(inputs, input_of(inputs).clone())  # some layers add to it in place
    with torch.no_grad():
        result = layer(*args, **kwargs)
    if not hands_on and all(_is_same(one, old) for one, old in zip(shared, before, strict=True)):
        kept.spoil()
        if isinstance(result, tuple):
            result = tuple(_spoilt(one, states) for one in result)
    return result


def leaves_something(inputs: Inputs) -> bool:
    """Whether a layer is given, among its arguments, something to keep."""
    return bool(states_in(inputs) or _shared(inputs))


def _shared(inputs: Inputs) -> list[MutableMapping[Any, Any]]:
    """What layers hand things on in: keys and values, by the kind of attention."""
    args, kwargs = inputs
    return [one for one in (*args, *kwargs.values()) if isinstance(one, MutableMapping)]


def _is_same(now: MutableMapping[Any, Any], before: dict[Any, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is one for name, one in before.items())


def _spoilt(returned: Any, states: list[Any]) -> Any:
    """One thing that a layer returned; if it is a state (xLSTM's, several tensors), then no numbers."""
    if not isinstance(returned, (tuple, list)) or any(returned is state for state in states):
        return returned
    return type(returned)(
        torch.full_like(one, torch.nan) if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in returned
    )


class HandedOn(Collector):
    """Sees which layers return tensors, beside hidden states, that a later layer is given.

    Attributes:
        by: these layers.
    """

    def __init__(self, layers: tuple[Module, ...]) -> None:
        self.modules = set(layers)
        self.kinds = {"input": None, "output": None}
        self.by: set[Module] = set()
        self._returned: list[tuple[Module, Tensor]] = []

    def take(self, slot: Slot) -> None:
        if slot.kind == "output":
            rest = slot.value[1:] if isinstance(slot.value, tuple) else ()
            self._returned += [(slot.module, one) for one in rest if isinstance(one, Tensor)]
        else:
            given = pytree.tree_leaves(slot.value)
            self.by.update(module for module, one in self._returned if any(one is other for other in given))
