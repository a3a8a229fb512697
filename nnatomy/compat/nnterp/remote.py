"""`remote=` of nnterp's functions."""

from __future__ import annotations

from typing import Any

from nnatomy.errors import InputError


def refuse_remote(name: str, remote: Any) -> None:
    """Raise InputError if a function is to run on NDIF."""
    if remote:
        raise InputError(
            f"{name}(..., remote={remote!r}): there is no NDIF here. The same function runs on a server of nnatomy's own if the "
            "model is there: nnatomy.StandardizedTransformer(name, server='http://...'). See docs/remote.md."
        )
