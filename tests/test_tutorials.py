"""The notebooks of docs/tutorials, each run in a kernel of its own: no error, no warning."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.ipynb"))

# Transformers imports tqdm.auto, which says that without ipywidgets there are no bars of widgets.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="IProgress not found")
from transformers.utils import logging
logging.disable_progress_bar()
"""


def run(notebook: nbformat.NotebookNode) -> list[str]:
    """What its cells write to stderr."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_without_a_warning(path: Path) -> None:
    assert run(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


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
