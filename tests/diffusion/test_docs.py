"""The page: its tables are what the table of names and a run say, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusion_written
import pytest
from diffusion_pipelines import ALL, loaded, quiet

TEXT = diffusion_written.PAGE.read_text()


def test_the_table_of_names_is_up_to_date() -> None:
    assert diffusion_written.names() in TEXT, "python tests/diffusion_written.py"


@pytest.mark.parametrize("name", list(ALL))
def test_the_table_of_pipelines_is_up_to_date(name: str) -> None:
    assert diffusion_written.line(loaded(name)) + "\n" in TEXT, "python tests/diffusion_written.py"


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder of a tiny pipeline, and with fewer steps and heads."""
    pipeline = quiet(ALL["stable_diffusion"]())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda place, **kwargs: pipeline)
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: None)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        block = re.sub(
            r"num_inference_steps=\d+", "num_inference_steps=4" if "step=3" in block else "num_inference_steps=3", block
        )
        block = block.replace('"a cat", name=', '"a cat", layers=[0], name=').replace(
            '"a dog", ', '"a dog", layers=[0], '
        )
        exec(compile(block, f"<diffusion.md, block {number}>", "exec"), names)
    assert (tmp_path / "car.png").exists()
    assert names["pixels"].shape == (1, 3, 16, 16)
    assert names["patched"].effect.shape == (4, 1)
