"""A value for each part of a model, where they are many: a map of layer by head."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.plots.bars import bars
from nnatomy.plots.heat_map import heat_map
from nnatomy.plots.look import Figure

_PART = re.compile(r"L(\d+)(?:H(\d+)| (.+))")
_FEW = 24  # parts that bars show well


def parts(values: Num[Tensor, " part"], *, labels: Sequence[str], title: str = "", value_name: str = "value") -> Figure:
    """Bars; where the parts are many and named by layer (`L4H7`, `L4 mlp`), a map of layer by head, which fits a page.

    Columns are the heads, then a layer's other parts; what belongs to no layer (embeddings) has a row of its own.

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
        (['embeddings', '0', '1', '2', '3', '4', '5'], (7, 9))
    """
    if len(labels) != len(values):
        raise InputError(f"{len(values)} values with {len(labels)} labels: give one label each.")
    found = [_PART.fullmatch(name) for name in labels]
    cells = [
        (one[1], f"H{one[2]}" if one[2] else one[3]) if one else (name, "other")
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
    columns = heads + list(dict.fromkeys(column for _, column in cells if column not in heads))
    columns.sort(key="other".__eq__)
    grid = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
    hover = [[""] * len(columns) for _ in rows]
    for value, name, (row, column) in zip(values.detach().tolist(), labels, cells, strict=True):
        i, j = rows.index(row), columns.index(column)
        grid[i, j], hover[i][j] = value, name
    return heat_map(
        grid,
        rows=rows,
        columns=columns,
        hover=hover,
        title=title,
        column_title="part",
        diverging=True,
        value_name=value_name,
    )
