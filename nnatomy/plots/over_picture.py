"""Maps drawn over a picture: of patches, or of places between which they are smooth."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from copy import copy
from io import BytesIO
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, MissingPackageError, a_kind
from nnatomy.plots.heat_map import color_limits
from nnatomy.plots.labels import label, lines, visible
from nnatomy.plots.look import WIDEST, Figure, color_axis, even_rows, graph_objects, laid_out, numbers

#: In pixels: the longer side of a picture, what is between two, the width of a page, the line above each.
_SIDE, _GAP, _PAGE, _NAME = 200, 20, 900, 24
#: Letters of a name that its picture has room for.
_LETTERS = 26


def over_picture(
    picture: Any,
    maps: Mapping[str, Num[Tensor, "row column"]],
    *,
    title: str = "",
    value_name: str = "value",
    diverging: bool = False,
    smooth: bool = False,
    hover: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> Figure:
    """The picture, and behind it each map over it; all maps on one scale of colors.

    Args:
        picture: a PIL image, or (height, width, 3) of bytes. The maps' rows and columns divide it evenly: of a model that cuts
            off a picture's sides it is what the model sees (`ImageTokens.picture`).
        maps: by name; NaN leaves a cell empty.
        title: of the plot.
        value_name: what the values are.
        diverging: colors that part values above and below zero, with zero in the middle.
        smooth: interpolate between the middles of the cells; by default each cell has one color.
        hover: by a map's name, more about each of its cells, under its row, column and value; "\\n" begins a line.

    Returns:
        A plotly Figure, which `nnatomy.plots.save` writes as a page or a picture.

    Raises:
        InputError: if there are no maps, a map is not (row, column) of real numbers, or the picture is none.
        MissingPackageError: if plotly or Pillow is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import over_picture
        >>> grey = torch.full((32, 48, 3), 128, dtype=torch.uint8)
        >>> figure = over_picture(grey, {"head 3": torch.rand(2, 3)}, value_name="probability")
        >>> [trace.type for trace in figure.data]
        ['image', 'image', 'heatmap']
    """
    go = graph_objects()
    shown = _as_picture(picture)
    if not isinstance(maps, Mapping):
        raise InputError(f'maps is {a_kind(maps)}: give tensors by name, such as {{"head 0": map}}.')
    values = {name: numbers(f"maps[{name!r}]", one, "(row, column)") for name, one in maps.items()}
    if not maps or any(one.ndim != 2 or not one.numel() for one in maps.values()):
        raise InputError(
            f"maps: give at least one of (row, column); got {[tuple(one.shape) for one in maps.values()]}."
        )
    scale = _SIDE / max(shown.size)
    width, height = max(1, round(shown.width * scale)), max(1, round(shown.height * scale))
    # Sharp on a screen of two pixels for one; the pixels of a tiny picture stay squares.
    shown = shown.resize((2 * width, 2 * height), resample=0 if scale > 2 else 1)
    plan = _Plan(1 + len(maps), width, height)
    figure = go.Figure()
    for number, name in enumerate(["the picture", *maps]):
        axes = {"xaxis": f"x{number + 1}", "yaxis": f"y{number + 1}"}
        figure.add_trace(go.Image(source=_source(shown), dx=0.5, dy=0.5, x0=0.25, y0=0.25, hoverinfo="skip", **axes))
        if number:
            figure.add_trace(
                _cells(go, values[name], (hover or {}).get(name), value_name, (width, height), smooth, axes)
            )
        across, down = plan.domain(number)
        common = {"visible": False, "fixedrange": True}
        figure.layout[f"xaxis{number + 1}"] = {
            **common,
            "range": [0, width],
            "domain": across,
            "anchor": f"y{number + 1}",
        }
        figure.layout[f"yaxis{number + 1}"] = {
            **common,
            "range": [height, 0],
            "domain": down,
            "anchor": f"x{number + 1}",
        }
        figure.add_annotation(
            text=label(name, _LETTERS),
            hovertext=visible(name),
            xref="paper",
            yref="paper",
            x=across[0],
            y=down[1],
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    every = torch.cat([one.flatten() for one in values.values()])
    kind = "diverging" if diverging else "sequential"
    figure.layout.coloraxis = color_axis(kind, value_name, *color_limits(every, diverging))
    figure = laid_out(figure, title, height=plan.height + 50, width=plan.width + 40, plans=plan.plans())
    figure.update_layout(margin={"l": 20, "r": 20, "b": 20})
    return figure


class _Plan:
    """Where each picture lies, in rows that a page has room for."""

    def __init__(self, count: int, width: int, height: int) -> None:
        self._count, self._across = count, max(1, min(count, _PAGE // (width + _GAP)))
        self._wide, self._high = width + _GAP, height + _GAP + _NAME
        self._size = width, height

    @property
    def width(self) -> int:
        return self._wide * self._across

    @property
    def height(self) -> int:
        return self._high * -(-self._count // self._across)

    def plans(self) -> list[dict[str, Any]]:
        """As `laid_out` takes them."""
        found = []
        for across in even_rows(self._count, WIDEST // self._wide):
            plan = copy(self)
            plan._across = across
            change: dict[str, Any] = {}
            for i in range(self._count):
                x, y = plan.domain(i)
                axis = f"axis{i + 1 if i else ''}"
                change |= {f"x{axis}.domain": x, f"y{axis}.domain": y}
                change |= {f"annotations[{i}].x": x[0], f"annotations[{i}].y": y[1]}
            found.append({"wide": plan.width, "high": plan.height, "change": change})
        return found

    def domain(self, number: int) -> tuple[list[float], list[float]]:
        down, across = divmod(number, self._across)
        left, top = across * self._wide, down * self._high + _NAME
        width, height = self._size
        return (
            [left / self.width, (left + width) / self.width],
            [max(0.0, 1 - (top + height) / self.height), 1 - top / self.height],
        )


def _cells(
    go: Any,
    values: Tensor,
    more: Sequence[Sequence[str]] | None,
    value_name: str,
    size: tuple[int, int],
    smooth: bool,
    axes: dict[str, str],
) -> Any:
    width, height = size
    drawn = F.interpolate(values[None, None], size=(height, width), mode="bilinear")[0, 0] if smooth else values
    own: dict[str, Any] = {"hovertemplate": f"{label(value_name)}: %{{z:.4g}}<extra></extra>"}
    if not smooth:
        texts = [
            [
                f"row {i}, column {j}<br>{label(value_name)}: {value:.4g}"
                + ("" if more is None else f"<br>{lines(more[i][j])}")
                for j, value in enumerate(row)
            ]
            for i, row in enumerate(values.tolist())
        ]
        own = {"hovertext": texts, "hoverinfo": "text"}
    high, wide = height / drawn.shape[0], width / drawn.shape[1]
    return go.Heatmap(
        z=drawn.where(drawn.isfinite(), float("nan")).numpy(),
        x0=wide / 2,
        dx=wide,
        y0=high / 2,
        dy=high,
        coloraxis="coloraxis",
        opacity=0.7,
        **own,
        **axes,
    )


def _as_picture(picture: Any) -> Any:
    """As a PIL image of RGB."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError('Pictures are read and drawn with Pillow: pip install "nnatomy[images]".') from None
    if hasattr(picture, "convert"):
        return picture.convert("RGB")
    shape = tuple(getattr(picture, "shape", ()))
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or str(picture.dtype).rpartition(".")[2] != "uint8":
        found = f"of shape {shape} and {picture.dtype}" if shape else a_kind(picture)
        raise InputError(f"picture is {found}: give a PIL image, or (height, width, 3) of bytes (uint8).")
    return Image.fromarray(picture.cpu().numpy() if isinstance(picture, Tensor) else picture)


def _source(picture: Any) -> str:
    """A picture as a URL that holds it."""
    file = BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
