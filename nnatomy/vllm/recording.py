"""What every module of the engine's model is given and gives in one pass, to find and check names on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.core.points import Collector, Slot
from nnatomy.vllm.places import Path, tensors_in


class Found(NamedTuple):
    """A tensor at a point, and the path to it in the point's value.

    Attributes:
        value: (tokens, ...).
        in_batch: whether it has an axis of one before the tokens': the engine runs some models on the classes of Transformers.
    """

    path: Path
    value: Tensor
    in_batch: bool


class Recorder(Collector):
    """The tensors of all tokens at each point, in copies: the engine's kernels change them in place later on.

    Attributes:
        points: by module and kind, of its first call.
        order: the modules in the order in which they are called.
        calls: how often each is called.
        others: by module and kind, whether its value holds a tensor at all.
    """

    def __init__(self, modules: Iterable[Module], tokens: int) -> None:
        self.modules = set(modules)
        self.kinds = {"input": None, "output": None}
        self.points: dict[tuple[Module, str], list[Found]] = {}
        self.order: list[Module] = []
        self.calls: dict[Module, int] = {}
        self._tokens = tokens

    def take(self, slot: Slot) -> None:
        if slot.step:
            return
        if slot.kind == "input":
            self.calls[slot.module] = self.calls.get(slot.module, 0) + 1
            if slot.call == 0:
                self.order.append(slot.module)
        if slot.call == 0:
            found = tensors_in(slot.value, self._is_of_tokens)
            self.points[slot.module, slot.kind] = [self._found(path, value) for path, value in found]

    def _is_of_tokens(self, value: Tensor) -> bool:
        return (
            value.ndim > 1
            and value.is_floating_point()
            and self._tokens in (len(value), value.shape[1] if len(value) == 1 else 0)
        )

    def _found(self, path: Path, value: Tensor) -> Found:
        in_batch = len(value) != self._tokens
        return Found(path, (value[0] if in_batch else value).clone(), in_batch)

    def streams(self, module: Module | None, kind: str, width: int) -> list[Found]:
        """Those of (tokens, width)."""
        found: list[Any] = [] if module is None else self.points.get((module, kind), [])
        return [one for one in found if one.value.shape[1:] == (width,)]


def total(found: list[Found]) -> Tensor:
    """Their sum, as the engine adds them up."""
    return torch.stack([one.value for one in found]).sum(0) if len(found) > 1 else found[0].value
