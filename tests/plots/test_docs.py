"""The pages on plots and the command line: their code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from nnatomy.cli import main

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_on_plots() -> None:
    (code,) = blocks("plots.md", "python")
    names: dict[str, object] = {}
    exec(code, names)
    lens, answer = names["lens"], names["answer"]
    assert torch.tensor(lens.data[0].z).shape == (8, 5)  # type: ignore[attr-defined]
    assert answer.data[0].y[-1] > 0.9  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", blocks("command_line.md", "sh")[0].strip().split("\n"))
def test_the_commands(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line)
    assert program == "nnatomy"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_pictures_are_small() -> None:
    assert (DOCS / "command_line.png").stat().st_size < 150_000
    gallery = [*(DOCS / "gallery").glob("*.png")]
    assert sum(one.stat().st_size for one in gallery) < 500_000
    page = (DOCS / "plots.md").read_text()
    assert {one.stem for one in gallery} == set(re.findall(r"gallery/(\w+)\.png", page))
    assert {one.stem for one in gallery} == set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (page,) = [block for block in blocks("../README.md", "sh") if "nnatomy " in block and "nnatomy serve" not in block]
    monkeypatch.chdir(tmp_path)
    for line in page.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert (program, main(arguments)) == ("nnatomy", 0)
    assert (tmp_path / "patch.html").exists()
