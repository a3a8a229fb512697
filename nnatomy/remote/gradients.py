"""Gradients of remote tensors: the graph is the server's. A local tensor that needs a gradient has a twin there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.errors import NotRemoteError
from nnatomy.remote.connection import Connection
from nnatomy.remote.functions import leaves
from nnatomy.remote.tensor import RemoteTensor, fetch, sent, upload, wrap

#: By connection and local tensor, the twin, until the next backward: (local, its version, twin).
_twins: dict[tuple[int, int], tuple[Tensor, int, RemoteTensor]] = {}


def with_twins(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments, with local tensors that need a gradient at the server."""
    if not torch.is_grad_enabled():
        return args, kwargs
    found = leaves(args, kwargs)
    if not any(_wants_twin(one) for one in found):
        return args, kwargs
    remote = next((one for one in found if isinstance(one, RemoteTensor)), None)
    if remote is None:
        return args, kwargs
    connection = remote._connection
    return pytree.tree_map_only(
        Tensor, lambda one: twin_of(connection, one) if _wants_twin(one) else one, (args, kwargs)
    )


def _wants_twin(one: Any) -> bool:
    return isinstance(one, Tensor) and not isinstance(one, RemoteTensor) and one.requires_grad


def twin_of(connection: Connection, local: Tensor) -> RemoteTensor:
    """The same at the server, where its gradient gathers. (A weight that is there too gets none, as the server's do.)"""
    if (weight := connection.weights.get(id(local))) is not None:
        return weight
    key = id(connection), id(local)
    known = _twins.get(key)
    if known is not None and known[0] is local and known[1] == local._version:
        return known[2]
    twin = upload(connection, local, needs=True)
    _twins[key] = local, local._version, twin
    return twin


def _pairs(connection: Connection) -> list[tuple[Tensor, RemoteTensor]]:
    return [(local, twin) for (owner, _), (local, _, twin) in _twins.items() if owner == id(connection)]


def _forget(connection: Connection) -> None:
    for key in [key for key in _twins if key[0] == id(connection)]:
        del _twins[key]


def backward(
    self: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    connection = self._connection
    if not self._needs:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    if create_graph:
        raise NotRemoteError(
            "backward(create_graph=True) of a remote tensor: take torch.autograd.grad, or a local model."
        )
    each: list[Any] | None = None if inputs is None else [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if each is not None and not all(isinstance(one, RemoteTensor) for one in each):
        raise NotRemoteError("backward(inputs=...) with local tensors among them: leave out `inputs`.")
    numbers = None if each is None else [one.number for one in each]
    connection.gradients[0] += 1
    connection.command("backward", self.number, sent(connection, gradient), retain_graph, False, numbers)
    grads = [(local, grad_of(twin)) for local, twin in _pairs(connection)]
    used = [(local, grad.local()) for local, grad in grads if grad is not None]
    if not retain_graph:
        _forget(connection)
    if used:
        torch.autograd.backward(
            [local for local, _ in used], [grad for _, grad in used], retain_graph=retain_graph or None
        )


def autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    only_inputs: bool = True,  # noqa: ARG001 - as torch has it
    allow_unused: Any = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """As `torch.autograd.grad`. The gradients of local inputs come by way of their twins, and go on in the local graph."""
    outs: list[Any] = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted: list[Any] = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs
    local = [one for one in wanted if not isinstance(one, RemoteTensor)]
    if is_grads_batched or not all(isinstance(one, RemoteTensor) for one in outs) or (local and create_graph):
        raise NotRemoteError("torch.autograd.grad of remote and local tensors in that way: take a local model.")
    connection = outs[0]._connection
    remote = [one for one in wanted if isinstance(one, RemoteTensor)]
    pairs = _pairs(connection) if local else []
    asked = [*remote, *(twin for _, twin in pairs)]
    sent_given = None if given is None else [sent(connection, one) for one in given]
    command = [
        [one.number for one in outs],
        [one.number for one in asked],
        sent_given,
        retain_graph,
        create_graph,
    ]
    if not asked:  # local inputs that nothing at the server has come of
        found: list[Any] = []
    elif allow_unused or materialize_grads or pairs:
        told, _ = connection.ask("grads", *command)
        found = [None if one is None else wrap(connection, one["t"]) for one in told]
    else:
        numbers = [connection.number() for _ in asked]
        connection.command("grads", *command, numbers)
        metas = [one._meta for one in asked]
        found = [
            RemoteTensor(torch.empty_like(meta), connection, number, create_graph)
            for meta, number in zip(metas, numbers, strict=True)
        ]
    from_remote = iter(found[: len(remote)])
    from_local = iter(_onwards(local, pairs, found[len(remote) :], retain_graph) if local else ())
    result = [next(from_remote) if isinstance(one, RemoteTensor) else next(from_local) for one in wanted]
    if materialize_grads:
        result = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, result, strict=True)]
    elif not allow_unused and any(one is None for one in result):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this is "
            "the desired behavior."
        )
    return tuple(result)


def _onwards(
    local: list[Tensor], pairs: list[tuple[Tensor, RemoteTensor]], grads: list[Any], retain: Any
) -> tuple[Any, ...]:
    """The gradients of local inputs, from those of the twins."""
    used = [(one, grad) for (one, _), grad in zip(pairs, grads, strict=True) if grad is not None]
    if not used:
        return (None,) * len(local)
    fetch(used[0][1]._connection, [grad for _, grad in used])
    if not retain:
        _forget(used[0][1]._connection)
    return torch.autograd.grad(
        [one for one, _ in used],
        local,
        [grad.local() for _, grad in used],
        allow_unused=True,
        retain_graph=retain,
    )


def grad_of(self: Any) -> RemoteTensor | None:
    if not self._needs or self.number < 0:
        return None
    told, _ = self._connection.ask("gradient", self.number)
    return None if told is None else wrap(self._connection, told["t"], self._connection.gradients)


def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
    if self.number < 0:
        raise NotRemoteError(
            "requires_grad_() of a parameter of a remote model: they are everybody's. Train something of your own."
        )
    self._connection.command("needs", self.number, requires_grad)
    self._needs = self._leaf = requires_grad
    return self


def retain_grad(self: Any) -> None:
    self._retains = True
    self._connection.command("retain", self.number)


_apply_of_torch: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(one, RemoteTensor) and one._needs for one in leaves(args, kwargs)):
        raise NotRemoteError(
            f"{cls.__name__} is a torch.autograd.Function: its backward cannot run at the server, and the gradient would lack what "
            "comes that way. Write it with functions of PyTorch's, or use a local model."
        )
    return _apply_of_torch(cls, *args, **kwargs)


def refuse_functions_of_the_users() -> None:
    """Have functions with a backward of their own refuse remote tensors that need gradients: these would silently be cut.

    Nothing but this sees their call. It is done when the first remote model is made, and does nothing to other tensors.
    """
    torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment,method-assign]
