"""Plots of values by layer, position, head and token, made with plotly, which is imported by the first of them; and viewers."""

from nnatomy.plots.attention import attention
from nnatomy.plots.attention_view import attention_view
from nnatomy.plots.bars import bars
from nnatomy.plots.circuit import circuit
from nnatomy.plots.curves import curves
from nnatomy.plots.heat_map import heat_map
from nnatomy.plots.over_picture import over_picture
from nnatomy.plots.parts import parts
from nnatomy.plots.save import save
from nnatomy.plots.token_view import token_view

__all__ = [
    "attention",
    "attention_view",
    "bars",
    "circuit",
    "curves",
    "heat_map",
    "over_picture",
    "parts",
    "save",
    "token_view",
]
