"""A value for each of several named parts."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.plots.labels import label
from nnatomy.plots.look import Figure, color_axis, graph_objects, laid_out, numbers


def bars(values: Num[Tensor, " part"], *, labels: Sequence[str], title: str = "", value_name: str = "value") -> Figure:
    """One bar a value, from the top down in the order given; those below zero in another color.

    Args:
        values: NaN has no bar.
        labels: a name for each, shown as in `heat_map`.
        title: of the plot.
        value_name: what the values are.

    Returns:
        A plotly Figure.

    Raises:
        InputError: if labels and values are not as many.
        MissingPackageError: if plotly is not installed.

    Example:
        >>> import torch
        >>> from nnatomy.plots import bars
        >>> figure = bars(torch.tensor([1.5, -0.5]), labels=["embedding", "layer 0"], value_name="logits")
        >>> figure.data[0].x.tolist()
        [1.5, -0.5]
    """
    shown = numbers("values", values, "(label)")
    if values.ndim != 1:
        raise InputError(f"values are {tuple(values.shape)}: give a tensor of (label).")
    if len(labels) != len(values):
        raise InputError(f"{counted(len(values), 'value')} with {counted(len(labels), 'label')}: give one label each.")
    go = graph_objects()
    figure = go.Figure(
        go.Bar(
            x=shown.numpy(),
            orientation="h",
            marker={"color": (shown >= 0).double().numpy(), "coloraxis": "coloraxis"},
            hovertext=[
                f"{label(name)}<br>{label(value_name)}: {value:.4g}"
                for name, value in zip(labels, shown.tolist(), strict=True)
            ],
            hoverinfo="text",
            textposition="none",
        )
    )
    figure.layout.coloraxis = {**color_axis("signs", value_name, 0.0, 1.0), "showscale": False}
    figure.update_xaxes(title={"text": label(value_name)})
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=[label(name, 40) for name in labels],
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return laid_out(figure, title, height=120 + 20 * max(5, len(labels)))
