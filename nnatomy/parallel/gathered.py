"""Gathering the slices of a tensor that the ranks hold, and taking one's own slice of a whole one; with their gradients.

All ranks compute the same with a whole tensor, so that its gradient is the same on each of them, and each takes its slice of
that. A slice's gradient is another one on each rank: the whole tensor's is all of them, gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(local: Tensor, axis: int, sizes: tuple[int, ...], group: Any) -> Tensor:
    """The ranks' slices along that axis, of these sizes, one after the other."""
    whole: Tensor = _Gather.apply(local, axis % local.ndim, sizes, group)  # type: ignore[no-untyped-call]
    return whole


def own_slice(whole: Tensor, axis: int, sizes: tuple[int, ...], group: Any) -> Tensor:
    """This rank's slice of a whole tensor."""
    local: Tensor = _Slice.apply(whole, axis % whole.ndim, sizes, group)  # type: ignore[no-untyped-call]
    return local


def narrowed(whole: Tensor, axis: int, sizes: tuple[int, ...], rank: int) -> Tensor:
    """The slice of that rank, as a view."""
    return whole.narrow(axis % whole.ndim, sum(sizes[:rank]), sizes[rank])


def _all_slices(local: Tensor, axis: int, sizes: tuple[int, ...], group: Any) -> Tensor:
    most, mine = max(sizes), local.shape[axis]
    sent = local.detach().movedim(axis, 0)
    if mine < most:  # all ranks have to send as much
        sent = torch.cat([sent, sent.new_zeros((most - mine, *sent.shape[1:]))])
    sent = sent.contiguous()
    slices = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(slices, sent, group=group)
    return torch.cat([one[:size] for one, size in zip(slices, sizes, strict=True)]).movedim(0, axis).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, axis: int, sizes: tuple[int, ...], group: Any) -> Tensor:
        ctx.given = axis, sizes, dist.get_rank(group)
        return _all_slices(local, axis, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        axis, sizes, rank = ctx.given
        return narrowed(grad, axis, sizes, rank), None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, axis: int, sizes: tuple[int, ...], group: Any) -> Tensor:
        ctx.given = axis, sizes, group
        return narrowed(whole, axis, sizes, dist.get_rank(group)).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        axis, sizes, group = ctx.given
        return _all_slices(grad, axis, sizes, group), None, None, None
