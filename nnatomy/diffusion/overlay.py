"""Maps drawn over a picture, in the look of `nnatomy.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import MissingPackageError
from nnatomy.plots.labels import label
from nnatomy.plots.look import color_axis, graph_objects, laid_out

#: In pixels.
_SIDE, _GAP = 220, 24


def overlays(picture: Any, maps: Mapping[str, Float[Tensor, "height width"]], *, title: str, value_name: str) -> Any:
    """The picture, and beside it each map over it.

    Args:
        picture: a PIL image.
        maps: by name; all on one scale of colors.

    Returns:
        A plotly Figure.

    Raises:
        MissingPackageError: if plotly is not installed.
    """
    go = graph_objects()
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingPackageError('Plots are made with plotly: pip install "nnatomy[plot]".') from None
    columns = 1 + len(maps)
    figure = make_subplots(rows=1, cols=columns, horizontal_spacing=_GAP / (columns * (_SIDE + _GAP)))
    tall = picture.convert("RGB")
    scale = max(1, _SIDE // max(tall.size))
    width, height = tall.width * scale, tall.height * scale
    shown = tall.resize((width, height), resample=0)
    low = min(float(one.min()) for one in maps.values())
    high = max(float(one.max()) for one in maps.values())
    for column, (name, values) in enumerate([("the picture", None), *maps.items()], start=1):
        figure.add_trace(go.Image(source=_source(shown), hoverinfo="skip"), row=1, col=column)
        if values is not None:
            large = F.interpolate(values[None, None].float(), size=(height, width), mode="bilinear")[0, 0]
            figure.add_trace(
                go.Heatmap(
                    z=large.numpy(),
                    coloraxis="coloraxis",
                    opacity=0.65,
                    hovertemplate=f"{label(name)}: %{{z:.4f}}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(visible=False, range=[0, width], row=1, col=column)
        figure.update_yaxes(visible=False, range=[height, 0], row=1, col=column)
        axis = "" if column == 1 else str(column)
        figure.add_annotation(
            text=label(name),
            xref=f"x{axis} domain",
            yref=f"y{axis} domain",
            x=0,
            y=1,
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    figure.layout.coloraxis = color_axis("sequential", value_name, low, high)
    total = columns * (_SIDE + _GAP) + 140
    figure = laid_out(figure, title, height=round(_SIDE * height / width) + 110, width=total)
    figure.update_layout(margin={"l": 20, "r": 20, "b": 20})
    return figure


def _source(picture: Any) -> str:
    """A picture as a URL that holds it."""
    from base64 import b64encode
    from io import BytesIO

    file = BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
