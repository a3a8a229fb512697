"""A value for each part of a model, where they are many: a map of layer by head."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.plots.bars import bars
from nnatomy.plots.heat_map import color_limits, heat_map
from nnatomy.plots.labels import label
from nnatomy.plots.look import Figure, cell_texts, numbers

_PART = re.compile(r"L(\d+)(?:H(\d+)| (.+))")
_FEW = 24  # parts that bars show well


def parts(values: Num[Tensor, " part"], *, labels: Sequence[str], title: str = "", value_name: str = "value") -> Figure:
    """Bars; where the parts are many and named by layer (`L4H7`, `L4 mlp`), a map of layer by head, which fits a page.

    Columns are the heads, then a layer's other parts; what belongs to no layer (embeddings) is a band across all of them, with
    its value in it.

    Args:
        values: NaN is left empty.
        labels: a name for each.
        title: of the plot.
        value_name: what the values are.

    Returns:
        A plotly Figure.

    Raises:
        InputError: if labels and values are not as many.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import parts
        >>> names = ["embeddings", *(f"L{layer}H{head}" for layer in range(6) for head in range(8))]
        >>> figure = parts(torch.randn(49), labels=names, value_name="logits")
        >>> list(figure.layout.yaxis.ticktext), figure.data[0].z.shape
        (['embeddings', '0', '1', '2', '3', '4', '5'], (7, 8))
    """
    shown = numbers("values", values, "(label)")
    if len(labels) != len(values):
        raise InputError(f"{counted(len(values), 'value')} with {counted(len(labels), 'label')}: give one label each.")
    found = [_PART.fullmatch(name) for name in labels]
    cells = [
        (one[1], f"H{one[2]}" if one[2] else one[3]) if one else (name, "")
        for one, name in zip(found, labels, strict=True)
    ]
    if (
        len(labels) <= _FEW
        or sum(one is not None and one[2] is not None for one in found) < 2
        or len(set(cells)) < len(cells)
    ):
        return bars(values, labels=labels, title=title, value_name=value_name)
    rows = list(dict.fromkeys(row for row, _ in cells))
    heads = sorted(
        {column for one, (_, column) in zip(found, cells, strict=True) if one and one[2]}, key=lambda h: int(h[1:])
    )
    columns = heads + list(dict.fromkeys(column for _, column in cells if column and column not in heads))
    grid = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
    hover = [[""] * len(columns) for _ in rows]
    bands = {}
    for value, name, (row, column) in zip(shown.tolist(), labels, cells, strict=True):
        i = rows.index(row)
        if column:
            j = columns.index(column)
            grid[i, j], hover[i][j] = value, name
        else:
            bands[i] = value
    figure = heat_map(
        grid,
        rows=rows,
        columns=columns,
        hover=hover,
        title=title,
        column_title="part",
        diverging=True,
        value_name=value_name,
    )
    figure.layout.xaxis.title.text = "heads and other parts"
    for i, value in bands.items():
        figure.add_heatmap(
            z=[[value]],
            x=[-0.5, len(columns) - 0.5],
            y=[i - 0.5, i + 0.5],
            text=[[f"{value:.3g}" if math.isfinite(value) else ""]],
            texttemplate="%{text}",
            textfont={"size": 12},
            hovertext=[[f"{label(rows[i])}<br>{label(value_name)}: {value:.4g}"]],
            hoverinfo="text",
            coloraxis="coloraxis",
            ygap=1,
        )
    limits = color_limits(shown, diverging=True)
    figure.update_layout(coloraxis=dict(zip(("cmin", "cmax"), limits, strict=True)))
    for i, inked in cell_texts(figure, dark=False).items():
        figure.data[i].text = inked
    return figure
