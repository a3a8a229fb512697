"""Models whose parameters are gathered for a module's call and let go behind it: FSDP2 (`fully_shard`).

Its hooks stand on the modules that it was applied to. So three things are to be seen to where a module is run by us: a
part of it alone has not what a module around it would gather; the module that is run first is taken for the root; and a
pass that is left in its midst leaves what it had gathered, and FSDP's own record of where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nnatomy.errors import InputError


class Shards:
    """The modules of a model that gather parameters for their calls; none, where FSDP2 was not applied to it.

    Args:
        split: whether Transformers has split it over processes by a plan, which makes whole values of what they compute.

    Raises:
        InputError: if parameters are split over processes, and not gathered.
    """

    def __init__(self, model: Module, *, split: bool = False) -> None:
        self._modules: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        gathered = {id(each) for module in self._modules for each in _own(module)}
        for name, each in model.named_parameters():
            if not split and isinstance(each, DTensor) and id(each) not in gathered and each.device_mesh.size() > 1:
                raise InputError(
                    f"{name} is split over {each.device_mesh.size()} processes, each of which computes with its own heads and "
                    "neurons, and not by a plan that Transformers knows of: what a name gave would be a slice of what it means. "
                    "Split the model by from_pretrained(..., distributed_config=DistributedConfig(tp_plan='auto')), or with "
                    "torch.distributed.fsdp.fully_shard, which gathers parameters for each call."
                )

    def __bool__(self) -> bool:
        return bool(self._modules)

    @property
    def can_be_left(self) -> bool:
        """Whether a pass may be left in its midst: not where a backward pass is to reduce gradients of it."""
        if not self._modules:
            return True
        return not torch.is_grad_enabled() and hasattr(FSDPModule, "reset_iter_state")

    def around(self, *parts: Module | None) -> list[Any]:
        """Those that gather something of these parts, and do not run when a part is called by itself."""
        return [one for one in self._modules for part in parts if part is not None and _is_within(part, one)]

    @contextmanager
    def gathered(self, *parts: Module | None) -> Iterator[None]:
        """For calls of these parts by themselves; before and behind it the same is gathered.

        (With gradients more is gathered behind it, as a backward pass needs that.)
        """
        before, around = self._gathered(), self.around(*parts)
        for module in around:
            module.unshard()
        try:
            yield
        finally:
            self._put_back(before, [] if torch.is_grad_enabled() else around)

    def in_order(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call; behind it what was gathered before is so again, also where it raises or is cancelled."""
        if not self._modules:
            return call

        def called() -> Any:
            before = self._gathered()
            try:
                return call()
            except BaseException:
                self.leave()
                raise
            finally:
                self._put_back(before, [])

        return called

    def leave(self) -> None:
        """Let go what a pass that was left in its midst has gathered."""
        for module in self._modules:
            if self.around(module) or not hasattr(module, "reset_iter_state"):
                continue
            try:
                module.reset_iter_state()
            except RuntimeError:  # the model is part of another one, which has the root, and lets go of the rest
                for one in self._modules:
                    one.reshard()

    def refuse_inner_gradients(self, what: str) -> None:
        """Raise InputError: FSDP gathers parameters for a backward pass that comes through a module's output, and for no other."""
        if self._modules:
            raise InputError(
                f"{what} takes gradients from inside of a layer, where the parameters of a model in the hands of FSDP2 are not "
                "gathered for a backward pass. Take the model as it is before fully_shard."
            )

    def kind(self, parameter: Any) -> Any:
        """The type, dtype and shape of a parameter: what it has both while it is gathered and while it is not."""
        if parameter is None or not self._modules:
            return None if parameter is None else (type(parameter), parameter.dtype, parameter.shape)
        return Parameter, None, parameter.shape  # it may be gathered in another dtype

    def _gathered(self) -> list[Any]:
        """Those whose parameters are plain tensors."""
        return [one for one in self._modules if not any(isinstance(each, DTensor) for each in _own(one))]

    @staticmethod
    def _put_back(before: list[Any], around: list[Any]) -> None:
        for module in before:
            module.unshard()
        for module in around:
            if module not in before:
                module.reshard()


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """What a tensor that is no plain one holds: all of it, if it is a shard; its codes and scales, if it is quantized."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _is_within(part: Module, module: Module) -> bool:
    return part is not module and any(one is part for one in module.modules())


def _own(module: Any) -> Iterator[Tensor]:
    """The parameters that a module gathers: not those of modules in it that do themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)
