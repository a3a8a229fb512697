"""Whose code a file is.

Told by where the packages lie, not by names in its path: a clone may lie in a folder of any name, and the environment in the
clone, so that every file of torch may have `nnatomy` in its path.
"""

from __future__ import annotations

from pathlib import Path

import torch

import nnatomy

_FOLDERS = {
    "us": Path(nnatomy.__file__).parent,
    "torch": Path(torch.__file__).parent,
    "user": Path(__file__).parent,  # the tests
}


def owner(file: str) -> str:
    """ "us", "torch" or "user"; "" where it is nobody's of these."""
    return next((name for name, folder in _FOLDERS.items() if Path(file).is_relative_to(folder)), "")
