"""A figure as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnatomy.errors import InputError, MissingPackageError
from nnatomy.plots.look import SCALES, Figure, spaced, theme

# The policy lets nothing in but what stands in the page itself.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>:root {{ color-scheme: light dark }} body {{ margin: 1rem; background: {light}; overflow-x: auto }}
.plotly-graph-div {{ max-width: {width} }}
@media (prefers-color-scheme: dark) {{ body {{ background: {dark} }} }}</style></head>
<body>{plot}<script>
const looks = {looks}, dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => Plotly.relayout(document.querySelector(".plotly-graph-div"), looks[+dark.matches]);
dark.addEventListener("change", paint); paint();
</script></body></html>
"""


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as one self-contained page (.html), or as a picture (.png, .svg, .pdf).

    The page needs no network, and is light or dark as its reader's system is.

    Args:
        figure: what a function of this package, or the `.plot()` of a result, returns.
        path: the file; its ending says what is written.

    Raises:
        InputError: if the ending is another one.
        MissingPackageError: if a picture is asked for, and kaleido or a browser for it is not installed.
    """
    path = Path(path)
    if path.suffix == ".html":
        path.write_text(page(figure), encoding="utf-8")
    elif path.suffix in (".png", ".svg", ".pdf"):
        _picture(figure, path)
    else:
        raise InputError(f"{path.name}: a figure is saved as .html, .png, .svg or .pdf.")


def page(figure: Figure) -> str:
    """The figure as a page with all that it needs in it."""
    looks = [_look(figure, dark) for dark in (False, True)]
    config = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
    plot = figure.to_html(full_html=False, include_plotlyjs=True, config=config)
    return _PAGE.format(
        title=(figure.layout.title.text or "nnatomy").replace("<br>", " "),
        light=theme(dark=False)["layout"]["paper_bgcolor"],
        dark=theme(dark=True)["layout"]["paper_bgcolor"],
        width="none" if figure.layout.width else "80rem",
        plot=plot,
        looks=json.dumps(looks),
    )


def _look(figure: Figure, dark: bool) -> dict[str, Any]:
    """What makes a drawn figure light or dark."""
    scale = [(float(at), color) for at, color in figure.layout.coloraxis.colorscale or ()]
    kind = next((both for both in SCALES.values() if spaced(both[0]) == scale), None)
    return {"template": theme(dark)} | ({"coloraxis.colorscale": spaced(kind[dark])} if kind else {})


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
