"""A figure as a file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from nnatomy.errors import InputError, MissingPackageError, a_kind
from nnatomy.paths import path_of
from nnatomy.plots.look import FONT, Figure, cell_texts, css, scale_of, spaced, theme
from nnatomy.plots.view import View

#: Of a page with plots, behind `css()`.
STYLE = """.plot { overflow-x: auto } .plot > div { max-width: 160rem }
.updatemenu-header-arrow { fill: var(--ink) !important }  /* plotly draws it once, and not again in the other look */
.xtitle { transform: none !important }  /* plotly moves it upwards to the labels by what a color bar takes */
.textpoint text { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round }
"""

#: Of such a page, behind its plots: they are light or dark, as wide as their place, and where that is wide, higher.
SCRIPT = """const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plotly-graph-div")].map(plot => {
  const box = plot.closest(".plot"), place = plot.parentElement.style;
  plot.on("plotly_afterplot", () => {  // (what plotly makes around it stays as large as it was first)
    place.height = `${plot._fullLayout.height}px`;
    place.width = plot.layout.width ? `${plot.layout.width}px` : "100%";
  });
  return {plot, box, ...JSON.parse(box.dataset.plot)};
});
const paint = () => Promise.all(plots.map(({plot, looks, texts, traces}) => {
  const look = looks[+dark.matches];
  return traces.length ? Plotly.update(plot, {text: texts[+dark.matches]}, look, traces) : Plotly.relayout(plot, look);
}));
const fill = () => plots.forEach(({plot, box, sizes}) => {
  const room = box.clientWidth - sizes.beside, below = innerHeight - plot.getBoundingClientRect().top - scrollY - sizes.above;
  const scale = one => Math.min(Math.max(room / one.wide, 1), 2);  // up to twice as large as drawn
  // The plan with the largest maps of which all are seen at once; if none is such, the one with the most in a row.
  const fit = sizes.plans.filter(one => one.wide <= room), seen = fit.filter(one => scale(one) * one.high <= below);
  const plan = seen.reduce((a, b) => scale(b) >= scale(a) ? b : a, seen[0]) ?? fit.pop() ?? sizes.plans[0];
  // Maps keep their proportion; another plot is no higher than the window, unless drawn so.
  const by = plan.change ? scale(plan) : Math.min(scale(plan), Math.max(1, below / plan.high));
  const high = one => sizes.above + by * one;
  const change = {...plan.change, height: high(plan.high)}, menu = plot.layout.updatemenus?.[0];
  menu?.buttons.forEach(({args: [, one]}, i) => {
    if (!i) return Object.assign(one, change);
    one.height = high(plan.alone.high);
    for (const key in one) if (key.endsWith(".domain")) one[key] = plan.alone[key[0]];
  });
  const wide = plan.change && {width: sizes.beside + by * plan.wide};
  Plotly.relayout(plot, {...(menu?.active ? menu.buttons[menu.active].args[1] : change), ...wide});
});
dark.addEventListener("change", paint); addEventListener("resize", fill); paint(); fill();
"""

# The policy lets nothing in but what stands in the page itself.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{look}body {{ margin: 1rem; background: var(--paper); color: var(--ink); font: 15px/1.5 {font} }}
h1 {{ margin: 0 0 .25rem; max-width: 60rem; font-size: 1.1rem; font-weight: 500; overflow-wrap: anywhere }}
</style></head>
<body>{heading}{plot}<script>{script}</script></body></html>
"""
_WIDE = 1280  # pixels: in a wider place a plot is also higher


def save(figure: Figure | View, path: str | Path) -> None:
    """Write a figure or a viewer as one self-contained page (.html), or as a picture (.png, .svg, .pdf).

    The page needs no network, and is light or dark as its reader's system is.

    Args:
        figure: what a function of this package, or the `.plot()` of a result, returns.
        path: the file; its ending says what is written.

    Raises:
        InputError: if the ending is another one; a viewer is written as .html alone.
        MissingPackageError: if a picture is asked for, and kaleido or a browser for it is not installed.
    """
    path = path_of(path, "a file to write")
    if not isinstance(figure, View) and not hasattr(figure, "to_plotly_json"):
        raise InputError(f"figure is {a_kind(figure)}: give what a plot returns, save(result.plot(), {str(path)!r}).")
    if path.suffix == ".html":
        path.write_text(figure.page if isinstance(figure, View) else page(figure), encoding="utf-8")
    elif isinstance(figure, View):
        raise InputError(f"{path.name}: a viewer is saved as .html.")
    elif path.suffix in (".png", ".svg", ".pdf"):
        _picture(figure, path)
    else:
        raise InputError(f"{path.name}: a figure is saved as .html, .png, .svg or .pdf.")


def page(figure: Figure) -> str:
    """The figure as a page with all that it needs in it."""
    title = figure.layout.title.text or ""
    drawn = figure
    if title:  # above the plot, where it is folded as its reader's window is wide
        drawn = type(figure)(figure)
        lines = 22 * len(title.split("<br>"))
        drawn.update_layout(
            title={"text": ""}, margin={"t": figure.layout.margin.t - lines}, height=figure.layout.height - lines
        )
    whole = title.replace("<br>", " ")
    return _PAGE.format(
        title=whole or "nnatomy",
        heading=f"<h1>{whole}</h1>" if whole else "",
        look=css() + STYLE,
        font=FONT,
        plot=part(drawn, include_plotlyjs=True),
        script=SCRIPT,
    )


def part(figure: Figure, *, include_plotlyjs: bool, buttons: bool = True) -> str:
    """The figure as a part of a page that has `STYLE` and `SCRIPT`; `buttons`: with those of plotly."""
    config = {
        "responsive": True,
        "displaylogo": False,
        "displayModeBar": buttons,
        "showSendToCloud": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d"],  # for what nothing is done with
    }
    texts = [cell_texts(figure, dark) for dark in (False, True)]
    data = {
        "looks": [look(figure, dark) for dark in (False, True)],
        "texts": [[*one.values()] for one in texts],
        "traces": [*texts[0]],
        "sizes": _sizes(figure),
    }
    meta = figure.layout.meta or {}
    least = 0
    drawn = type(figure)(figure).update_layout(meta=None)
    if not meta.get("plans"):  # as wide as its place
        least = figure.layout.width or meta.get("least") or 0
        drawn.update_layout(width=None)
    plot = drawn.to_html(full_html=False, include_plotlyjs=include_plotlyjs, config=config)
    return f'<div class="plot" data-plot="{html.escape(json.dumps(data))}"><div style="min-width:{least}px">{plot}</div></div>'


def _sizes(figure: Figure) -> dict[str, Any]:
    """The sizes in pixels of a figure's margins, and of what is inside them in each of its plans."""
    layout, margin = figure.layout, figure.layout.margin
    beside, above = (margin.l or 0) + (margin.r or 0), (margin.t or 0) + (margin.b or 0)
    alone = [{"wide": _WIDE - beside, "high": (layout.height or 450) - above}]
    return {"beside": beside, "above": above, "plans": (layout.meta or {}).get("plans") or alone}


def look(figure: Figure, dark: bool) -> dict[str, Any]:
    """What makes a drawn figure light or dark."""
    colors = scale_of(figure, dark)
    return {"template": theme(dark)} | ({"coloraxis.colorscale": spaced(colors)} if colors else {})


def _picture(figure: Figure, path: Path) -> None:
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError:
        raise MissingPackageError(
            f"{path.name}: pictures are drawn by kaleido: pip install kaleido. Or save the figure as .html."
        ) from None
    size = {"width": figure.layout.width or 900, "height": figure.layout.height or 500, "scale": 2}
    options = {"format": path.suffix[1:], **size}
    try:  # by itself kaleido would ask the network for a MathJax
        picture = kaleido.calc_fig_sync(figure.to_dict(), opts=options, kopts={"mathjax": False})
    except ChromeNotFoundError:
        raise MissingPackageError(
            f"{path.name}: kaleido draws with Chrome or Chromium, and finds none. Install one, or set BROWSER_PATH to it; "
            "or save the figure as .html."
        ) from None
    path.write_bytes(picture)
