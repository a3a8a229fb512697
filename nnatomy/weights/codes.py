"""Which entry of one value is which entry of another, seen by writing a code into each entry.

A code is a row of signs, one for each prompt of a batch, so many that no two entries have the same. What stands between the two
values may change sizes and keeps signs: a norm, a scale, a rotary embedding at position 0, where it turns by nothing. Sizes are 1
and 64 in turn, which a norm makes the same, and clipping: that shows them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: So many codes, each with its opposite.
PATTERNS = 64
ROWS = 2 * PATTERNS
_NO_SIGN = 0.02

Codes = Float[Tensor, "patterns entries"]


def codes(size: int, seed: int, patterns: int = PATTERNS) -> Codes:
    """Signs for so many entries, that are others for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (patterns, size), generator=generator) - 1


def written(signs: Codes) -> Float[Tensor, "rows entries"]:
    """What is written into the rows of a batch: the codes with sizes of 1 and 64 in turn, then their opposites."""
    sized = signs * _sizes(len(signs))
    return torch.cat([sized, -sized])


def _sizes(patterns: int) -> Tensor:
    return 1.0 + 63 * (torch.arange(patterns)[:, None] % 2)


def response(value: Float[Tensor, "rows entries"]) -> Codes:
    """What has come of the codes, without what does not depend on them."""
    value = value.detach().float().cpu()
    return (value[:PATTERNS] - value[PATTERNS:ROWS]) / 2


def match(came: Float[Tensor, "patterns values"], signs: Codes) -> Int[Tensor, " values"]:
    """By value, the one entry whose code has come; -1 where none has, or several (of a sum, where they agree).

    (Also with the other sign: a norm's scale may be negative.)
    """
    came = came.double() / came.abs().amax(1, keepdim=True).clamp(min=1e-30)
    seen = came.sign() * (came.abs() > _NO_SIGN * came.abs().amax(0))
    agree, counts = (seen.float().T @ signs).abs(), seen.abs().sum(0)
    whole = (agree == counts[:, None]) & (counts >= len(signs) / 3)[:, None]
    return torch.where(whole.sum(1) == 1, whole.int().argmax(1), -1)


def is_plain(value: Float[Tensor, "batch values"], signs: Float[Tensor, "patterns values"]) -> bool:
    """Whether a value is what was written, times one number."""
    came, sized = value[:ROWS].detach().float().cpu(), written(signs)
    factor = float((came * sized).mean() / (sized * sized).mean())
    return bool(((came - factor * sized).abs() <= 0.02 * abs(factor) * sized.abs()).all())
