"""The shapes of what functions give, found on tensors without elements: the client makes its tensors by them, and the server
knows by them how large something is before it computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def meta_of(tensor: Tensor) -> Tensor:
    """The same without elements."""
    meta = getattr(tensor, "_meta", None)
    if isinstance(meta, Tensor):
        return meta
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def on_meta(value: Any) -> Any:
    """Arguments, with tensors that have no elements."""
    if isinstance(value, Tensor):
        return meta_of(value)
    if isinstance(value, torch.device):
        return torch.device("meta")
    return type(value)(map(on_meta, value)) if type(value) in (list, tuple) else value


class Shapes:
    """What functions give on tensors without elements, remembered by the shapes of their arguments.

    Args:
        most: how many results are remembered; then it begins anew.
    """

    def __init__(self, most: int) -> None:
        self._known: dict[Any, Any] = {}
        self._most = most

    def of(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the function gives. Raises what it raises for shapes that do not fit."""
        key: Any
        try:
            key = (op, *map(_key, args), *((name, _key(one)) for name, one in kwargs.items()))
            if key in self._known:
                return self._known[key]
        except TypeError:  # something that has no hash
            key = None
        with torch.no_grad():
            made = op(*map(on_meta, args), **{name: on_meta(one) for name, one in kwargs.items()})
        if key is not None:
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = made
        return made


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return (list, *map(_key, value))
    return type(value), value
