"""How near two values are, and how near they have to be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: How far values that are computed in two ways may be apart, relative to the largest, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether it is the same bit for bit."""
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def is_near(one: Tensor, other: Tensor, roundings: int = 1000) -> bool:
    """Whether it is the same, computed again in a batch in which something else has changed.

    So many roundings may have made a difference; in half precision no more than `TOLERANCE` says, or anything would be near.
    """
    allowed = min(roundings * torch.finfo(other.dtype).eps, TOLERANCE.get(other.dtype, 1.0))
    return float((one - other).abs().max()) <= allowed * float(other.abs().max())


def slack_of_sums(dtype: torch.dtype) -> float:
    """How far from 1 the sum of a distribution may be whose entries are rounded to that dtype."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def distance(one: Tensor, other: Tensor) -> float:
    """How far `one` is from `other`, relative to the largest entry of `other`, but those that stand for minus infinity.

    Infinite where one has values that are no numbers.
    """
    if one.shape != other.shape:
        return float("inf")
    sizes = other.abs()
    scale = max(float(sizes.where(sizes < torch.finfo(other.dtype).max / 2, 0).max()), 1e-30)
    off = float((one.float() - other.float().to(one.device)).abs().max()) / scale
    return float("inf") if math.isnan(off) else off
