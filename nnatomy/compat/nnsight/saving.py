"""`.save()` on everything, and `with loss.backward():`, while a trace of this room is open.

Values need no saving here: `.save()` returns what it is called on. As in nnsight it is there on anything: on lists, tuples and
outputs too. For that `object` itself is given the method, which Python's own syntax does not allow: its dict is written.
It is taken off again when the last trace is left; the rest of the library never does this.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch

from nnatomy.compat.nnsight.backward import backward, gradient

Value = TypeVar("Value")

_lock = Lock()
_open = 0
_tensor_backward: Any = None


def save(value: Value) -> Value:
    """Return the value: what a block has bound is there after it, saved or not."""
    return value


def _save(self: Any) -> Any:
    """Return the value: what a block has bound is there after it, saved or not."""
    return self


@contextmanager
def mounted() -> Iterator[None]:
    """Within, everything has `.save()`, and a tensor's `backward` may be entered."""
    mount()
    try:
        yield
    finally:
        unmount()


def mount() -> None:
    """Put both on, or count one more who needs them."""
    global _open, _tensor_backward
    with _lock:
        _open += 1
        if _open > 1:
            return
        _of_object({"save": _save})
        _tensor_backward = torch.Tensor.backward
        torch.Tensor.backward = backward(_tensor_backward)  # type: ignore[method-assign]
        torch.Tensor.grad = gradient  # type: ignore[assignment]


def unmount() -> None:
    """Take both off again, with the last who needed them."""
    global _open
    with _lock:
        _open -= 1
        if _open:
            return
        _of_object({"save": None})
        torch.Tensor.backward = _tensor_backward  # type: ignore[method-assign]
        del torch.Tensor.grad


def _of_object(methods: dict[str, Any]) -> None:
    """Give `object` those methods, or take them off where they are None."""
    names: dict[str, Any] = next(one for one in gc.get_referents(object.__dict__) if isinstance(one, dict))
    for name, method in methods.items():
        if method is None:
            names.pop(name, None)
        else:
            names[name] = method
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(object))
