"""The one look of everything drawn: plots, viewers, the demo's page, the server's page, the command line's pages.

Each color is here once, light and dark; pages take theirs from `css()`.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from nnatomy.errors import InputError, MissingPackageError, a_kind
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
WIDEST = 2000  # pixels that a row of maps may take of a wide page
_BAR_HEIGHT = 63  # pixels above the plot: what plotly takes, from the plot itself where it is not given them


def color_at(colors: Sequence[str], share: float) -> str:
    """The color at a share, 0 to 1, of a scale.

    Example:
        >>> color_at(["#000000", "#ffffff"], 0.5), color_at(["#000000", "#ffffff"], 2.0)
        ('#808080', '#ffffff')
    """
    at = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    i = min(int(at), len(colors) - 2)
    pairs = zip(_rgb(colors[i]), _rgb(colors[i + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in pairs)


def ink_on(color: str) -> str:
    """Black or white, whichever can be read better on a color; at least 4.5 to 1, as WCAG asks.

    Example:
        >>> ink_on("#4b8fcb"), ink_on("#1f64a8")
        ('#000000', '#ffffff')
    """
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in _rgb(color))]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


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


def check_numbers(name: str, values: Any, axes: str) -> None:
    """Check that values can be drawn.

    Args:
        name: what the caller calls them.
        axes: what they are of, such as "(row, column)".

    Raises:
        InputError: if they are no tensor, or complex: a color or a height says one number.
    """
    if not isinstance(values, Tensor):
        raise InputError(f"{name} is {a_kind(values)}: give a tensor of {axes}, such as torch.tensor(values).")
    if values.is_complex():
        raise InputError(f"{name} is of complex numbers: draw one number of each, its .abs(), .real or .imag.")


def numbers(name: str, values: Any, axes: str) -> Tensor:
    """Values to draw, in double precision on the CPU. Arguments and errors as `check_numbers`."""
    check_numbers(name, values, axes)
    found: Tensor = values.detach().double().cpu()
    return found


def laid_out(
    figure: Figure,
    title: str,
    *,
    height: int,
    width: int | None = None,
    least: int | None = None,
    plans: Sequence[dict[str, Any]] = (),
) -> Figure:
    """`figure` in the common look; it is as wide as its place where no width is given, in a saved page not below `least`.

    Args:
        plans: for maps beside one another, how a saved page lays them out, from the narrowest on: inside its margins it is
            "wide" and "high" (in pixels; where a page has more room it is larger, in the same proportion), and "change"
            says where each map is then. "alone" says how high it is with one map that a menu chooses, and where that one is.
    """
    shown = textwrap.wrap(visible(title), min(110, (width or 680) // 8), max_lines=3, placeholder=" …") if title else []
    figure.update_layout(
        template=theme(dark=False),
        title={"text": "<br>".join(label(line) for line in shown)},
        height=height + 22 * len(shown),
        width=width,
        meta={"least": least, "plans": list(plans)},
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


def even_rows(count: int, most: int) -> list[int]:
    """Of how many maps a row may be, up to `most`, for rows as even as can be.

    Example:
        >>> even_rows(6, 5), even_rows(7, 9), even_rows(3, 0)
        ([1, 2, 3], [1, 2, 3, 4, 7], [1])
    """
    return sorted({1, *(across for rows in range(1, count + 1) if (across := -(-count // rows)) <= most)})


def color_axis(kind: str, name: str, low: float | None, high: float | None) -> dict[str, Any]:
    """A color axis for values of a kind in `SCALES`."""
    return {
        "colorscale": spaced(SCALES[kind][0]),
        "cmin": low,
        "cmax": high,
        "colorbar": {"title": {"text": label(name)}},
    }


def scale_of(figure: Figure, dark: bool) -> list[str] | None:
    """The colors of the figure's cells, light or dark; None where they are none of `SCALES`."""
    shown = [(float(at), color) for at, color in figure.layout.coloraxis.colorscale or ()]
    return next((both[dark] for both in SCALES.values() if spaced(both[0]) == shown), None)


def cell_texts(figure: Figure, dark: bool) -> dict[int, list[list[str]]]:
    """By trace: the texts of its cells, each in black or white as its cell's color asks."""
    axis, colors = figure.layout.coloraxis, scale_of(figure, dark)
    if colors is None:
        return {}
    low, high = axis.cmin, axis.cmax

    def inked(text: str, value: float) -> str:
        bare = re.sub(r'^<span style="color:#\w{6}">(.*)</span>$', r"\1", text, flags=re.DOTALL)
        back = color_at(colors, (value - low) / (high - low)) if math.isfinite(value) else COLORS["paper"][dark]
        return f'<span style="color:{ink_on(back)}">{bare}</span>' if bare else ""

    return {
        i: [
            [inked(text, float(value)) for text, value in zip(*row, strict=True)]
            for row in zip(trace.text, trace.z, strict=True)
        ]
        for i, trace in enumerate(figure.data)
        if trace.type == "heatmap" and trace.text is not None
    }


def spaced(colors: list[str]) -> list[tuple[float, str]]:
    """Colors at equal steps from 0 to 1."""
    return [(i / (len(colors) - 1), color) for i, color in enumerate(colors)]
