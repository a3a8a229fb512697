"""The Python of each page of docs, run as one script on models at a server, binds what it binds on local ones."""

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

DOCS = Path(__file__).parents[2] / "docs"
#: Pages that a server's models cannot have, with the reason.
LOCAL = {
    "diffusion": "pipelines are not served",
    "from_nnterp": "its class is one of a compat room",
    "extending": "arch_config=...: the server has loaded the model, and found its names",
    "from_transformer_lens": "it has the weights by standard names, see below",
    "images": "its model is built on the page, and a server takes tokens alone",
    "plans": "it prints plans, and a recording on a remote model has `h[:, -1] *= 0.5` as two lines, of which one changes nothing",
    "states": "its models are built on the page",
    "vllm": "its models need vLLM, which has an environment of its own",
    "weights": "the weights by standard names are found by torch.unique, which a server refuses: any size may come of it",
}
PAGES = [
    page
    for page in sorted((*DOCS.glob("*.md"), *(DOCS / "methods").glob("*.md")))
    if "```python" in page.read_text() and page.stem not in LOCAL
]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    torch.set_num_threads(1)
    with served("demo:gpt2", "demo:llama") as process:
        yield process


def run(page: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        filename = f"<{page.name}, block {number}>"
        linecache.cache[filename] = (len(block), None, block.splitlines(True), filename)
        exec(compile(block, filename, "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_bind_the_same(
    page: Path, server: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    here = run(page)
    printed = capsys.readouterr().out
    opened: list[Any] = []

    def remote(name: str) -> Any:
        opened.append(StandardizedTransformer(name, server=server.address))
        return opened[-1]

    monkeypatch.setattr(nnatomy, "StandardizedTransformer", remote)
    monkeypatch.chdir(tmp_path / "there")
    there = run(page)
    assert capsys.readouterr().out == printed
    assert opened
    compared = 0
    for name, value in here.items():
        if isinstance(value, (torch.Tensor, list, tuple, dict)) or type(value).__module__.startswith("nnatomy.methods"):
            mine, its = leaves(value), leaves(there[name])
            assert len(mine) == len(its), name
            assert all(
                torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(mine, its, strict=True)
            ), name
            compared += len(mine)
    for one in opened:
        one.close()
    assert compared
