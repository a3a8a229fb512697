"""What one client may use, and how large something is before it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

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
        tokens: of one forward pass.
        forwards: how many are open at once.
        compute_seconds: of the model and of functions, in all.
        idle_seconds: without a frame.
        sessions: of all clients.
        waiting: frames of all clients that wait for their turn.
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
    compute_seconds: float = 3600.0
    idle_seconds: float = 900.0
    sessions: int = 64
    waiting: int = 256
    runs: int = 16
    kept_bytes: int = 1 << 30
    kept_seconds: float = 600.0


_shapes = Shapes(50_000)


def check_size(op: OpOverload, args: Any, kwargs: dict[str, Any], limits: Limits, held: int) -> None:
    """Raise Refused if that would give or need more than is allowed. Nothing is computed for it.

    Raises:
        RuntimeError, IndexError, ...: as the function itself would, for shapes that do not fit.
    """
    base = op._schema.name.removeprefix("aten::")
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
        raise Refused(f"{op}: {max(elements):,} elements; {limits.elements:,} are allowed")
    if size > limits.result_bytes:
        raise Refused(f"{op}: its result has {size:,} bytes; {limits.result_bytes:,} are allowed")
    if held + size > limits.held_bytes:
        raise Refused(f"{op}: with its {size:,} bytes the session would hold more than {limits.held_bytes:,}")
    if (count := operations(base, read)) > limits.operations:
        raise Refused(f"{op}: {count:,} operations; {limits.operations:,} are allowed")


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
