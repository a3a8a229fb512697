"""What counts as a whole number where layers, positions and heads are given: True and False do not."""

from __future__ import annotations

from operator import index
from typing import Any


def whole_number(given: Any) -> int:
    """A whole number of any kind (numpy's, a tensor) as an int. Raises TypeError for anything else, True and False too."""
    if is_truth(given):
        raise TypeError(f"{given!r} is no whole number")
    return index(given)


def count_of(given: Any) -> int:
    """A whole number from 1 on, such as of tokens or rows; 0 for anything else, which the caller refuses."""
    try:
        return max(0, whole_number(given))
    except TypeError:
        return 0


def is_truth(given: Any) -> bool:
    """Whether it is True or False, of which Python makes 1 and 0: a mask is no list of numbers."""
    return isinstance(given, bool) or str(getattr(given, "dtype", "")) in ("torch.bool", "bool")
