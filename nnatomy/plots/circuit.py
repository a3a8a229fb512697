"""A circuit: the edges with the largest scores, as a graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.plots.labels import label
from nnatomy.plots.look import COLORS, SIGNED, Figure, graph_objects, laid_out, numbers
from nnatomy.whole_number import count_of

_STEPS = (5, 10, 20, 40, 80, 160, 320)
_POINTS = 16  # of each curve
_WIDEST, _ROW = 7.0, 58  # pixels


def circuit(
    scores: Num[Tensor, "source destination"],
    *,
    sources: Sequence[str],
    destinations: Sequence[str],
    k: int = 80,
    title: str = "",
    value_name: str = "effect",
) -> Figure:
    """The `k` edges with the largest scores in either direction: parts by layer, from the embeddings upwards to the logits.

    An edge is as wide as its score is large, blue above zero and red below; the pointer shows it. The slider leaves fewer
    edges. The queries, keys and values of a head (`L3H1.q`) are read by one node; the pointer tells which.

    Args:
        scores: of each edge, from what writes to the stream to what reads it; zero or NaN where there is none.
        sources, destinations: names such as "embeddings", "L0H2", "L0 mlp", "L1H0.q", "logits".
        k: edges at most.
        title: of the plot.
        value_name: what the scores are.

    Returns:
        A plotly Figure, whose first traces are the edges, the largest first.

    Raises:
        InputError: if names and scores are not as many, or `k` is no number of edges.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import circuit
        >>> scores = torch.tensor([[0.2, 0.0], [0.0, -0.9]])
        >>> figure = circuit(scores, sources=["embeddings", "L0H1"], destinations=["L0H1.q", "logits"])
        >>> [edge.text for edge in figure.data[:2]]
        ['L0H1 → logits<br>effect: -0.9', 'embeddings → L0H1.q<br>effect: 0.2']
    """
    shown = numbers("scores", scores, "(source, destination)")
    if scores.shape != (len(sources), len(destinations)):
        raise InputError(
            f"scores are {tuple(scores.shape)}, with names for {counted(len(sources), 'source')} and "
            f"{counted(len(destinations), 'destination')}: give one name each."
        )
    if not count_of(k):
        raise InputError(f"k={k!r}: give the number of edges to draw, at least 1.")
    edges = _largest(shown, k)
    most = max((abs(value) for *_, value in edges), default=1.0)
    nodes = {_node(sources[s]) for s, _, _ in edges} | {_node(destinations[d]) for _, d, _ in edges}
    places, rows, widest = _places(nodes)
    go = graph_objects()
    figure = go.Figure()
    for source, destination, value in edges:
        start, end = places[_node(sources[source])], places[_node(destinations[destination])]
        xs, ys = _curve(start, end)
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            line={"width": 0.8 + (_WIDEST - 0.8) * abs(value) / most, "color": SIGNED[value >= 0]},
            opacity=0.3 + 0.6 * abs(value) / most,
            text=f"{label(sources[source])} → {label(destinations[destination])}<br>{label(value_name)}: {value:.4g}",
            hoverinfo="text",
        )
    names = sorted(places, key=lambda name: places[name][::-1])
    figure.add_scatter(
        x=[places[name][0] for name in names],
        y=[places[name][1] for name in names],
        mode="markers+text",
        marker={"size": 11, "color": COLORS["accent"][0], "line": {"width": 2, "color": "#ffffff"}},
        text=[label(_short(name), 14) for name in names],
        textposition="top center",
        hovertext=[_about(name, edges, sources, destinations) for name in names],
        hoverinfo="text",
        cliponaxis=False,
    )
    figure.update_xaxes(visible=False, range=[-0.6, widest + 0.1])
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=rows,
        range=[-0.4, len(rows) - 0.2],
        zeroline=False,
    )
    for color, name in zip(SIGNED, ("below zero", "above zero"), strict=True):
        figure.add_scatter(
            x=[None], y=[None], mode="lines", line={"width": 4, "color": color}, name=name, showlegend=True
        )
    figure.update_traces(showlegend=False, selector=lambda trace: trace.name is None)
    figure.update_layout(
        hovermode="closest",
        hoverdistance=12,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "title": {"text": f"{label(value_name)} "}},
    )
    laid_out(figure, title, height=150 + _ROW * len(rows), least=max(560, 64 * widest))
    figure.layout.height += (
        24  # the buttons that plotly shows are above the legend, whose line may be as long as the plot is wide
    )
    figure.layout.margin.t += 24
    figure.layout.title.pad.b += 24
    steps = [*(step for step in _STEPS if step < len(edges)), len(edges)]
    if len(edges) > 1:
        figure.update_layout(sliders=[_slider(steps, edges)])
        figure.layout.height += 70
        figure.update_layout(margin={"b": 90, "r": 50})
    return figure


def _largest(scores: Tensor, k: int) -> list[tuple[int, int, float]]:
    """The edges with a score, the largest in size first."""
    sizes = scores.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
    order = sizes.argsort(descending=True, stable=True)[: min(k, int((sizes > 0).sum()))]
    return [(i // scores.shape[1], i % scores.shape[1], float(scores.flatten()[i])) for i in order.tolist()]


def _node(name: str) -> str:
    """`L3H1` of `L3H1.q`: what a part writes and what it reads are one node."""
    return re.sub(r"\.[qkv]$", "", name)


def _layer(node: str) -> int | None:
    found = re.match(r"L(\d+)", node)
    return int(found[1]) if found else None


def _row(node: str) -> tuple[float, int]:
    """From below: what comes before the layers, each layer's attention, its other parts, what comes after."""
    layer = _layer(node)
    if layer is not None:
        return float(layer), int(re.match(r"L\d+H\d", node) is None)
    return (-1.0, 0) if "embed" in node else (torch.inf, 0)


def _short(node: str) -> str:
    """`H1`, `mlp`: the row tells the layer."""
    return re.sub(r"^L\d+ ?", "", node) or node


def _places(nodes: set[str]) -> tuple[dict[str, tuple[float, float]], list[str], int]:
    """Where each node lies, the rows' names from below, and how many columns there are.

    A head has the same column in all layers; other parts are in columns to the right of the heads, what belongs to no layer
    in the middle.
    """
    kinds = {_short(node) for node in nodes if _layer(node) is not None}
    columns = sorted(
        kinds, key=lambda kind: (not re.match(r"H\d", kind), [int(n) for n in re.findall(r"\d+", kind)], kind)
    )
    wide = max(1, len(columns))
    places, names = {}, []
    for y, (row, found) in enumerate(groupby(sorted(nodes, key=lambda node: (_row(node), node)), _row)):
        members = list(found)
        inside = _layer(members[0]) is not None
        names.append(
            "" if not inside else f"layer {int(row[0])}" if not row[1] or (row[0], 0) not in map(_row, nodes) else " "
        )
        for i, node in enumerate(members):
            x = columns.index(_short(node)) if inside else (i + 0.5) * wide / len(members) - 0.5
            places[node] = (float(x), float(y))
    return places, names, wide


def _curve(start: tuple[float, float], end: tuple[float, float]) -> tuple[list[float], list[float]]:
    """Upwards out of one node and upwards into the other; round what lies between, where one is above the other."""
    xs, ys = [], []
    aside = 0.12 * (end[1] - start[1]) if abs(start[0] - end[0]) < 0.2 and abs(end[1] - start[1]) > 1 else 0.0
    bend = (end[1] - start[1]) * 0.45 or 0.6
    for i in range(_POINTS):
        t = i / (_POINTS - 1)
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        xs.append((a + b) * start[0] + (c + d) * end[0] + min(aside, 0.6) * (b + c))
        ys.append(a * start[1] + b * (start[1] + bend) + c * (end[1] - bend) + d * end[1])
    return xs, ys


def _about(
    node: str, edges: Sequence[tuple[int, int, float]], sources: Sequence[str], destinations: Sequence[str]
) -> str:
    """Its largest edges."""
    told = [label(node)]
    for s, d, value in edges:
        if _node(sources[s]) == node:
            told.append(f"→ {label(destinations[d])}: {value:.4g}")
        elif _node(destinations[d]) == node:
            told.append(f"← {label(sources[s])}{destinations[d][len(node) :]}: {value:.4g}")
    return "<br>".join(told[:9] + ["…"] * (len(told) > 9))


def _slider(steps: Sequence[int], edges: Sequence[tuple[int, int, float]]) -> dict[str, Any]:
    """Fewer edges: the first of them, with the size of the smallest one that is left."""
    indices = list(range(len(edges)))
    return {
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "edges, the largest: ", "font": {"size": 12}},
        "pad": {"t": 12, "b": 0},
        "x": 0,
        "len": 1,
        "y": 0,
        "yanchor": "top",
        "steps": [
            {
                "label": f"{step} (≥ {abs(edges[step - 1][2]):.2g})",
                "value": str(step),
                "method": "restyle",
                "args": [{"visible": [i < step for i in indices]}, indices],
            }
            for step in steps
        ],
    }
