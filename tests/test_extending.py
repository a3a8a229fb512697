"""docs/extending.md: its examples run, and the code that it quotes is the code that there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run_as_one_script() -> None:
    names: dict[str, Any] = {}
    assert len(blocks("python")) == 3
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"<extending.md, block {number}>", "exec"), names)
    pattern = names["entropy"]
    assert bool((pattern > 0).any())


@pytest.mark.parametrize(("number", "file"), [(0, "nnatomy/names.py"), (1, "nnatomy/standardized/attention.py")])
def test_what_is_quoted_is_there(number: int, file: str) -> None:
    assert blocks("py")[number] in (ROOT / file).read_text()


def test_the_files_that_it_names_are_there() -> None:
    named = set(re.findall(r"`?((?:nnatomy|tests|docs|standardized)/[\w/]+(?:\.\w+)?)", PAGE))
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "nnatomy" / path).exists(), path
