"""The notebooks of docs/tutorials, each run in a kernel of its own: no error, no warning, and what they show is stored."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.ipynb"))

NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")

sys.path.insert(0, str(NOTEBOOKS[0].parent))
from run import LARGEST, texts  # noqa: E402
from run import run as executed  # noqa: E402


def run(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells write to stderr."""
    cells = executed(notebook).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_without_a_warning_and_shows_what_is_stored(path: Path) -> None:
    fresh = nbformat.read(path, as_version=4)
    assert run(fresh) == []
    shown, stored = texts(fresh), texts(nbformat.read(path, as_version=4))
    assert NUMBER.sub("#", str(shown)) == NUMBER.sub("#", str(stored)), "python docs/tutorials/run.py stores them anew"
    numbers = [[float(number) for number in NUMBER.findall(str(one))] for one in (shown, stored)]
    assert numbers[0] == pytest.approx(numbers[1], rel=2e-2, abs=1e-3)  # other machines add up in another order


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_with_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.metadata for cell in code)
    pictures = [o.data["image/png"] for cell in code for o in cell.outputs if "image/png" in o.get("data", ())]
    assert len(pictures) >= 1
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("source", ["1 / 0", "import warnings; warnings.warn('old')"])
def test_an_error_or_warning_is_seen(source: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(Exception, match="ZeroDivisionError|UserWarning"):
        run(notebook)


def test_a_line_on_stderr_is_seen() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sys; print('!', file=sys.stderr)")])
    assert run(notebook) == ["!\n"]


def test_errors_of_order_name_the_cells() -> None:
    first = "from nnatomy import Traceable\nimport torch\nnet = Traceable(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()))"
    second = "def early():\n    return net[0].output"
    third = "with net.trace(torch.ones(1)):\n    net[1].output\n    early()"
    cells = [nbformat.v4.new_code_cell(source) for source in (first, second, third)]
    with pytest.raises(Exception, match=r"asked for at cell \[3\], line 2, but .* asked for at cell \[4\], line 2"):
        run(nbformat.v4.new_notebook(cells=cells))
