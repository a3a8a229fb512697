"""The one look of everything drawn: plots, viewers, the demo's page, the server's page, the command line's pages.

Each color is here once, light and dark; pages take theirs from `css()`.
"""

from __future__ import annotations

import textwrap
from types import ModuleType
from typing import Any

from nnatomy.errors import MissingPackageError
from nnatomy.plots.labels import label, visible

Figure = Any  # a plotly.graph_objects.Figure: plotly is imported when the first one is made

#: Of pages, light and dark: text, text beside it, behind everything, behind a part, lines, what can be clicked, good, bad.
COLORS = {
    "ink": ("#1d2330", "#e6eaf2"),
    "soft": ("#5c6577", "#a3adbf"),
    "paper": ("#ffffff", "#14181f"),
    "card": ("#f5f7fa", "#1c222c"),
    "line": ("#dde2ea", "#39424f"),
    "accent": ("#2b6cb0", "#7ab5f5"),
    "good": ("#1d7a3c", "#6fcf97"),
    "bad": ("#b3261e", "#ff9a8a"),
}
FONT = "system-ui, 'Segoe UI', 'Noto Sans', sans-serif"

#: Of a line whose value is below or above zero; read on light and on dark.
SIGNED = ("#d3604d", "#4593c4")

#: By kind of values, light and dark: from nothing to much, or from below to above zero.
SCALES = {
    "sequential": (
        ["#e9f1f9", "#c3daf0", "#8fbbe2", "#4b8fcb", "#1f64a8", "#0b3c72"],
        ["#222b39", "#1d3f66", "#22598f", "#2f80c4", "#6cb2ea", "#d3ebff"],
    ),
    "diverging": (
        ["#8c1d2f", "#d3604d", "#f3b69a", "#f7f7f7", "#9dcae1", "#4593c4", "#124a86"],
        ["#ff9a8a", "#d3553f", "#6e2a26", "#1f242d", "#1f4a70", "#3787c8", "#9bd4ff"],
    ),
    "signs": (["#c0504d", "#2b6cb0"], ["#e07a6a", "#5b9fe0"]),
}
_LINES = (
    ["#2b6cb0", "#c2571a", "#2f855a", "#8a4fbf", "#b83280", "#74690a", "#0f7f8c", "#9b2c2c"],
    ["#7ab5f5", "#f0a267", "#6fcf97", "#c49bf0", "#f28bbf", "#d9c94f", "#5fd0dc", "#f28b8b"],
)
# Lying at the top left, it is in sight however wide the figure is, and takes no room from it.
_COLORBAR = {
    "orientation": "h",
    "thickness": 8,
    "outlinewidth": 0,
    "lenmode": "pixels",
    "len": 220,
    "x": 0,
    "xanchor": "left",
    "xpad": 0,
    "y": 1,
    "yanchor": "bottom",
    "ypad": 8,
    "nticks": 5,
    "ticklabelposition": "outside bottom",
    "ticks": "",
    "title": {"side": "top"},
}
_BAR_HEIGHT = 52  # pixels above the plot


def css() -> str:
    """The colors as properties of a page (`var(--ink)`, ...), which follow its reader's system.

    Example:
        >>> "--ink: #1d2330;" in css()
        True
    """
    light, dark = (" ".join(f"--{name}: {both[dark]};" for name, both in COLORS.items()) for dark in (False, True))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )


def graph_objects() -> ModuleType:
    """`plotly.graph_objects`.

    Raises:
        MissingPackageError: if plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError:
        raise MissingPackageError('Plots are made with plotly: pip install "nnatomy[plot]".') from None
    return plotly.graph_objects


def theme(dark: bool) -> dict[str, Any]:
    """A plotly template."""
    text, line, back, card = (COLORS[name][dark] for name in ("ink", "line", "paper", "card"))
    control = {"bgcolor": card, "bordercolor": line, "font": {"color": text}}
    axis = {
        "gridcolor": line,
        "linecolor": line,
        "zerolinecolor": line,
        "ticks": "",
        "automargin": True,
        "ticklabelstandoff": 4,
        "title": {"standoff": 12},
    }
    return {
        "layout": {
            "font": {"family": FONT, "size": 12, "color": text},
            "title": {"font": {"size": 15}, "x": 0, "xanchor": "left", "xref": "paper"},
            "paper_bgcolor": back,
            "plot_bgcolor": back,
            "colorway": _LINES[dark],
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorbar": _COLORBAR},
            "hoverlabel": {"align": "left", "bgcolor": line, "font": {"color": text}, "bordercolor": text},
            "updatemenudefaults": control,
            "sliderdefaults": {**control, "activebgcolor": COLORS["accent"][dark]},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": COLORS["soft"][dark], "activecolor": text},
            "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
        }
    }


def laid_out(figure: Figure, title: str, *, height: int, width: int | None = None, least: int | None = None) -> Figure:
    """`figure` in the common look; it is as wide as its place where no width is given, in a saved page not below `least`."""
    shown = textwrap.wrap(visible(title), min(110, (width or 900) // 8), max_lines=3, placeholder=" …") if title else []
    figure.update_layout(
        template=theme(dark=False),
        title={"text": "<br>".join(label(line) for line in shown)},
        height=height + 22 * len(shown),
        width=width,
        meta={"least": least},
    )
    bar = figure.layout.coloraxis.colorscale is not None and figure.layout.coloraxis.showscale is not False
    above = 30 + _BAR_HEIGHT * bar
    figure.layout.height += _BAR_HEIGHT * bar
    figure.update_layout(
        margin={"t": above + 22 * len(shown)},
        # (plotly puts the first line there, and not the last.)
        title={
            "yref": "paper",
            "y": 1,
            "yanchor": "bottom",
            "pad": {"b": above - 16 - 24 * bar + 22 * max(len(shown) - 1, 0)},
        },
    )
    return figure


def color_axis(kind: str, name: str, low: float | None, high: float | None) -> dict[str, Any]:
    """A color axis for values of a kind in `SCALES`."""
    return {
        "colorscale": spaced(SCALES[kind][0]),
        "cmin": low,
        "cmax": high,
        "colorbar": {"title": {"text": label(name)}},
    }


def spaced(colors: list[str]) -> list[tuple[float, str]]:
    """Colors at equal steps from 0 to 1."""
    return [(i / (len(colors) - 1), color) for i, color in enumerate(colors)]
