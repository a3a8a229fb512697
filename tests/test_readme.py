"""The README's Python, run from top to bottom as one script, as a reader would."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_blocks_run_as_one_script(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out == "torch.Size([1, 5, 96])  Paris\n"
    assert isinstance(names["probs"], torch.Tensor)
