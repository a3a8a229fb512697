"""The page's Python, run from top to bottom as one script; what it says is printed is."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "plans.md"


def test_the_blocks_run_as_one_script(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        filename = f"<plans.md, block {number}>"
        linecache.cache[filename] = (len(block), None, block.splitlines(True), filename)
        exec(compile(block, filename, "exec"), names)
    printed = capsys.readouterr().out
    for text in re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL):
        assert text.strip().removesuffix("...") in printed
    assert "the same model; all numbers are equal, bit for bit" in printed
    assert len(names["of_edits"].blocks) == 2
    assert "positions(-1)" in str(names["of_a_block"])
