"""Joining the inputs of several blocks to one batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nnatomy.blocks.rows import Rows, flatten
from nnatomy.errors import InputError


class Joining:
    """The call of a trace whose blocks bring the inputs.

    Tensors are put together along their first axis; anything else has to be the same for all.

    Args:
        call: the module, or a function that calls it. It is called with nothing where no block has brought any.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self) -> Any:
        return self._call()

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One block's inputs, checked. Raises InputError."""
        leaves, structure = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            raise InputError("tracer.invoke(...) takes the inputs of the module: there is no tensor among these.")
        return leaves, structure, tensors[0].shape

    def join(self, prepared: Sequence[Any]) -> tuple[Callable[[], Any], list[Rows]]:
        """The call with all of them, and each one's rows."""
        leaves, structures, shapes = zip(*prepared, strict=True)
        if any(structure != structures[0] for structure in structures):
            raise InputError("The blocks of one trace need inputs of the same form, to be joined to one batch.")
        joined = [join_leaves(list(same)) for same in zip(*leaves, strict=True)]
        args, kwargs = pytree.tree_unflatten(joined, structures[0])
        seq = shapes[0][1] if len(shapes[0]) > 1 else 1
        return lambda: self._call(*args, **kwargs), rows_of([shape[0] for shape in shapes], seq)


def rows_of(counts: Sequence[int], seq: int, pads: Sequence[int] | None = None) -> list[Rows]:
    """The rows of each of several blocks, so many each, in their order."""
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [
        Rows(stop - count, stop, stops[-1], seq, pad)
        for stop, count, pad in zip(stops, counts, pads or [0] * len(counts), strict=True)
    ]


def join_leaves(leaves: list[Any]) -> Any:
    """The same argument of several blocks as one.

    Raises:
        InputError: if they are neither tensors nor the same.
    """
    if all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        shapes = {tuple(leaf.shape[1:]) for leaf in leaves}
        if len(shapes) > 1:
            raise InputError(f"Inputs of the shapes (batch, *rest) with rest in {shapes} make no one batch.")
        return torch.cat(leaves)
    if any(leaf is not leaves[0] and leaf != leaves[0] for leaf in leaves):
        raise InputError(f"The blocks of one trace share one call: an argument cannot be each of {leaves!r:.200}.")
    return leaves[0]
