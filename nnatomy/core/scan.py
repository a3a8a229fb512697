"""Running a module over fake tensors: all shapes, nothing computed."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.errors import InputError


def on_fake_tensors(module: Module, args: Any, kwargs: Any, keep: Any = None) -> Callable[[], Any]:
    """`module(*args, **kwargs)` as a call that takes fakes of the tensors in its arguments.

    The module's parameters are turned into fakes where an operation meets them, its buffers for as long
    as it runs, and what the forward pass sets on the module (a counter, a cache) is taken back. The fakes live on the
    module's device, so that a module on the meta device, without weights, runs too.

    Args:
        keep: a mode that is on while the module runs, and says by `faked(mode, tensor)` what of the arguments stays real.
    """
    device = next((parameter.device for parameter in module.parameters()), None)

    def call() -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            on_device = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device=device), (args, kwargs))
            fake = mode.from_tensor if keep is None else lambda tensor: keep.faked(mode, tensor)
            fake_args, fake_kwargs = pytree.tree_map_only(Tensor, fake, on_device)
            before = [_state(submodule) for submodule in module.modules()]
            try:
                for submodule in module.modules():
                    submodule._buffers.update(pytree.tree_map_only(Tensor, mode.from_tensor, submodule._buffers))
                with torch.no_grad(), keep or nullcontext():
                    return module(*fake_args, **fake_kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise InputError(
                    f"The forward pass of {type(module).__name__} depends on the values of tensors ({error}), which are not "
                    "there where shapes alone are computed: neither scan nor validate='shapes' can be had of it."
                ) from error
            finally:
                for state in before:
                    for held, entries in state:
                        held.update(entries)
                        for name in held.keys() - entries.keys():
                            del held[name]

    return call


def _state(module: Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The dicts that a module keeps its attributes, tensors and children in, each with what is in it."""
    dicts = [value for value in module.__dict__.values() if isinstance(value, dict)]
    return [(held, dict(held)) for held in (module.__dict__, *dicts)]
