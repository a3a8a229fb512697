"""A run of a pipeline with what some of its modules were given and gave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core.points import Collector, Slot
from nnatomy.diffusion.anatomy import Call, names_of


class Recorder(Collector):
    """Notes the calls of some modules, in the order in which they begin.

    Attributes:
        calls: of all of them.
    """

    def __init__(self, modules: Iterable[Module], steps: int | None = None) -> None:
        self.modules = set(modules)
        self.kinds = {"input": None, "output": None}
        self.calls: list[Call] = []
        self._steps = steps
        self._versions: list[tuple[Call, Tensor, int]] = []

    def take(self, slot: Slot) -> None:
        if self._steps is not None and slot.step >= self._steps:
            return
        if slot.kind == "input":
            self.calls.append(Call(slot.module, slot.value, names_of(slot.module), slot.step, slot.call))
            return
        call = self.of(slot.module, slot.step, slot.call)
        call.output = slot.value
        for leaf in pytree.tree_leaves(slot.value):
            if isinstance(leaf, Tensor) and not leaf.is_inference():
                self._versions.append((call, leaf, leaf._version))

    def of(self, module: Module, step: int = 0, number: int = 0) -> Call:
        """One of the calls."""
        return next(one for one in self.calls if one.module is module and (one.step, one.number) == (step, number))

    def all_of(self, module: Module) -> list[Call]:
        """The calls of one module."""
        return [one for one in self.calls if one.module is module]

    def close(self) -> None:
        """Note which calls' outputs have been changed in place since."""
        for call, tensor, version in self._versions:
            call.written = call.written or tensor._version != version
        self._versions.clear()


def tensor_of(output: Any) -> Any:
    """The prediction in what a denoiser gives: a tensor, the first of a tuple, the first field of an output, a list with one for each
    picture (as a tensor with those along its first axis)."""
    if isinstance(output, dict):
        return tensor_of(next(iter(output.values())))
    if isinstance(output, list) and output and all(isinstance(one, Tensor) for one in output):
        return torch.stack(output)
    return tensor_of(output[0]) if isinstance(output, (tuple, list)) else output


def with_tensor(output: Any, new: Tensor) -> Any:
    """The same, with another prediction."""
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)(**{**output, first: with_tensor(output[first], new)})
    if isinstance(output, list) and output and all(isinstance(one, Tensor) for one in output):
        return list(new.unbind())
    if isinstance(output, (tuple, list)):
        return type(output)((with_tensor(output[0], new), *output[1:]))
    return new
