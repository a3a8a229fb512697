"""What modulates a block: the tensor of shifts, scales and gates, found where the block's forward cuts it into these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from nnatomy.core.points import Report

#: In the order in which a block with two streams cuts them: the picture's comes first. (Validation proves it.)
KINDS = ("modulation", "text_modulation")
_CHUNK: frozenset[Any] = frozenset((torch.chunk, Tensor.chunk))


class ModulationMode(TorchFunctionMode):
    """Finds the tensors that one call of a block cuts into parts along their second axis, and that have no axis of tokens.

    Args:
        width: of the block's stream.
    """

    def __init__(self, width: int, _: Module, report: Report) -> None:
        super().__init__()
        self._width = width
        self._report = report
        self._found = 0

    @staticmethod
    def hint(_: str) -> str:
        return " The block does not cut it into its parts in this call."

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CHUNK and self._found < len(KINDS):
            own, parts, dim = _arguments(*args, **kwargs)
            if self._is_modulation(own, parts, dim):
                kind = KINDS[self._found]
                self._found += 1
                if self._report.awaited(kind):
                    with torch._C.DisableTorchFunction():
                        shown = own.reshape(own.shape[0], -1, self._width)
                    chosen = self._report(shown, kind).value
                    with torch._C.DisableTorchFunction():
                        own = own if chosen is shown else chosen.reshape(own.shape)
                    return func(own, parts, dim)
        return func(*args, **kwargs)

    def _is_modulation(self, own: Tensor, parts: int, dim: int) -> bool:
        if own.ndim == 2:
            return dim in (1, -1) and own.shape[1] % self._width == 0 and own.shape[1] >= 2 * self._width
        return own.ndim == 3 and dim in (1, -2) and own.shape[1:] == (parts, self._width)


def _arguments(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, int, int]:
    """Those of `torch.chunk`."""
    return input, chunks, dim
