"""What modules and models give: the tensors in it, and the logits, in whatever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists, dicts, model outputs and dataclasses, in their order."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def logits_of(result: Any) -> Tensor | None:
    """The logits in what a model returns: its `logits`, or else that itself, or the first of a tuple; None if there are none."""
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if named is not None or isinstance(result, Mapping):
        return named
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return first if isinstance(first, Tensor) and first.ndim == 3 and first.is_floating_point() else None


def with_logits(result: Any, logits: Tensor) -> Any:
    """What a model returned, with other logits in it."""
    if isinstance(result, Tensor):
        return logits
    if hasattr(result, "logits"):
        result.logits = logits
        return result
    if isinstance(result, Mapping):
        return type(result)(**{**result, "logits": logits})
    return type(result)((logits, *result[1:]))
