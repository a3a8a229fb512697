"""What stays real while a module runs over fake tensors: whole numbers and truth values that come from the arguments alone.

A forward pass may ask for values: how many image tokens there are, of how many rows and columns an image is, where a mask is true.
Those come from ids, masks and sizes, which are small. So integer and boolean arguments are not faked, and an operation of which all
tensors are real is computed; what comes of a parameter, a buffer or a floating argument is a fake, and costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import Parameter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nnatomy.errors import InputError

#: So many numbers that are no whole ones are computed, such as times of frames.
_FEW = 65_536
_INDEX = torch.ops.aten.index.Tensor


class RealWholeNumbers(TorchDispatchMode):
    """Is on within a FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @staticmethod
    def faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
        """A fake of an argument, or the argument itself where it stays real."""
        return tensor if is_whole(tensor) else mode.from_tensor(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(map(is_real, tensors)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not tensors and is_whole(func(*args, **kwargs)):  # arange, zeros, ...
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _INDEX:  # a mask that is known says how many there are
            with unset_fake_temporarily():
                args = (args[0], [index for one in args[1] for index in _numbers(one)])
        written = func._schema.is_mutable and tensors and is_real(tensors[0])
        if written:
            raise InputError(
                f"The forward pass writes what it computes among known whole numbers ({func}), and that is not there where shapes "
                "alone are computed: neither scan nor validate='shapes' can be had of it."
            )
        return func(*args, **kwargs)


def is_real(tensor: Tensor) -> bool:
    """Whether it is no fake: of whole numbers or truth values, or a few numbers that have been computed of these."""
    few = is_whole(tensor) or tensor.numel() <= _FEW
    return few and not isinstance(tensor, (FakeTensor, Parameter))


def is_whole(value: Any) -> bool:
    """Whether it is a tensor of whole numbers or truth values."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _numbers(index: Any) -> list[Any]:
    """A mask as the numbers of its places, an axis each."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and is_real(index):
        return [*index.nonzero().unbind(1)]
    return [index]
