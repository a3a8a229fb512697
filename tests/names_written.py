"""What is written from the table of `nnatomy.names`: `python tests/names_written.py` writes it, and a test compares.

It is `nnatomy/standardized/annotations.py`, the table in the docstring of `StandardizedTransformer`, and that of `docs/names.md`.
"""

from __future__ import annotations

from pathlib import Path

from nnatomy.names import TABLE, Name

ROOT = Path(__file__).parents[1]
ANNOTATIONS = ROOT / "nnatomy" / "standardized" / "annotations.py"
CLASS = ROOT / "nnatomy" / "standardized" / "transformer.py"
PAGE = ROOT / "docs" / "names.md"
OF_LAYERS = [row for row in TABLE if row.part != "model"]
OF_MODELS = [row for row in TABLE if row.part == "model"]

_MODULE = '''"""The standard names as attributes, for editors and type checkers: `python tests/names_written.py` writes this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nnatomy.standardized.accessors import LayerAccessor

if TYPE_CHECKING:
    #: A standard name of layers. (At run time a text: who is given one that there is not says which there are.)
    PointName = Literal[
NAMES
    ]
else:
    PointName = str


class Annotations:
    """A model's accessors, as `nnatomy.names` has them."""

'''


def written() -> dict[Path, str]:
    """What each file is to hold."""
    page = PAGE.read_text()
    page = _with_table(page, "| name of a layer |", OF_LAYERS)
    return {
        ANNOTATIONS: _MODULE.replace("NAMES", _names()) + _attributes(),
        CLASS: _replaced(CLASS.read_text(), "    | accessor | value |\n    |---|---|\n", _of_class()),
        PAGE: _with_table(page, "| name of the model |", OF_MODELS),
    }


def shape(row: Name) -> str:
    """Its axes, as one writes them."""
    return f"({', '.join(row.axes)})" if row.axes else ""


def _described(row: Name) -> str:
    return ": ".join(filter(None, (shape(row), row.doc)))


def _names() -> str:
    of_encoders = [f"encoder_{row.name}" for row in OF_LAYERS if row.of_encoders]
    return "\n".join(f'        "{name}",' for name in [*(row.name for row in OF_LAYERS), *of_encoders])


def _attributes() -> str:
    lines = []
    for row in OF_LAYERS:
        lines += [f"    {row.name}: LayerAccessor", f'    """{_described(row)}"""']
    for row in OF_LAYERS:
        if row.of_encoders:
            lines += [
                f"    encoder_{row.name}: LayerAccessor",
                f'    """`{row.name}` of an encoder-decoder\'s encoder"""',
            ]
    return "\n".join(lines) + "\n"


def _of_class() -> str:
    return "".join(f"    | `{row.name}` | {_described(row)} |\n" for row in OF_LAYERS)


def _with_table(page: str, head: str, rows: list[Name]) -> str:
    start = page.index(head)
    start = page.index("\n", page.index("\n", start) + 1) + 1
    lines = []
    for row in rows:
        name = f"`{row.name}`" + " (to be read only)" * (not row.assignable)
        lines.append(f"| {name} | {shape(row)} | {row.doc} | {row.refused} | {row.proved} |\n")
    return _replaced(page, page[page.index(head) : start], "".join(lines))


def _replaced(text: str, head: str, lines: str) -> str:
    """The text with other lines in its table of that head."""
    before, _, after = text.partition(head)
    rest = after.splitlines(keepends=True)
    while rest and rest[0].lstrip().startswith("|"):
        del rest[0]
    return before + head + lines + "".join(rest)


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
