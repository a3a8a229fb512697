"""A tensor whose elements are at a server. Every function of PyTorch's on it is a command there; shapes are known here.

What needs elements (`item`, `bool`, `print`, `numpy`, `tolist`) waits for them. Once a value has been fetched, and nothing has
been changed since, functions of it are computed here, and give ordinary tensors. A view of it, and whatever a gradient
goes through, stays at the server, so that a change in place and a gradient mean the same as locally.

A remote tensor says that it is on the CPU, whatever device the server has.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from nnatomy.errors import NotRemoteError, a_kind
from nnatomy.remote.connection import Connection
from nnatomy.remote.functions import Function
from nnatomy.remote.shapes import meta_of
from nnatomy.remote.wire import decode, encode, from_bytes, to_bytes


class Handle:
    """Keeps a tensor alive at the server."""

    __slots__ = ("_connection", "number")

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection, self.number = connection, number

    def __del__(self) -> None:
        if self.number >= 0:
            self._connection.dead.append(self.number)


class RemoteTensor(Tensor):
    """See above. The server computes gradients: `requires_grad` is what it is there."""

    _meta: Tensor
    _connection: Connection
    _handle: Handle
    _needs: bool
    _leaf: bool
    _retains: bool
    _fetched: Tensor | None
    _fetched_at: int
    #: How often the elements have changed, in a list that all have which may share memory.
    _changes: list[int]

    @staticmethod
    def __new__(
        cls,
        meta: Tensor,
        connection: Connection,
        number: int,
        needs: bool = False,
        changes: list[int] | None = None,
    ) -> RemoteTensor:
        one: RemoteTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        one._meta, one._connection, one._needs = meta, connection, needs
        one._handle = Handle(connection, number)
        one._leaf = one._retains = False
        one._fetched, one._fetched_at = None, -1
        one._changes = [0] if changes is None else changes
        if number >= 0:
            connection.live[number] = ref(one)
        return one

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from nnatomy.remote.gradients import with_twins
        from nnatomy.remote.special import SPECIAL

        kwargs = kwargs or {}
        if (special := SPECIAL.get(func)) is not None:
            return special(*args, **kwargs)
        if kwargs.get("requires_grad"):  # zeros_like(h, requires_grad=True)
            return func(*args, **{**kwargs, "requires_grad": False}).requires_grad_()
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = with_twins(args, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from nnatomy.remote.calls import call

        return call(Function.of(op), tuple(args), dict(kwargs or {}))

    @property
    def number(self) -> int:
        """What the server calls it."""
        return self._handle.number

    @property
    def here(self) -> Tensor | None:
        """The elements, if they have been fetched, and nothing has changed since."""
        return self._fetched if self._fetched_at == self._changes[0] else None

    def local(self) -> Tensor:
        """An ordinary tensor with its elements, and no gradient."""
        if self.here is None:
            fetch(self._connection, [self])
        assert self._fetched is not None
        return self._fetched.clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.number < 0 or self.numel() > 10**6:
            return f"<remote {self.dtype} of {tuple(self.shape)} at {self._connection.server}>"
        return f"{self.local()!r} at {self._connection.server}"

    def __format__(self, spec: str) -> str:
        return format(self.local() if self.ndim else self.item(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.local().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        if self._needs and not self._leaf:
            raise RuntimeError("Only leaf tensors have a deepcopy: detach it first.")
        return self if self.number < 0 else self.local()


def fetch(connection: Connection, tensors: list[RemoteTensor], leave_out: bool = False) -> None:
    """Have the elements of tensors here, in one answer.

    Args:
        leave_out: those whose own command has failed.
    """
    layouts, answer = connection.ask("fetch", [one.number for one in tensors], leave_out)
    blobs = iter(answer)
    for tensor, layout in zip(tensors, layouts, strict=True):
        if layout is not None:
            tensor._fetched, tensor._fetched_at = (
                from_bytes(next(blobs), layout[2], layout[0]),
                tensor._changes[0],
            )


def wrap(connection: Connection, told: Any, changes: list[int] | None = None) -> RemoteTensor:
    """A tensor that the server has told of: [number, shape, strides, dtype, whether it needs a gradient].

    Args:
        changes: see `RemoteTensor`; its own if None.
    """
    number, shape, strides, dtype, needs = told
    kind = decode({"dtype": dtype}, _nothing, torch.device("cpu"))
    return RemoteTensor(
        torch.empty_strided(shape, strides, dtype=kind, device="meta"), connection, number, needs, changes
    )


def sent(connection: Connection, value: Any, other: Any = None) -> Any:
    """A value for a frame to the server; local tensors in it go there."""
    return encode(value, partial(_sent_tensor, connection), other or _no_form)


def _sent_tensor(connection: Connection, one: Tensor) -> Any:
    if isinstance(one, RemoteTensor):
        if one._connection is not connection:
            raise NotRemoteError(
                f"A tensor at {one._connection.server} in what {connection.server} is to do: take x.local()."
            )
        return {"t": one.number}
    if (weight := connection.weights.get(id(one))) is not None:
        return {"t": weight.number}
    if one.requires_grad and torch.is_grad_enabled():
        from nnatomy.remote.gradients import twin_of

        return {"t": twin_of(connection, one).number}
    new = upload(connection, one)
    connection.pinned.append(new)
    return {"t": new.number}


def _no_form(value: Any) -> Any:
    raise NotRemoteError(f"{a_kind(value, 'A')} cannot be sent to the server of a remote model.")


def _nothing(kind: str, _: Any) -> Any:
    raise NotRemoteError(f"The server has answered with a {kind!r}, which is nothing here.")


def upload(connection: Connection, tensor: Tensor, needs: bool = False) -> RemoteTensor:
    """The same tensor at the server, with its axes in memory in the same order: which kernel is taken depends on that."""
    data = tensor.detach()
    order = sorted(range(data.ndim), key=data.stride, reverse=True)
    if not data.permute(order).is_contiguous():
        order = list(range(data.ndim))
    number, in_order = connection.number(), data.permute(order)
    meta = meta_of(in_order.contiguous()).permute([order.index(axis) for axis in range(data.ndim)])
    dtype = str(data.dtype).removeprefix("torch.")
    connection.command("put", number, dtype, list(in_order.shape), order, needs, blob=to_bytes(in_order))
    new = RemoteTensor(meta, connection, number, needs)
    new._leaf = needs
    return new
