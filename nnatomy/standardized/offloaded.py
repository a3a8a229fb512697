"""Weights that accelerate keeps in memory or on disk, and brings to a module for its forward alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.errors import a_kind


def value_of(module: Module, name: str) -> Tensor:
    """The parameter or buffer of that name; of a module that is offloaded a copy, on the device that it computes on.

    Raises:
        LookupError: for one that is on the meta device, and nothing says where its values are.
    """
    tensor: Tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            found: Tensor = one.weights_map[name]
            return found.to(found.device if one.execution_device is None else one.execution_device, copy=True)
    raise LookupError(f"the {name} of {a_kind(module)} is on the meta device: it was never loaded")
