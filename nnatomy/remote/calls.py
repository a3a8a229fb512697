"""A function of PyTorch's on remote tensors: a command to the server, or where all that it needs is here, computed here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.errors import NotRemoteError
from nnatomy.remote.connection import Connection
from nnatomy.remote.functions import Function, leaves
from nnatomy.remote.tensor import RemoteTensor, _nothing, sent, wrap
from nnatomy.remote.wire import decode

#: What shows memory that nobody has written is asked for with zeros.
_ZEROS = {"empty_like": "zeros_like", "new_empty": "new_zeros"}


def call(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Have a function run at the server; or here, if all that it needs is here."""
    remote = [one for one in leaves(args, kwargs) if isinstance(one, RemoteTensor)]
    connection = remote[0]._connection
    if function.changes_shape or not function.is_aten:
        raise NotRemoteError(f"{function.name} of a remote tensor: take x.local(), which is an ordinary one.")
    if function.base == "_local_scalar_dense":
        return _item(args[0])
    written = function.written(args, kwargs)
    if written and (other := function.without_out) is not None:
        made = pytree.tree_leaves(
            other(*args, **{key: x for key, x in kwargs.items() if not any(x is out for out in written)})
        )
        for out, one in zip(written, made, strict=True):
            out.copy_(one)
        return written[0] if len(written) == 1 else tuple(written)
    if any(not isinstance(one, RemoteTensor) for one in written):
        return _into_local(function, args, kwargs, written)
    if function.draws and not function.is_sure(args, kwargs):
        return _drawn(function, args, kwargs)
    if function.base in _ZEROS:
        function = Function.of(getattr(getattr(torch.ops.aten, _ZEROS[function.base]), function.overload))
    needs = torch.is_grad_enabled() and any(one._needs for one in remote) and function.base != "detach"
    known = not needs and not written and all(one.here is not None for one in remote)
    if known and (not function.is_view or connection.lost):
        return function.op(*locally(args), **locally(kwargs))
    if function.base in ("index", "index_put", "index_put_"):
        args = (args[0], _without_local_masks(args[1]), *args[2:])
    shapes: Any = None if function.gives_values else function.shaped(args, kwargs)
    named = {key: sent(connection, one) for key, one in kwargs.items()}
    if shapes is None:
        _note_change(written)
        told, _ = connection.ask("op", function.name, [sent(connection, one) for one in args], named)
        return decode(
            told,
            lambda kind, of: wrap(connection, of) if kind == "t" else _nothing(kind, of),
            torch.device("cpu"),
        )
    if written:
        _note_change(written)
        connection.command("op", function.name, [sent(connection, one) for one in args], named, [None] * len(written))
        written[0]._needs = written[0]._needs or needs
        return written[0] if len(written) == 1 else tuple(written)
    shared = args[0]._changes if function.is_view and isinstance(args[0], RemoteTensor) else None
    result = partial(_result, connection, needs, shared)
    new = result(shapes) if isinstance(shapes, Tensor) else pytree.tree_map_only(Tensor, result, shapes)
    numbers = [one.number for one in pytree.tree_leaves(new)]
    connection.command("op", function.name, [sent(connection, one) for one in args], named, numbers)
    if known:
        here = function.op(*locally(args), **locally(kwargs))
        for one, value in zip(pytree.tree_leaves(new), pytree.tree_leaves(here), strict=True):
            one._fetched, one._fetched_at = value, one._changes[0]
    return new


def _result(connection: Connection, needs: bool, changes: list[int] | None, meta: Tensor) -> RemoteTensor:
    return RemoteTensor(meta, connection, connection.number(), needs and meta.dtype.is_floating_point, changes)


def _note_change(written: list[Any]) -> None:
    for one in written:
        one._changes[0] += 1


def locally(tree: Any) -> Any:
    return pytree.tree_map_only(RemoteTensor, lambda one: one.here if one.here is not None else one.local(), tree)


def _item(tensor: RemoteTensor) -> Any:
    if tensor.here is not None:
        return tensor.here.item()
    if tensor.numel() != 1:
        raise RuntimeError(f"a Tensor with {tensor.numel()} elements cannot be converted to Scalar")
    value, _ = tensor._connection.ask("item", tensor.number)
    return complex(*value["complex"]) if isinstance(value, dict) else value


def _without_local_masks(indices: Any) -> list[Any]:
    """A mask that is here says here which elements are meant."""
    found: list[Any] = []
    for one in indices:
        mask = isinstance(one, Tensor) and not isinstance(one, RemoteTensor) and one.dtype == torch.bool
        found.extend(one.nonzero(as_tuple=True) if mask else [one])
    return found


def _into_local(function: Function, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
    """Something remote is written into a local tensor: now, as nobody can know when that is read."""
    if any(isinstance(one, RemoteTensor) for one in written):
        raise NotRemoteError(f"{function.name} writes to remote and local tensors at once: take x.local().")
    return function.op(*locally(args), **locally(kwargs))


def _drawn(function: Function, args: Any, kwargs: Any) -> Any:
    """Random numbers are drawn here, by this process's generator, as those of a local model are."""
    if function.written(args, kwargs):  # h.normal_()
        target = args[0]
        drawn = function.op(
            torch.empty_strided(target.size(), target.stride(), dtype=target.dtype), *args[1:], **kwargs
        )
        return call(Function.of(torch.ops.aten.copy_.default), (target, drawn), {})
    if function.base.endswith("_like"):
        return function.op(
            torch.empty_strided(args[0].size(), args[0].stride(), dtype=args[0].dtype), *args[1:], **kwargs
        )
    if function.base == "native_dropout":
        value, chance, training = (*args, True)[:3]
        mask = torch.empty(value.shape, dtype=value.dtype)
        mask = (
            mask.bernoulli_(1 - chance).div_(1 - chance) if training and chance < 1 else mask.fill_(float(not training))
        )
        return value * mask, mask > 0
    needs = any(one._needs for one in leaves(args, kwargs) if isinstance(one, RemoteTensor))
    if torch.is_grad_enabled() and needs and function.base not in ("multinomial", "bernoulli"):
        raise NotRemoteError(
            f"{function.name}: random numbers are drawn here, through which no gradient comes. Detach it."
        )
    return function.op(*locally(args), **locally(kwargs))
