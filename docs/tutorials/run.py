"""Run the tutorials and store what they show: `python docs/tutorials/run.py [NAME ...]`.

A figure is stored as a picture (PNG, drawn by kaleido with Chrome or Chromium), everything else as text. Nothing stored
changes from run to run on the same machine: no times, no counts of a kernel, no addresses. A test runs them again and
compares the texts.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
LARGEST = 300_000  # bytes of a notebook

# Warnings are errors, progress bars are off, and a figure hands itself over whole, to be drawn here.
# (Transformers imports tqdm.auto, which says that without ipywidgets there are no bars of widgets.)
FIGURE = "application/vnd.plotly.v1+json"
BEFORE = f"""
import json, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="IProgress not found")
from transformers.utils import logging
logging.disable_progress_bar()
from tqdm.auto import tqdm
start = tqdm.__init__
tqdm.__init__ = lambda *args, **kwargs: start(*args, **{{**kwargs, "disable": True}})
from plotly.basedatatypes import BaseFigure
BaseFigure._repr_mimebundle_ = lambda figure, **_: {{"{FIGURE}": json.loads(figure.to_json())}}
if hasattr(BaseFigure, "_ipython_display_"):
    del BaseFigure._ipython_display_
"""


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its outputs; figures are plotly's, not drawn yet.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises or warns.
    """
    before = nbformat.v4.new_code_cell(BEFORE)
    whole = nbformat.v4.new_notebook(cells=[before, *notebook.cells])
    NotebookClient(whole, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _joined([_kept(output) for output in cell.outputs])
    return notebook


def texts(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each code cell shows, for comparison: texts as they are, of a picture that it is one."""
    return [[_text(output) for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """What is printed in pieces, whose number is chance, as one."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _kept(output: Any) -> Any:
    """A figure alone where there is one, otherwise text (and a page of HTML, where a result has one)."""
    if output.output_type in ("execute_result", "display_data"):
        data = output.data
        kept = (FIGURE,) if FIGURE in data else ("text/plain", "text/html")
        shown = {kind: data[kind] for kind in kept if kind in data}
        return nbformat.v4.new_output("display_data", shown)
    return output


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return f"{output.name}: {output.text}"
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return "picture" if {FIGURE, "image/png"} & set(output.data) else str(output.data.get("text/plain"))


def _picture(figure: dict[str, Any]) -> str:
    """A PNG with 128 colors, a third of the size that it has with all."""
    import kaleido
    from PIL import Image

    layout = figure["layout"]
    size = {"width": layout.get("width") or 720, "height": layout.get("height") or 500, "scale": 1}
    drawn = kaleido.calc_fig_sync(figure, opts={"format": "png", **size}, kopts={"mathjax": False})
    written = io.BytesIO()
    image = Image.open(io.BytesIO(drawn)).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(names: Sequence[str]) -> None:
    """Run and store the notebooks named, all if none is."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = run(nbformat.read(path, as_version=4))
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                if FIGURE in output.get("data", ()):
                    output.data = {"image/png": _picture(output.data[FIGURE])}
        stored = nbformat.writes(notebook, version=4) + "\n"
        if len(stored.encode()) > LARGEST:
            raise SystemExit(f"{path.name} would be {len(stored.encode()):,} bytes, more than {LARGEST:,}.")
        if found := re.search(
            r"/(?:home|root|work|tmp|Users)/\S*|0x[0-9a-f]{6,}", re.sub(r'"image/png": "[^"]*"', "", stored)
        ):
            raise SystemExit(f"{path.name} would hold {found[0]!r}, which is of this machine or run alone.")
        path.write_text(stored, encoding="utf-8")
        print(f"{path.name}: {len(stored.encode()) // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
