"""The README's blocks, run as one script on models at servers, bind what they bind on local ones."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_blocks import leaves
from remote_server import Process, served

import nnatomy
from nnatomy import StandardizedTransformer

README = Path(__file__).parents[2] / "README.md"
#: What stands in a block that cannot be had remotely, with the reason.
SCAN = re.compile(r"with model\.scan\(.*\n(    .*\n)+")
LOCAL = {
    "attn_implementation=": "the server has loaded the model, in its own way",
    "arch_config=": "and found its names",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with served("demo:gpt2") as process:
        yield process


def run(blocks: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        filename = f"<README, block {number}>"
        linecache.cache[filename] = (len(block), None, block.splitlines(True), filename)
        exec(compile(block, filename, "exec"), names)
    return names


def test_the_blocks_bind_the_same(
    server: Process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    blocks = [SCAN.sub("", block) for block in blocks if not any(text in block for text in LOCAL)]
    assert len(blocks) >= 11
    here = run(blocks)
    printed = capsys.readouterr().out
    monkeypatch.setattr(
        nnatomy, "StandardizedTransformer", lambda name: StandardizedTransformer(name, server=server.address)
    )
    there = run(blocks)
    assert capsys.readouterr().out == printed
    compared = 0
    for name, value in here.items():
        if isinstance(value, (torch.Tensor, list, tuple, dict)) or hasattr(value, "normalized"):
            mine, its = leaves(value), leaves(there[name])
            assert len(mine) == len(its), name
            assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True)), name
            compared += len(mine)
    assert compared >= 20
    there["model"].close()
