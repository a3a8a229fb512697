"""A value for each of rows and columns: layers and positions, layers and heads, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.plots.labels import label, lines, visible, width
from nnatomy.plots.look import Figure, cell_texts, color_axis, graph_objects, laid_out, numbers

_LETTER = 7.5  # pixels
_PAGE = 900  # pixels
_NARROW = 13  # pixels of a column whose label stands upright
_LABEL, _TEXT = 18, 12  # letters at most, of a label and in a cell
_LEGIBLE = 6  # letters of a longer text in a cell that are worth showing


def heat_map(
    values: Num[Tensor, "row column"],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    row_title: str = "layer",
    column_title: str = "position",
    texts: Sequence[Sequence[str]] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
    diverging: bool = False,
    value_name: str = "value",
) -> Figure:
    """One cell a value; the first row is the lowest, so that layers are read upwards.

    Labels are shown as they are: no part of a token is markup, its spaces at the ends are · and its line breaks ⏎, and
    equal labels are columns of their own. Long ones are cut; the hover text has them whole.

    Args:
        values: NaN leaves a cell empty.
        rows, columns: the labels of both axes, such as layer numbers and tokens.
        title, row_title, column_title: the title of the plot and of its axes.
        texts: what is written in each cell, in black or white as can be read on it. Where a page has no room for them long
            ones are cut, and with many columns the hover text has them alone.
        hover: more about each cell, under its row, column and value; "\\n" begins a line.
        diverging: colors that part values above and below zero, with zero in the middle.
        value_name: what the values are.

    Returns:
        A plotly Figure: as wide as its place; where even upright labels do not fit a page, wider.

    Raises:
        InputError: if labels, texts or hover are not as many as the values.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import heat_map
        >>> tokens = ["The", " capital", " of", " France", " is"]
        >>> figure = heat_map(torch.rand(2, 5), rows=["0", "1"], columns=tokens, value_name="effect")
        >>> figure.layout.xaxis.ticktext[1]
        '·capital'
    """
    shown = numbers("values", values, "(row, column)")
    _check(tuple(values.shape), rows, columns, texts=texts, hover=hover)
    room = _PAGE - 60 - round(_LETTER * _wide(rows, _LABEL))
    most = min(_TEXT, int(room / (_LETTER * max(len(columns), 1))) - 1)  # letters that a cell has room for
    longest = _wide([text for row in texts or [] for text in row], _TEXT) - 1
    cells = texts if most >= min(longest, _LEGIBLE) else None
    written = len(columns) * _LETTER * max(min(longest, most) + 1, 5)
    flat = len(columns) * _LETTER * _wide(columns, _LABEL) <= room
    go = graph_objects()
    figure = go.Figure(
        go.Heatmap(
            z=shown.where(shown.isfinite(), float("nan")).numpy(),
            text=None if cells is None else [[label(text, most) for text in row] for row in cells],
            texttemplate=None if cells is None else "%{text}",
            textfont={"size": 12},
            hovertext=_hover(shown, (row_title, rows), (column_title, columns), value_name, hover or texts),
            hoverinfo="text",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        )
    )
    for axis, title_of, labels in (("xaxis", column_title, columns), ("yaxis", row_title, rows)):
        figure.layout[axis].update(
            title={"text": label(title_of)},
            tickvals=list(range(len(labels))),
            ticktext=[label(text, _LABEL) for text in labels],
            showgrid=False,
            zeroline=False,
        )
    figure.layout.xaxis.autotickangles = [0, -90]  # side by side where its place is wide enough for that
    kind = "diverging" if diverging else "sequential"
    figure.layout.coloraxis = color_axis(kind, value_name, *color_limits(shown, diverging))
    for i, inked in cell_texts(figure, dark=False).items():
        figure.data[i].text = inked
    wide = len(columns) * _NARROW
    return laid_out(
        figure,
        title,
        height=120 + (20 if flat else round(_LETTER * _wide(columns, _LABEL))) + 22 * max(5, len(rows)),
        width=None if wide <= room else _PAGE - room + wide,
        least=_PAGE - room + round(min(wide, room) if cells is None else written),
    )


def color_limits(values: Tensor, diverging: bool) -> tuple[float, float]:
    """From zero, where the values are all above it; as far below as above, where they diverge."""
    finite = values[values.isfinite()].tolist() or [0.0]
    low, high = min(finite), max(finite)
    most = max(abs(low), abs(high)) or 1.0
    if diverging:
        return -most, most
    return (min(low, 0.0), high) if high > 0 else (low, high if high > low else low + 1)


def _check(shape: tuple[int, ...], rows: Sequence[str], columns: Sequence[str], **cells: Any) -> None:
    if (len(rows), len(columns)) != shape:
        raise InputError(
            f"values are {shape}, with labels for {counted(len(rows), 'row')} and {counted(len(columns), 'column')}: "
            "give one label each."
        )
    for name, given in cells.items():
        if given is not None and (len(given) != shape[0] or any(len(row) != shape[1] for row in given)):
            raise InputError(f"{name} is not a list of {shape[0]} rows of {shape[1]} strings, as the values are.")


def _hover(
    values: Tensor,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    value_name: str,
    more: Sequence[Sequence[str]] | None,
) -> list[list[str]]:
    row_names, column_names = _names(*rows), _names(*columns)
    return [
        [
            f"{row_names[i]}<br>{column_names[j]}<br>{label(value_name)}: {value:.4g}"
            + ("" if more is None else f"<br>{lines(more[i][j])}")
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(values.tolist())
    ]


def _names(title: str, labels: Sequence[str]) -> list[str]:
    """`layer 3`, `position 4: ·France`."""
    return [f"{label(title)} {i}" + ("" if text == str(i) else f": {label(text)}") for i, text in enumerate(labels)]


def _wide(texts: Sequence[str], most: int) -> int:
    return max((min(width(visible(text)), most) for text in texts), default=0) + 1
