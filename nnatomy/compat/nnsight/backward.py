"""`with loss.backward():`, in which tensors' `.grad` can be read and assigned.

Each gradient is asked of autograd when it is read, and an assigned one goes on from there, by a hook on the tensor. So they may
be read in any order. At the end of the block the backward pass itself runs, which fills the parameters' gradients.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from itertools import islice
from threading import local
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nnatomy.core.frames import user_frames
from nnatomy.errors import UsageError

_plain: Any = torch._C.TensorBase.grad
_here = local()


def backward(original: Callable[..., None]) -> Callable[..., Any]:
    """`Tensor.backward`: the original, but where the call is what a `with` enters."""

    @wraps(original)
    def called(
        tensor: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Any:
        def run(keep: bool | None = retain_graph) -> None:
            original(tensor, gradient, keep, create_graph, inputs)

        if enters(next(user_frames())):
            return Backward(tensor, gradient, create_graph, run)
        return run()

    return called


class Backward:
    """A backward pass whose gradients are read and edited in a block."""

    def __init__(self, loss: Tensor, gradient: Tensor | None, create_graph: bool, run: Callable[[], None]) -> None:
        self._loss, self._gradient, self._create_graph, self._run = loss, gradient, create_graph, run
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Backward:
        self._outer = getattr(_here, "backward", None)
        _here.backward = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _here.backward = self._outer
        with self._hooks:
            if kind is None:
                self._run()
        self._found.clear()

    def read(self, tensor: Tensor) -> Tensor:
        """The gradient of the loss with respect to that tensor, with the edits made so far."""
        if id(tensor) not in self._found:
            try:
                (found,) = torch.autograd.grad(
                    self._loss, tensor, self._gradient, retain_graph=True, create_graph=self._create_graph
                )
            except RuntimeError as error:
                raise UsageError(
                    f".grad of a tensor of shape {tuple(tensor.shape)}, in a `with ...backward():`: {error} A value that needs no "
                    "gradient by itself is made to, before the model goes on: value.requires_grad_(True)."
                ) from None
            self._put(tensor, found)
        return self._found[id(tensor)][1]

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Go on with that gradient."""
        if value.shape != tensor.shape:
            raise UsageError(f".grad = ... of shape {tuple(value.shape)}, for a tensor of shape {tuple(tensor.shape)}.")
        self._put(tensor, value)

    def _put(self, tensor: Tensor, value: Tensor) -> None:
        """That is its gradient from here on, also where it is changed in place."""
        key = id(tensor)
        if key not in self._found and tensor.requires_grad:
            before = value._version

            def now(_: Tensor) -> Tensor | None:
                mine = self._found[key][1]
                return None if mine is value and mine._version == before else mine

            self._hooks.callback(tensor.register_hook(now).remove)
        self._found[key] = tensor, value


def _get(tensor: Tensor) -> Any:
    inside: Backward | None = getattr(_here, "backward", None)
    return _plain.__get__(tensor) if inside is None else inside.read(tensor)


def _set(tensor: Tensor, value: Any) -> None:
    inside: Backward | None = getattr(_here, "backward", None)
    if inside is None:
        _plain.__set__(tensor, value)
    else:
        inside.write(tensor, value)


#: `Tensor.grad`, which in a `with ...backward():` of this thread is that pass's.
gradient = property(_get, _set, lambda tensor: _plain.__delete__(tensor))


def operations_after(frame: FrameType) -> list[str]:
    """The names of the two instructions behind that at which a frame stands."""
    code = dis.get_instructions(frame.f_code)
    names = (one.opname for one in code if one.offset > frame.f_lasti)
    return list(islice((name for name in names if name not in ("CACHE", "NOP", "EXTENDED_ARG")), 2))


def enters(frame: FrameType) -> bool:
    """Whether what the call at which a frame stands returns is entered by a `with`."""
    after = operations_after(frame)
    return after[:1] == ["BEFORE_WITH"] or after == ["COPY", "LOAD_SPECIAL"]
