"""Whether a small difference in half precision is rounding, or a wrong value.

Roundings in half precision are as large as what padding does to some models. But they are others as soon as the numbers are
others, and what padding does is not. So both runs are done once more with the stream a little changed: if their difference is
another one now, it was rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnatomy.validation.looks_ahead import last_changed

HALVES = (torch.float16, torch.bfloat16)
#: How much the stream is changed, of its largest entry: more than is rounded, too little for another difference.
_NUDGE = 1 / 32
#: How alike two differences have to be to be the same one (their cosine). Where half of one is rounding, it is this.
_ALIKE = 0.5


def is_rounding(model: Any, difference: Tensor, again: Callable[[], Tensor], sizes: Tensor) -> bool:
    """Whether a difference between two runs is another one when the first layer is given a little more.

    Args:
        difference: of the values of the two runs, of (seq, hidden).
        again: does both runs once more, and gives their difference.
        sizes: the values; where some entries of the stream are much larger than others, each counts by its size.
    """
    if model.layers_input.modules[0] is None:
        return True
    with last_changed(model, slice(None), slice(None), _NUDGE):
        other = again()
    size = sizes.double().square().mean(0).sqrt().clamp(min=1e-30)
    one, other = ((value.double() / size).flatten() for value in (difference, other))
    return bool(F.cosine_similarity(one, other, dim=0) < _ALIKE)
