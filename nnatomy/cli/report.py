"""What a command found: as data, as text for a terminal, and as a page."""

from __future__ import annotations

import html
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnatomy.errors import MissingPackageError
from nnatomy.plots.labels import visible, width
from nnatomy.plots.look import Figure, css
from nnatomy.plots.save import save

_PIPE = 160  # columns, where there is no terminal
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{look}body {{ margin: 1.5rem; background: var(--paper); color: var(--ink) }}
pre {{ font: 14px/1.45 ui-monospace, 'DejaVu Sans Mono', monospace; overflow-x: auto }}
.bold {{ font-weight: bold }} .dim {{ color: var(--soft) }} .green {{ color: var(--good) }} .red {{ color: var(--bad) }}
</style></head><body><pre>{code}</pre></body></html>
"""


@dataclass(frozen=True)
class Report:
    """What a command found.

    Attributes:
        data: for `--json`.
        table: a rich renderable for that many columns.
        figure: the plot; None if the command draws none.
        ok: whether all is well with the model.
    """

    data: dict[str, Any]
    table: Callable[[int], Any]
    figure: Callable[[], Figure] | None = None
    ok: bool = True

    def text(self) -> str:
        """The table as it fits stdout: in color on a terminal that wants it."""
        console = _console()
        with console.capture() as captured:
            console.print(self.table(console.width))
        return "\n".join(line.rstrip() for line in captured.get().split("\n"))

    def write(self, path: Path) -> None:
        """The plot, or where there is none the table as a page that needs nothing else."""
        if self.figure is not None:
            save(self.figure(), path)
        else:
            path.write_text(self._page(), encoding="utf-8")

    def _page(self) -> str:
        console = _console(file=io.StringIO(), width=_PIPE)
        from rich.segment import Segment

        def span(content: str, style: Any) -> str:
            marks = {"bold": style.bold, "dim": style.dim} if style else {}
            names = [name for name, on in marks.items() if on]
            names += [style.color.name] if style and style.color else []
            return f'<span class="{" ".join(names)}">{html.escape(content)}</span>'

        lines = console.render_lines(self.table(_PIPE), pad=False)
        code = "\n".join("".join(span(one.text, one.style) for one in Segment.simplify(line)) for line in lines)
        return _PAGE.format(look=css(), title=html.escape(str(self.data["model"])), code=code)


def _console(**options: Any) -> Any:
    try:
        from rich.console import Console
    except ImportError:
        raise MissingPackageError(
            'Tables are drawn by rich: pip install "nnatomy[cli]". (--json works without.)'
        ) from None
    if not options and not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        options = {"width": _PIPE}
    return Console(highlight=False, markup=False, emoji=False, **options)


def grid(corner: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Any]], room: int) -> Any:
    """A table of (row, column) cells, rich Texts, in as many parts below each other as `room` columns need."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    heads = [visible(column) for column in columns]
    wide = [
        max(width(line) for line in (heads[j], *(line for row in cells for line in row[j].plain.split("\n"))))
        for j in range(len(columns))
    ]
    left = room - max(map(width, (corner, *rows)))
    parts: list[list[int]] = []
    for j, wanted in enumerate(wide):
        if not parts or sum(wide[i] + 2 for i in parts[-1]) + wanted + 2 > left:
            parts.append([])
        parts[-1].append(j)
    tables: list[Any] = []
    for part in parts:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(Text(corner, style="dim"), justify="right")
        for j in part:
            table.add_column(Text(heads[j]), no_wrap=True)
        for name, row in zip(rows, cells, strict=True):
            table.add_row(Text(name, style="dim"), *(row[j] for j in part))
        tables += [table, Text("")]
    return Group(*tables[:-1])


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 5`.

    Example:
        >>> ranges([0, 1, 2, 3, 5])
        '0-3, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def plain_numbers(values: Tensor) -> Any:
    """Nested lists, with None for what is no number in JSON (NaN, infinities)."""
    if values.ndim:
        return [plain_numbers(value) for value in values]
    return values.item() if values.isfinite() else None
