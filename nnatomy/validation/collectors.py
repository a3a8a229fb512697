"""What goes along with a forward pass of the validation's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_flatten, tree_unflatten

from nnatomy.arch_configs import tensors_in
from nnatomy.core import Collector, Slot


class Seen(Collector):
    """All the values of all calls of some modules."""

    def __init__(self, modules: set[Module], kinds: dict[str, Any]) -> None:
        self.modules = modules
        self.kinds = kinds
        self.calls: dict[tuple[Module, str], list[Any]] = {}
        self._versions: list[tuple[Module, str, Tensor, int]] = []

    def take(self, slot: Slot) -> None:
        leaves, structure = tree_flatten(slot.value, is_leaf=_is_opaque)  # a KV cache is not looked into
        with torch._C.DisableTorchFunction():  # no call of the model's: taps need not look into it
            kept = [_cloned(leaf) for leaf in leaves]  # whatever becomes of it
        self.calls.setdefault((slot.module, slot.kind), []).append(tree_unflatten(kept, structure))
        for tensor in tensors_in(leaves):
            version = -1 if tensor.is_inference() else tensor._version
            self._versions.append((slot.module, slot.kind, tensor, version))

    def changed_later(self, kind: str) -> set[Module]:
        """The modules whose value at that point the model changed in place afterwards."""
        return {
            module
            for module, at, tensor, version in self._versions
            if at == kind and (tensor.is_inference() or tensor._version != version)
        }

    def of(self, module: Module, kind: str) -> list[Any]:
        return self.calls.get((module, kind), [])

    def only(self, module: Module, kind: str) -> Any:
        (value,) = self.calls[module, kind]
        return value

    def first_tensors(self, module: Module) -> Iterator[Tensor]:
        """The module's input and output, where it is called once, with and giving a tensor."""
        for value in self.of(module, "input"):
            yield from (arg for arg in value[0] if isinstance(arg, Tensor))
        yield from (value for value in self.of(module, "output") if isinstance(value, Tensor))


class Each(Collector):
    """Does something at each point."""

    def __init__(self, modules: set[Module], kinds: dict[str, Any], take: Callable[[Slot], None]) -> None:
        self.modules = modules
        self.kinds = kinds
        self._take = take

    def take(self, slot: Slot) -> None:
        self._take(slot)


def _cloned(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        new = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(new, field.name, _cloned(getattr(leaf, field.name)))
        return new
    return leaf


def _is_opaque(value: Any) -> bool:
    return not isinstance(value, (tuple, list, dict))
