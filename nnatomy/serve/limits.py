"""What one client may use, and how large something is before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from nnatomy.errors import a_kind
from nnatomy.remote.shapes import Shapes
from nnatomy.serve.policy import GIVE_VALUES, SIZED_BY_VALUES, Refused


@dataclass(frozen=True)
class Limits:
    """What one session may use; each has an error of its own.

    Attributes:
        frame_bytes: of one frame, either way.
        result_bytes: of what one function gives.
        held_bytes: of the memory of all tensors that the session holds.
        tensors: how many it holds.
        elements: of the tensors that one function reads, also where broadcasting alone makes them many.
        operations: multiplications of one function.
        commands: in one frame.
        tokens: of one forward pass, with those that its KV cache has.
        forwards: how many are open at once.
        graph_bytes: that autograd keeps for gradients.
        total_tokens: of all its forward passes.
        total_operations: multiplications of all functions and forward passes; backward passes are not counted.
        compute_seconds: of the model and of functions, in all.
        command_seconds: of one command: a function, a forward pass up to where it stands, or a backward pass. It is looked at
            before each layer and each gradient.
        idle_seconds: without a frame.
        total_seconds: from its beginning.
        send_seconds: until what it is sent has been read.
        sessions: of all clients.
        waiting: frames of all clients that wait for a model; where so many do, no new session is opened.
        runs: methods run whole for one key that are at work.
        kept_bytes: of the results that are kept for one key: the oldest go first.
        kept_seconds: how long a result is kept.
    """

    frame_bytes: int = 256 << 20
    result_bytes: int = 256 << 20
    held_bytes: int = 1 << 30
    tensors: int = 50_000
    elements: int = 1 << 28
    operations: int = 10**12
    commands: int = 20_000
    tokens: int = 16_384
    forwards: int = 8
    graph_bytes: int = 4 << 30
    total_tokens: int = 10**9
    total_operations: int = 10**18
    compute_seconds: float = 3600.0
    command_seconds: float = 120.0
    idle_seconds: float = 900.0
    total_seconds: float = 86_400.0
    send_seconds: float = 300.0
    sessions: int = 64
    waiting: int = 256
    runs: int = 16
    kept_bytes: int = 1 << 30
    kept_seconds: float = 600.0


class Used:
    """What a session has used so far.

    Attributes:
        tokens: of forward passes.
        operations: multiplications.
    """

    def __init__(self, limits: Limits) -> None:
        self.tokens = self.operations = 0
        self._limits = limits

    def add(self, tokens: int, operations: int) -> None:
        """Count what is to be computed now. Raises Refused if that is more than a session may use."""
        self.tokens += tokens
        self.operations += operations
        for name, used, most in (
            ("total_tokens", self.tokens, self._limits.total_tokens),
            ("total_operations", self.operations, self._limits.total_operations),
        ):
            if used > most:
                what = name.removeprefix("total_")
                raise Refused(f"this session has used up its {most:,} {what}", name)


_shapes = Shapes(50_000)


def check_size(op: OpOverload, args: Any, kwargs: dict[str, Any], limits: Limits, held: int) -> int:
    """How many multiplications that is, about. Nothing is computed for it.

    Raises:
        Refused: if it would give or need more than is allowed.
        RuntimeError, IndexError, ...: as the function itself would, for shapes that do not fit.
    """
    base = op._schema.name.removeprefix("aten::")
    if base in _LISTS and (many := _LISTS[base](*args, **kwargs)) > limits.tensors:
        raise Refused(f"{op}: {many:,} tensors; {limits.tensors:,} are allowed", "tensors")
    read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    elements = [one.numel() for one in read]
    if base in GIVE_VALUES:
        size = 0
    elif base in SIZED_BY_VALUES and (base in ("nonzero", "masked_select") or _has_mask(args)):
        rows = 8 * max(1, read[0].ndim) if base == "nonzero" else read[0].element_size()
        elements.append(
            prod(torch.broadcast_shapes(*(one.shape for one in read))) if base == "masked_select" else elements[0]
        )
        size = elements[-1] * rows
    else:
        most, size = _predicted(op, args, kwargs)
        elements.append(most)
    if max(elements, default=0) > limits.elements:
        raise Refused(f"{op}: {max(elements):,} elements; {limits.elements:,} are allowed", "elements")
    if size > limits.result_bytes:
        raise Refused(f"{op}: its result has {size:,} bytes; {limits.result_bytes:,} are allowed", "result_bytes")
    if held + size > limits.held_bytes:
        raise Refused(
            f"{op}: with its {size:,} bytes the session would hold more than {limits.held_bytes:,}", "held_bytes"
        )
    if (count := operations(base, read)) > limits.operations:
        raise Refused(f"{op}: {count:,} operations; {limits.operations:,} are allowed", "operations")
    return count


def check_put(new: Any, old: Any, limits: Limits, wider: int = 1) -> None:
    """Raise Refused for what is not to be put in the place of something in a forward pass.

    What is too large would have the pass compute more than its tokens say, and so would another number where a function is
    given a size.

    Args:
        wider: so many times larger it may be.
    """
    leaves, known = pytree.tree_leaves(new), pytree.tree_leaves(old)
    sizes, most = ([one.numel() for one in each if isinstance(one, Tensor)] for each in (leaves, known))
    if sum(sizes) > max(wider * sum(most), _SMALL):
        raise Refused(f"{sum(sizes):,} elements in the place of {sum(most):,}", "elements")
    rows = [one.shape[:-1].numel() for one in leaves if isinstance(one, Tensor) and one.ndim == 3]
    if max(rows, default=0) > limits.tokens:
        raise Refused(f"{max(rows):,} tokens in a forward pass; {limits.tokens:,} are allowed", "tokens")
    for one in leaves:
        if isinstance(one, (Tensor, bool, float, complex)) or one is None:
            continue
        if not any(one is other or (type(one) is type(other) and one == other) for other in known):
            raise Refused(f"{a_kind(one)} that has not been there: tensors and switches can be put")


#: So many elements can always be put.
_SMALL = 1 << 16
#: What gives a list of views, which take memory though they share their elements: how many, by its arguments.
_LISTS: dict[str, Callable[..., int]] = {
    "unbind": lambda of, dim=0: of.shape[dim] if of.ndim else 0,
    "split": lambda of, size, dim=0: 0 if isinstance(size, list) else of.shape[dim] // max(1, size),
}


def _predicted(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> tuple[int, int]:
    """The most elements of a tensor that it gives, and the bytes of all."""
    made = [one for one in pytree.tree_leaves(_shapes.of(op, args, kwargs)) if isinstance(one, Tensor)]
    return max((one.numel() for one in made), default=0), sum(one.untyped_storage().nbytes() for one in made)


def _has_mask(args: Any) -> bool:
    return any(
        isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in pytree.tree_leaves(args[1:])
    )


def operations(base: str, read: list[Tensor]) -> int:
    """About how many multiplications that is, of what does many for each element."""
    if base in (
        "mm",
        "bmm",
        "matmul",
        "linear",
        "addmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "dot",
        "addr",
        "ger",
    ):
        left, right = read[:2] if base in ("mm", "bmm", "matmul", "linear", "mv", "dot", "ger") else read[-2:]
        rows = right.shape[-2] if base == "linear" and right.ndim > 1 else right.shape[-1] if right.ndim > 1 else 1
        return max(left.numel() * rows, left.numel() // max(1, left.shape[-1] if left.ndim else 1) * right.numel())
    if "attention" in base and len(read) > 1:
        return 2 * read[0].numel() * (read[1].shape[-2] if read[1].ndim > 1 else 1)
    if "linalg" in base and read and read[0].ndim > 1:
        return 20 * read[0].numel() * max(read[0].shape[-2:])
    if base == "cdist" and len(read) > 1:
        return read[0].numel() * read[1].numel()
    if base in ("isin", "searchsorted", "bucketize") and len(read) > 1:
        return sum(one.numel() for one in read) * 64
    return sum(one.numel() for one in read)
