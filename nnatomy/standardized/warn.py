"""Warnings at the user's line."""

from __future__ import annotations

import sys
import warnings

from nnatomy.core.frames import is_ours


def warn(text: str) -> None:
    """Warn of what will run, but is not likely to be meant, at the innermost line that is not ours nor torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (
        is_ours(frame) or frame.f_globals.get("__name__", "").startswith("torch.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
