"""Functions that are more, or something else, of a remote tensor than a command.

Among them those that PyTorch would take apart in a way that depends on who needs a gradient: they are sent whole, as else the last
bits would not be those of a local model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.errors import NotRemoteError
from nnatomy.remote.calls import call
from nnatomy.remote.functions import Function
from nnatomy.remote.gradients import autograd_grad, backward, grad_of, requires_grad_, retain_grad, with_twins


def _numpy(self: Any, *, force: bool = False) -> Any:
    if self._needs and torch.is_grad_enabled() and not force:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
    return self.local().numpy()


def _array(self: Any, dtype: Any = None) -> Any:
    return _numpy(self) if dtype is None else _numpy(self).astype(dtype)


def _refuse(what: str, instead: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotRemoteError(f"{what} of a remote tensor: {instead}")

    return refuse


class _Storage:
    """Tells nothing but the size: there is no memory here."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def data_ptr(self) -> int:
        return id(self._tensor)

    def nbytes(self) -> int:
        return self._tensor._meta.untyped_storage().nbytes()


def _whole(op: Any, swapped: bool = False) -> Any:
    function = Function.of(op)
    names = {one.name for one in op._schema.arguments}

    def whole(*args: Any, **kwargs: Any) -> Any:
        if swapped:
            args = (args[1], args[0], *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = with_twins(args, kwargs)
            if kwargs.keys() - names or torch._C._functorch.peek_interpreter_stack() is not None:
                return op(*args, **kwargs)
            if not torch.is_autocast_enabled("cpu"):
                return call(function, tuple(args), kwargs)
            args, kwargs = pytree.tree_map_only(Tensor, _lower, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return call(function, tuple(args), kwargs)

    return whole


def _lower(tensor: Tensor) -> Tensor:
    """As autocast has it for products: in its dtype, unless it is of a larger one than float32, or holds no such numbers."""
    lower = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype("cpu")) if lower else tensor


def _attention(*args: Any, **kwargs: Any) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    three = [given.pop(name) for name in names[:3]]
    return _SDPA(*three, **{**given, "dropout_p": float(given.get("dropout_p", 0.0))})


_SDPA = _whole(torch.ops.aten.scaled_dot_product_attention.default)
_MATMUL = torch.ops.aten.matmul.default
_OF_TENSOR: Any = Tensor
#: Functions that are more, or something else, of a remote tensor.
SPECIAL: dict[Any, Any] = {
    Tensor.backward: backward,
    torch.autograd.grad: autograd_grad,
    _OF_TENSOR.requires_grad.__get__: lambda self: self._needs,
    _OF_TENSOR.requires_grad.__set__: lambda self, on: requires_grad_(self, on) and None,
    Tensor.requires_grad_: requires_grad_,
    Tensor.retain_grad: retain_grad,
    _OF_TENSOR.retains_grad.__get__: lambda self: self._retains,
    _OF_TENSOR.grad.__get__: grad_of,
    _OF_TENSOR.is_leaf.__get__: lambda self: not self._needs or self._leaf or self.number < 0,
    Tensor.register_hook: _refuse("register_hook", "it would have to be called from the server; read .grad."),
    Tensor.data_ptr: _refuse("data_ptr", "it has no memory here; take x.local()."),
    Tensor.untyped_storage: _Storage,
    Tensor.numpy: _numpy,
    Tensor.__array__: _array,
    Tensor.tolist: lambda self: self.local().tolist(),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _whole(_MATMUL)),
    Tensor.__rmatmul__: _whole(_MATMUL, swapped=True),
    F.linear: _whole(torch.ops.aten.linear.default),
    F.scaled_dot_product_attention: _attention,
}
