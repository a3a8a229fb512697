"""Attention patterns, a map for each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.plots.labels import label
from nnatomy.plots.look import Figure, color_axis, graph_objects, laid_out

_IN_A_ROW, _FEW = 4, 12


def attention(patterns: Num[Tensor, "head query key"], *, tokens: Sequence[str], title: str = "") -> Figure:
    """What each position (row, from the top down) attends to (column), head by head.

    The menu shows one head alone, as large as the page. What a causal mask hides is left out.

    Args:
        patterns: such as `model.attention_probabilities[4][0]`.
        tokens: of the prompt, the keys; where there are fewer queries, they are the last ones.
        title: of the plot.

    Returns:
        A plotly Figure.

    Raises:
        InputError: if there are not as many tokens as keys.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import attention
        >>> figure = attention(torch.eye(3).expand(2, 3, 3), tokens=["The", " end", "."])
        >>> len(figure.data), list(figure.data[0].x)
        (2, ['0 The', '1 ·end', '2 .'])
    """
    heads, queries, keys = patterns.shape
    if len(tokens) != keys or queries > keys:
        raise InputError(f"The patterns are over {queries} queries and {keys} keys; there are {len(tokens)} tokens.")
    go = graph_objects()
    names = [f"{i} {label(token, 18)}" for i, token in enumerate(tokens)]
    across = min(_IN_A_ROW, heads)
    down = -(-heads // across)
    figure = go.Figure().set_subplots(
        down,
        across,
        subplot_titles=[f"head {head}" for head in range(heads)],
        horizontal_spacing=0.03,
        vertical_spacing=0.3 / (down + 1),
    )
    shown = patterns.detach().float().cpu()
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    if not shown[:, later].any():  # a causal mask is no probability of zero: nothing is drawn there
        shown = shown.masked_fill(later, torch.nan)
    for head in range(heads):
        figure.add_heatmap(
            z=shown[head].numpy(),
            x=names,
            y=names[keys - queries :],
            hovertemplate=f"head {head}<br>%{{y}}<br>attends to %{{x}}<br>%{{z:.3f}}<extra></extra>",
            coloraxis="coloraxis",
            row=head // across + 1,
            col=head % across + 1,
        )
    few = keys <= _FEW  # tokens whose names fit beside a small map
    figure.update_xaxes(type="category", showgrid=False, visible=heads == 1)
    figure.update_yaxes(type="category", showgrid=False, visible=heads == 1, autorange="reversed")
    figure.update_yaxes(visible=heads == 1 or few, col=1)
    for column in range(across):  # below the last map of each column
        figure.update_xaxes(
            visible=heads == 1 or few, row=down - (column >= heads - across * (down - 1)), col=column + 1
        )
    figure.layout.coloraxis = color_axis("sequential", "probability", 0.0, float(shown.nan_to_num().max()))
    laid_out(figure, title, height=110 + (230 * down if heads > 1 else _large(queries)))
    if heads > 1:
        figure.update_layout(updatemenus=[_menu(figure, heads, queries)])
    return figure


def _large(queries: int) -> int:
    return max(300, min(22 * queries, 700))


def _menu(figure: Figure, heads: int, queries: int) -> dict[str, Any]:
    """All heads, or one in the place of all."""
    layout = figure.layout
    pairs = [(f"xaxis{head or ''}", f"yaxis{head or ''}") for head in [0, *range(2, heads + 1)]]
    overview = {"height": layout.height}
    for i, pair in enumerate(pairs):
        overview[f"annotations[{i}].visible"] = True
        for axis in pair:
            overview |= {f"{axis}.visible": layout[axis].visible, f"{axis}.domain": layout[axis].domain}
    choices = [("all heads", [True] * heads, overview)]
    hidden: dict[str, Any] = {key: False for key in overview if key.endswith("visible")}
    for head, pair in enumerate(pairs):
        alone = {**hidden, "height": 110 + _large(queries)}
        for axis in pair:
            alone |= {f"{axis}.visible": True, f"{axis}.domain": [0, 1]}
        choices.append((f"head {head}", [other == head for other in range(heads)], alone))
    return {
        "buttons": [
            {"label": name, "method": "update", "args": [{"visible": seen}, change]} for name, seen, change in choices
        ],
        "bgcolor": "#f5f7fa",
        "font": {"color": "#1d2330"},
        "x": 1,
        "xanchor": "right",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 24, "r": 120},
    }
