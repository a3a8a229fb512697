"""Plots of values by layer, position, head and token, made with plotly, which is imported by the first of them."""

from nnatomy.plots.attention import attention
from nnatomy.plots.bars import bars
from nnatomy.plots.curves import curves
from nnatomy.plots.heat_map import heat_map
from nnatomy.plots.save import save

__all__ = [
    "attention",
    "bars",
    "curves",
    "heat_map",
    "save",
]
