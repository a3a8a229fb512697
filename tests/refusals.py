"""What scripts of tests ask of a wrong input, outside of pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnatomy.errors import InputError


def refused(ask: Callable[[], Any], says: str) -> None:
    """It has to raise an InputError that begins so."""
    try:
        ask()
    except InputError as error:
        assert str(error).startswith(says), error
    else:
        raise AssertionError(says)
