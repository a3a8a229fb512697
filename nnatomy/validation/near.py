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
    """Whether it is the same, computed again in a batch in which something else has changed."""
    rounding = torch.finfo(other.dtype).eps
    return float((one - other).abs().max()) <= roundings * rounding * float(other.abs().max())


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
