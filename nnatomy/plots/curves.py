"""Values over a common axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnatomy.errors import InputError, a_kind, counted
from nnatomy.plots.labels import label
from nnatomy.plots.look import Figure, graph_objects, laid_out


def curves(
    x: Sequence[float | int],
    ys: Mapping[str, Sequence[float | int]],
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
) -> Figure:
    """One curve for each name.

    Args:
        x: where the values are.
        ys: by name, as many values as `x` has; NaN leaves a gap.
        title, x_title, y_title: the title of the plot and of its axes.

    Returns:
        A plotly Figure.

    Raises:
        InputError: if a curve has another number of values than `x`.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> from nnatomy.plots import curves
        >>> figure = curves([0, 1, 2], {" Paris": [0.1, 0.5, 0.9]}, x_title="layer", y_title="probability")
        >>> figure.data[0].name
        '·Paris'
    """
    if not isinstance(ys, Mapping):
        raise InputError(
            f"ys is {a_kind(ys)}: give the values of each curve by its name, {{'probability': [0.1, 0.5]}}."
        )
    go = graph_objects()
    figure = go.Figure()
    for name, values in ys.items():
        if len(values) != len(x):
            raise InputError(
                f"The curve {name!r} has {counted(len(values), 'value')} for {counted(len(x), 'place')} on the axis."
            )
        figure.add_scatter(
            x=[float(place) for place in x],
            y=[float(value) for value in values],
            name=label(name, 30),
            mode="lines+markers",
            hovertext=[
                f"{label(name)}<br>{label(x_title or 'x')}: {float(place):.4g}<br>"
                f"{label(y_title or 'value')}: {float(value):.4g}"
                for place, value in zip(x, values, strict=True)
            ],
            hoverinfo="text",
        )
    figure.update_xaxes(title={"text": label(x_title) if x_title else ""}, **_whole(x))
    figure.update_yaxes(title={"text": label(y_title) if y_title else ""})
    figure.update_layout(showlegend=True)
    return laid_out(figure, title, height=400)


def _whole(x: Sequence[float | int]) -> dict[str, Any]:
    """Whole numbers alone on an axis of whole numbers (there is no layer 7.5), about ten of them."""
    places = [float(place) for place in x]
    if not places or not all(place.is_integer() for place in places):
        return {}
    least, span = min(places), max(places) - min(places)
    steps = (factor * 10**power for power in range(16) for factor in (1, 2, 5))
    return {"tick0": least, "dtick": next(step for step in steps if span <= 10 * step)}
