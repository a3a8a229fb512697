"""Attention patterns, a map for each head."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.plots.labels import label, visible, width
from nnatomy.plots.look import WIDEST, Figure, check_numbers, color_axis, even_rows, graph_objects, laid_out

_PAGE = 900  # pixels
_LETTERS, _LETTER = 14, 7  # of a label: columns at most, pixels each
_LINE = 13  # pixels from one label to the next, at least


def attention(
    patterns: Num[Tensor, "*layer head query key"],
    *,
    tokens: Sequence[str],
    title: str = "",
    layer: int | Sequence[int] | None = None,
) -> Figure:
    """What each position (row, from the top down) attends to (column), head by head.

    Every map has its own labels, and its cells are square. The menu shows one head alone, as large as the page or as 90 pixels a
    cell. What a causal mask hides is left out. See `attention_view` for a page to explore patterns in.

    Args:
        patterns: such as `model.attention_probabilities[4][0]`; or of several layers, stacked.
        tokens: of the prompt, the keys; where there are fewer queries, they are the last ones.
        title: of the plot.
        layer: which layer's they are (which layers', where several are stacked; by default from 0 on), so that heads are
            named `L4H7`.

    Returns:
        A plotly Figure.

    Raises:
        InputError: if there are not as many tokens as keys, or layers as patterns are stacked.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import attention
        >>> figure = attention(torch.eye(3).expand(2, 3, 3), tokens=["The", " end", "."], layer=4)
        >>> [note.text for note in figure.layout.annotations], list(figure.data[0].x)
        (['L4H0', 'L4H1'], ['0 The', '1 ·end', '2 .'])
    """
    names = head_names(patterns, layer)
    shown = masked(patterns, tokens)
    heads, queries, keys = shown.shape
    places = [f"{i} {label(token, _LETTERS)}" for i, token in enumerate(tokens)]
    letters = max(min(width(visible(token)), _LETTERS) for token in tokens) + len(f"{keys - 1} ")
    go = graph_objects()
    figure = go.Figure()
    plan = _Plan(heads, queries, keys, _LETTER * letters + 8)
    for head, name in enumerate(names):
        number = str(head + 1) if head else ""
        figure.add_heatmap(
            z=shown[head].numpy(),
            x=places,
            y=places[keys - queries :],
            hovertemplate=f"{name}<br>%{{y}}<br>attends to %{{x}}<br>%{{z:.3f}}<extra></extra>",
            coloraxis="coloraxis",
            xaxis=f"x{number}",
            yaxis=f"y{number}",
        )
        across, down = plan.domain(head)
        axis = {
            "visible": True,
            "type": "category",
            "showgrid": False,
            "zeroline": False,
            "tickmode": "array",
            "automargin": False,
        }
        axis["tickfont"] = {"size": 10}
        for letter, other, domain, from_, title_of in (
            ("x", f"y{number}", across, 0, "key"),
            ("y", f"x{number}", down, keys - queries, "query"),
        ):
            ticks = list(range(from_, keys, plan.step))
            figure.layout[f"{letter}axis{number}"] = {
                **axis,
                "domain": domain,
                "anchor": other,
                "tickvals": [places[i] for i in ticks],
                "ticktext": [places[i] for i in ticks],
                **({"tickangle": -90} if letter == "x" else {"autorange": "reversed"}),
                "title": {"text": title_of} if heads == 1 else None,
            }
        if heads > 1:
            figure.add_annotation(
                text=name,
                x=sum(across) / 2,
                y=down[1],
                xref="paper",
                yref="paper",
                xanchor="center",
                yanchor="bottom",
                showarrow=False,
                font={"size": 13},
            )
    figure.layout.coloraxis = color_axis("sequential", "probability", 0.0, float(shown.nan_to_num().max()))
    laid_out(figure, title, height=plan.height + 50, width=plan.width + 40, plans=plan.plans())
    figure.update_layout(margin={"l": 10, "r": 30, "b": 20})
    if heads > 1:
        figure.update_layout(updatemenus=[_menu(figure, names, plan)])
    return figure


def head_names(patterns: Num[Tensor, "*layer head query key"], layer: int | Sequence[int] | None) -> list[str]:
    """`L4H7`; `H7` where the layer is not known. Raises InputError where layers and patterns are not as many."""
    check_numbers("patterns", patterns, "(head, query, key)")
    *stacked, heads = patterns.shape[:-2] or (0, 0, 0)
    if len(stacked) > 1:
        raise InputError(
            f"The patterns have the axes {tuple(patterns.shape)}: give (head, query, key), or layers of them."
        )
    if stacked and layer is None:
        layer = range(stacked[0])
    layers = [layer] if isinstance(layer, int) or layer is None else list(layer)
    if len(layers) != (stacked or [1])[0]:
        raise InputError(f"The patterns are of {(stacked or [1])[0]} layers, and {len(layers)} are named.")
    return [f"{'' if one is None else f'L{one}'}H{head}" for one in layers for head in range(heads)]


def masked(patterns: Num[Tensor, "*layer head query key"], tokens: Sequence[str]) -> Num[Tensor, "every query key"]:
    """The maps of all heads, on the CPU; what a causal mask hides is NaN, and no probability of zero."""
    queries, keys = patterns.shape[-2:]
    if len(tokens) != keys or queries > keys:
        raise InputError(
            f"The patterns are over {queries} queries and {keys} keys, and not over {counted(len(tokens), 'token')}."
        )
    shown = patterns.detach().float().cpu().flatten(0, -3)
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return shown if shown[:, later].any() else shown.masked_fill(later, torch.nan)


class _Plan:
    """Where each map lies, in pixels."""

    def __init__(self, heads: int, queries: int, keys: int, texts: int) -> None:
        self.heads, self.queries, self.keys, self.texts = heads, queries, keys, texts
        least = max(110, min(_LINE * keys, 180))  # of the longer side of a small map
        self.across = max(1, min(heads, _PAGE // (least + texts + 14)))
        self.cell = self._cell(self.across)
        self.step = max(1, -(-_LINE // max(1, round(self.cell))))
        self.wide, self.high = texts + 14 + self.cell * keys, texts + 34 + self.cell * queries

    @property
    def width(self) -> int:
        return round(self.wide * self.across)

    @property
    def height(self) -> int:
        return round(self.high * -(-self.heads // self.across))

    def _cell(self, across: int) -> float:
        """The side of a cell."""
        return min((_PAGE / across - self.texts - 14) / self.keys, 34.0)

    def domain(self, head: int) -> tuple[list[float], list[float]]:
        down, across = divmod(head, self.across)
        left, top = across * self.wide + self.texts, down * self.high + 22
        return (
            [left / self.width, min(1.0, (left + self.cell * self.keys) / self.width)],
            [max(0.0, 1 - (top + self.cell * self.queries) / self.height), 1 - top / self.height],
        )

    def alone(self) -> tuple[int, list[float], list[float]]:
        """The height of the plot with one map alone, and where the map lies in a plot as wide as before."""
        cell = min((self.width - self.texts) / self.keys, 90.0)
        height = round(cell * self.queries + self.texts + 12)
        across = [self.texts / self.width, min(1.0, (self.texts + cell * self.keys) / self.width)]
        return height, across, [max(0.0, 1 - cell * self.queries / height), 1.0]

    def plans(self) -> list[dict[str, Any]]:
        """As `laid_out` takes them. Maps whose cells are too small for a label each are rather larger than more in a row."""
        found = []
        for across in even_rows(self.heads, int(WIDEST / self.wide) if self.step == 1 else self.across):
            plan = copy(self)
            plan.across = across
            change: dict[str, Any] = {}
            for head, (x, y) in enumerate(_axes(self.heads)):
                change[f"{x}.domain"], change[f"{y}.domain"] = plan.domain(head)
                if self.heads > 1:
                    change[f"annotations[{head}].x"] = sum(change[f"{x}.domain"]) / 2
                    change[f"annotations[{head}].y"] = change[f"{y}.domain"][1]
            alone = dict(zip(("high", "x", "y"), plan.alone(), strict=True))
            found.append({"wide": plan.width, "high": plan.height, "change": change, "alone": alone})
        return found


def _axes(heads: int) -> list[tuple[str, str]]:
    """The axes of each map, as plotly names them in a layout."""
    return [(f"xaxis{head or ''}", f"yaxis{head or ''}") for head in [0, *range(2, heads + 1)]]


def _menu(figure: Figure, names: Sequence[str], plan: _Plan) -> dict[str, Any]:
    """All heads, or one in the place of all."""
    layout, pairs = figure.layout, _axes(len(names))
    overview: dict[str, Any] = {"height": layout.height}
    for i, pair in enumerate(pairs):
        overview[f"annotations[{i}].visible"] = True
        for axis in pair:
            overview |= {f"{axis}.visible": True, f"{axis}.domain": layout[axis].domain}
    choices = [("all heads", [True] * len(names), overview)]
    hidden: dict[str, Any] = {key: False for key in overview if key.endswith("visible")}
    height, *domains = plan.alone()
    for head, pair in enumerate(pairs):
        alone = {**hidden, "height": height + layout.height - plan.height}
        for axis, domain in zip(pair, domains, strict=True):
            alone |= {f"{axis}.visible": True, f"{axis}.domain": domain}
        choices.append((names[head], [other == head for other in range(len(names))], alone))
    return {
        "buttons": [
            {"label": name, "method": "update", "args": [{"visible": seen}, change]} for name, seen, change in choices
        ],
        "x": 1,
        "xanchor": "right",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 14},
    }
