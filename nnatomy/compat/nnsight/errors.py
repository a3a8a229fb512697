"""Errors that are of another class in nnsight, too, so that scripts catch them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nnatomy.errors import InputError, UsageError


class ValueInputError(InputError, ValueError):
    """What is given cannot be run, or not here."""


@contextmanager
def as_value_error(*kinds: type[UsageError]) -> Iterator[None]:
    """Within, those errors are ValueErrors as well."""
    try:
        yield
    except kinds as error:
        raise ValueInputError(str(error)) from None
