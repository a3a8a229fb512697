"""A viewer: a small page of its own, which asks nothing of a network, and shows in a notebook."""

from __future__ import annotations

import html
import json
from typing import Any

from nnatomy.plots.labels import visible
from nnatomy.plots.look import FONT, SCALES, css

# The policy lets nothing in but what stands in the page itself.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style></head>
<body>{heading}<main></main><script>
"use strict";
const data = {data};
{script}</script></body></html>
"""

_STYLE = """* { box-sizing: border-box; }
body { margin: 1rem; background: var(--paper); color: var(--ink); font: 14px/1.5 FONT; }
h1 { margin: 0 0 .5rem; font-size: 1.05rem; font-weight: 500; overflow-wrap: anywhere; }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin-bottom: .6rem; color: var(--soft); }
select { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
  padding: .15rem .4rem; max-width: 100%; }
.scale { display: inline-flex; gap: .4rem; align-items: center; font-variant-numeric: tabular-nums; }
.scale i { display: inline-block; width: 9rem; height: .5rem; border-radius: .25rem; }
.tokens { display: flex; flex-wrap: wrap; gap: 2px; max-width: 64rem; }
.tokens button { font: 13px/1.5 ui-monospace, 'DejaVu Sans Mono', monospace; color: var(--ink); background: var(--card);
  border: 0; border-radius: 3px; padding: .1rem .25rem; margin: 0; cursor: pointer; max-width: 100%; overflow-wrap: anywhere; }
.tokens .break { flex-basis: 100%; height: 0; }
button:focus-visible, select:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.tokens button.at { box-shadow: 0 0 0 2px var(--accent); }
.tokens button.locked { box-shadow: 0 0 0 3px var(--bad); }
.tokens button.off { opacity: .45; }
output { display: block; min-height: 3em; margin: .6rem 0; max-width: 64rem; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
output b { font-weight: 600; } .soft { color: var(--soft); }
"""

_SCRIPT = r"""
const media = matchMedia("(prefers-color-scheme: dark)");
const make = (tag, inside, text, kind) => {
  const one = document.createElement(tag);
  if (text !== undefined) one.textContent = text;  // never as markup
  if (kind) one.className = kind;
  inside.append(one);
  return one;
};
const rgb = color => [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
function colorAt(kind, share) {  // share: 0 to 1
  const scale = data.scales[kind][+media.matches].map(rgb);
  const at = Math.min(Math.max(share, 0), 1) * (scale.length - 1), i = Math.min(Math.floor(at), scale.length - 2);
  return scale[i].map((part, j) => Math.round(part + (scale[i + 1][j] - part) * (at - i)));
}
function ink(color) {  // black or white, whichever can be read better: by the luminance of WCAG
  const [r, g, b] = color.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return (.2126 * r + .7152 * g + .0722 * b + .05) ** 2 > .05 * 1.05 ? "#000000" : "#ffffff";
}
function paint(button, color) {
  button.style.background = color ? `rgb(${color})` : "";
  button.style.color = color ? ink(color) : "";
}
function legend(inside, kind, low, high) {
  const box = make("span", inside, undefined, "scale");
  make("span", box, low);
  const steps = data.scales[kind][+media.matches];
  make("i", box).style.background = `linear-gradient(90deg, ${steps.join(", ")})`;
  make("span", box, high);
  return box;
}
const number = value => value === null ? "no value" : String(+value.toPrecision(4));
// Tokens as buttons, of which Tab reaches one and the arrows the others. point(i): hovered or focused, null when left;
// press(i): clicked, Enter or the space bar.
function tokenButtons(inside, point, press) {
  const box = make("div", inside, undefined, "tokens");
  const buttons = data.tokens.map((token, i) => {
    const one = make("button", box, token);
    one.type = "button";
    one.tabIndex = i ? -1 : 0;
    if (data.breaks[i]) make("span", box, undefined, "break");
    return one;
  });
  buttons.forEach((one, i) => {
    one.addEventListener("mouseenter", () => point(i));
    one.addEventListener("mouseleave", () => point(null));
    one.addEventListener("focus", () => { if (one.matches(":focus-visible")) point(i); });
    one.addEventListener("click", () => press(i));
    one.addEventListener("keydown", event => {
      const to = {ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: buttons.length - 1}[event.key];
      if (event.key === "Escape") press(null);
      if (!buttons[to]) return;
      event.preventDefault();
      one.tabIndex = -1; buttons[to].tabIndex = 0; buttons[to].focus(); point(to);
    });
  });
  return buttons;
}
const main = document.querySelector("main");
"""


class View:
    """A viewer made by `attention_view` or `token_view`.

    As the last line of a notebook's cell it shows itself; `save(view, "tokens.html")` writes its page.

    Attributes:
        page: the whole page, as HTML.
        height: pixels that it takes in a notebook.
    """

    def __init__(self, title: str, data: dict[str, Any], *, style: str, script: str, height: int) -> None:
        scales = {"scales": {kind: SCALES[kind] for kind in ("sequential", "diverging")}}
        shown = html.escape(visible(title)) if title else ""
        self.height = height
        self.page = _PAGE.format(
            title=shown or "nnatomy",
            heading=f"<h1>{shown}</h1>" if shown else "",
            style=css() + _STYLE.replace("FONT", FONT) + style,
            data=within_script({**data, **scales}),
            script=_SCRIPT + script,
        )

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own, which reaches nothing of the notebook."""
        return (
            f'<iframe title="nnatomy" sandbox="allow-scripts" style="width:100%;height:{self.height}px;border:0" '
            f'srcdoc="{html.escape(self.page)}"></iframe>'
        )

    def __repr__(self) -> str:
        return "<a view: the last line of a notebook's cell shows it, nnatomy.plots.save(view, 'view.html') writes it>"


def within_script(data: Any) -> str:
    """JSON that no token ends the script with."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
