"""A short forward pass that is looked into: the prompts, the hooks, and what tells the tensors in it apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd

from nnatomy.arch_configs.example import example_inputs, input_device, takes
from nnatomy.arch_configs.outputs import tensors_in

BATCH, SEQ = 2, 5


class CannotInfer(Exception):  # noqa: N818
    """The structure does not show; the text says what is missing."""


def run(model: Module) -> Any:
    """The model on prompts that are alike in nothing."""
    embedding = next((module for module in model.modules() if isinstance(module, torch.nn.Embedding)), model)
    inputs = example_inputs(model, BATCH, SEQ, input_device(embedding))
    kwargs = {"use_cache": False} if takes(model, "use_cache") else {}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs, **kwargs)
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooks(
    modules: Any, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    handles = []
    for module in modules:
        if before is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_in(value: Any) -> Tensor | None:
    """The first tensor of (batch, positions, *) in a module's arguments or results, or else of one axis for both."""
    leaves = [leaf for leaf in tensors_in(value) if leaf.is_floating_point() and leaf.ndim > 1]
    return next((leaf for leaf in leaves if leaf.ndim > 2), leaves[0] if leaves else None)


def print_of(tensor: Tensor | None) -> Any:
    """What tells a tensor from others, without holding it."""
    if tensor is None:
        return None
    exact = tensor.double()
    return tuple(tensor.shape), exact.sum().item(), exact.square().sum().item(), exact.flatten()[:3].tolist()


def has_matrix(module: Module) -> bool:
    """Whether it has weights that mix the entries of hidden states."""
    return any(
        parameter.ndim > 1
        for part in module.modules()
        if not isinstance(part, _ConvNd)
        for parameter in part.parameters(recurse=False)
    )
