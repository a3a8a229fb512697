"""Whose code a file is, wherever the clone lies."""

from __future__ import annotations

from pathlib import Path

import owners
import pytest
import torch
from owners import owner

import nnatomy.core.trace


def test_the_packages_are_told_apart() -> None:
    files = (nnatomy.core.trace.__file__, torch.nn.functional.__file__, __file__, "/usr/lib/x.py", "<stdin>")
    assert [owner(str(file)) for file in files] == ["us", "torch", "user", "", ""]


def test_the_name_of_the_clones_folder_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clone = Path("/home/me/tests/torch/nnatomy")
    torch_there = clone / ".venv/lib/site-packages/torch"
    monkeypatch.setattr(owners, "_FOLDERS", {"us": clone / "nnatomy", "torch": torch_there, "user": clone / "tests"})
    files = (
        "nnatomy/core/run.py",
        ".venv/lib/site-packages/torch/nn/f.py",
        "tests/core/x.py",
        ".venv/lib/y.py",
    )
    assert [owner(str(clone / file)) for file in files] == ["us", "torch", "user", ""]
