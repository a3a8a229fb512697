"""A figure as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnatomy.errors import InputError, MissingPackageError, a_kind
from nnatomy.paths import path_of
from nnatomy.plots.look import FONT, Figure, cell_texts, css, scale_of, spaced, theme
from nnatomy.plots.view import View, within_script

# The policy lets nothing in but what stands in the page itself.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{look}body {{ margin: 1rem; background: var(--paper); color: var(--ink); font: 15px/1.5 {font} }}
h1 {{ margin: 0 0 .25rem; max-width: 60rem; font-size: 1.1rem; font-weight: 500; overflow-wrap: anywhere }}
.plot {{ overflow-x: auto }} .plotly-graph-div {{ max-width: {most}; min-width: {least} }}</style></head>
<body>{heading}<div class="plot">{plot}</div><script>
const looks = {looks}, dark = matchMedia("(prefers-color-scheme: dark)");
const texts = {texts}, traces = {traces};
const paint = () => {{
  const plot = document.querySelector(".plotly-graph-div"), i = +dark.matches;
  return traces.length ? Plotly.update(plot, {{text: texts[i]}}, looks[i], traces) : Plotly.relayout(plot, looks[i]);
}};
dark.addEventListener("change", paint); paint();
const sizes = {sizes};
const fill = () => {{  // as wide as the page, up to twice as large as drawn; what is square stays so
  const plot = document.querySelector(".plotly-graph-div"), menu = plot.layout.updatemenus?.[0];
  const by = Math.min(Math.max((document.querySelector(".plot").clientWidth - sizes.beside) / sizes.wide, 1), 2);
  const heights = sizes.heights.map(one => sizes.above + by * one);
  menu?.buttons.forEach((one, i) => {{ one.args[1].height = heights[i]; }});
  Plotly.relayout(plot, {{width: sizes.beside + by * sizes.wide, height: heights[menu?.active ?? 0]}});
}};
if (sizes) {{ addEventListener("resize", fill); fill(); }}
</script></body></html>
"""


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
    looks = [look(figure, dark) for dark in (False, True)]
    texts = [cell_texts(figure, dark) for dark in (False, True)]
    config = {
        "responsive": True,
        "displaylogo": False,
        "showSendToCloud": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d"],  # for what nothing is done with
    }
    title = figure.layout.title.text or ""
    drawn = figure
    if title:  # above the plot, where it is folded as its reader's window is wide
        drawn = type(figure)(figure)
        lines = 22 * len(title.split("<br>"))
        drawn.update_layout(
            title={"text": ""}, margin={"t": figure.layout.margin.t - lines}, height=figure.layout.height - lines
        )
        for change in _heights_of_menus(drawn):
            change["height"] -= lines
    sizes = _sizes(drawn)
    plot = drawn.to_html(full_html=False, include_plotlyjs=True, config=config)
    whole = title.replace("<br>", " ")
    return _PAGE.format(
        title=whole or "nnatomy",
        heading=f"<h1>{whole}</h1>" if whole else "",
        look=css(),
        font=FONT,
        most="none" if figure.layout.width else "80rem",
        least=f"{(figure.layout.meta or {}).get('least') or 0}px",
        plot=plot,
        looks=json.dumps(looks),
        texts=within_script([[*one.values()] for one in texts]),
        traces=[*texts[0]],
        sizes=json.dumps(sizes),
    )


def _heights_of_menus(figure: Figure) -> list[dict[str, Any]]:
    """What each choice of the figure's menu changes, where it changes the height."""
    changes = [button.args[1] for menu in figure.layout.updatemenus for button in menu.buttons]
    return [one for one in changes if "height" in one]


def _sizes(figure: Figure) -> dict[str, Any] | None:
    """The sizes in pixels of a figure that grows with its page, without its margins; None of another."""
    layout, margin = figure.layout, figure.layout.margin
    if not (layout.meta or {}).get("grows"):
        return None
    beside, above = margin.l + margin.r, margin.t + margin.b
    heights = [one["height"] for one in _heights_of_menus(figure)] or [layout.height]
    return {
        "wide": layout.width - beside,
        "beside": beside,
        "above": above,
        "heights": [one - above for one in heights],
    }


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
