"""A page to explore attention patterns in."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.plots.attention import head_names, masked
from nnatomy.plots.labels import visible
from nnatomy.plots.view import View

_STYLE = """.heads { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: .8rem; max-height: 19rem; padding: 3px;
  overflow-y: auto; }
.heads button { font: 12px/1.3 inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: .35rem; padding: 4px; cursor: pointer; }
.heads button[aria-pressed=true] { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); font-weight: 600; }
.heads canvas { display: block; background: var(--paper); width: 64px; height: 64px; image-rendering: pixelated; }
.pair { display: grid; grid-template-columns: minmax(0, min(45vw, 42rem)) minmax(16rem, 1fr); gap: 1.2rem; align-items: start; }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.map { position: relative; } .map canvas { width: 100%; display: block; touch-action: pan-y; }
ol { margin: .2rem 0; padding-left: 1.6rem; font-variant-numeric: tabular-nums; }
h2 { font-size: .95rem; font-weight: 600; margin: 0 0 .3rem; }
"""

_SCRIPT = r"""
const Q = data.queries, K = data.keys, OFF = K - Q, heads = data.names.length;
const bytes = Uint8Array.from(atob(data.patterns), c => c.charCodeAt(0));
const whole = new Uint16Array(bytes.buffer);
const value = (head, q, k) => whole[(head * Q + q) * K + k] / 65535;
const hidden = (q, k) => data.causal && k > q + OFF;
let head = 0, at = null, locked = null, from = true;

const controls = make("div", main, undefined, "controls");
const way = make("label", controls, "a token shows ");
const select = make("select", way);
make("option", select, "what it attends to").value = "from";
make("option", select, "what attends to it").value = "to";
select.addEventListener("change", () => { from = select.value === "from"; show(); });
let bar = null;
const overview = make("div", main, undefined, "heads");
overview.setAttribute("role", "group"); overview.setAttribute("aria-label", "heads");
const thumbs = data.names.map((name, i) => {
  const one = make("button", overview);
  one.type = "button"; one.tabIndex = i ? -1 : 0;
  const canvas = make("canvas", one);
  make("span", one, name);
  one.addEventListener("click", () => choose(i));
  one.addEventListener("keydown", event => {
    const to = {ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: heads - 1}[event.key];
    if (event.key === "Escape") press(null);
    if (!thumbs[to]) return;
    event.preventDefault(); choose(to); thumbs[to].button.focus();
  });
  return {button: one, canvas};
});
const pair = make("div", main, undefined, "pair");
const left = make("div", pair, undefined, "map"), right = make("div", pair);
const canvas = make("canvas", left);
canvas.setAttribute("role", "img");
const heading = make("h2", right);
const buttons = tokenButtons(right, i => { at = i; show(); }, press);
const told = make("output", right);
told.setAttribute("aria-live", "polite");

function press(i) { locked = i === locked ? null : i; if (i === null) at = null; show(); }
function choose(i) { head = i; thumbs.forEach((one, j) => { one.button.tabIndex = j === i ? 0 : -1; }); draw(); }

function thumb(i) {  // where cells are smaller than a pixel, each pixel shows the strongest of them
  const side = Math.min(K, 64), rows = Math.max(1, Math.min(Q, side)), best = new Float32Array(rows * side).fill(-1);
  for (let q = 0; q < Q; q++) for (let k = 0; k < K; k++) if (!hidden(q, k)) {
    const p = Math.floor(q * rows / Q) * side + Math.floor(k * side / K);
    best[p] = Math.max(best[p], value(i, q, k));
  }
  const c = thumbs[i].canvas; c.width = side; c.height = rows;
  fill(c.getContext("2d"), side, rows, best);
}
function fill(context, wide, high, values) {
  const image = context.createImageData(wide, high);
  values.forEach((v, i) => { if (v >= 0) image.data.set([...colorAt("sequential", v / data.most), 255], 4 * i); });
  context.putImageData(image, 0, 0);
}

const TOP = 8;
let cell = 1, edge = 0;  // of the large map, in CSS pixels
function large() {
  const wide = left.clientWidth || 300, ratio = devicePixelRatio || 1, css = getComputedStyle(document.documentElement);
  const step = () => Math.max(1, Math.ceil(11 / cell));
  edge = Math.min(96, wide * .28); cell = Math.min((wide - edge) / K, 80);
  const high = cell * Q + edge + TOP;
  canvas.width = wide * ratio; canvas.height = high * ratio; canvas.style.height = high + "px";
  const pen = canvas.getContext("2d"); pen.scale(ratio, ratio); pen.translate(0, TOP);
  const flat = new Float32Array(Q * K);
  for (let q = 0; q < Q; q++) for (let k = 0; k < K; k++) flat[q * K + k] = hidden(q, k) ? -1 : value(head, q, k);
  const small = document.createElement("canvas"); small.width = K; small.height = Q;
  fill(small.getContext("2d"), K, Q, flat);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, edge, 0, cell * K, cell * Q);
  pen.strokeStyle = css.getPropertyValue("--line"); pen.lineWidth = 1;
  pen.strokeRect(edge + .5, .5, cell * K - 1, cell * Q - 1);
  const one = at ?? locked;
  pen.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace"; pen.textBaseline = "middle"; pen.textAlign = "right";
  const letters = Math.floor((edge - 8) / 6.7);
  const text = i => {
    const t = [...`${i} ${data.tokens[i]}`];
    return t.length > letters ? t.slice(0, letters - 1).join("") + "…" : t.join("");
  };
  for (let i = 0; i < K; i++) {
    if (i !== one && (i % step() || (one !== null && Math.abs(i - one) * cell < 11))) continue;
    pen.fillStyle = css.getPropertyValue(i === one ? "--accent" : "--soft");
    if (i >= OFF) pen.fillText(text(i), edge - 5, (i - OFF + .5) * cell);
    pen.save(); pen.translate(edge + (i + .5) * cell, cell * Q + 5); pen.rotate(-Math.PI / 2);
    pen.fillText(text(i), 0, 0); pen.restore();
  }
  if (one !== null) {
    pen.strokeStyle = css.getPropertyValue("--accent"); pen.lineWidth = 2;
    if (!from) pen.strokeRect(edge + one * cell, 1, cell, cell * Q - 2);
    else if (one >= OFF) pen.strokeRect(edge + 1, (one - OFF) * cell, cell * K - 2, cell);
  }
}
canvas.addEventListener("mousemove", event => {
  const k = Math.floor((event.offsetX - edge) / cell), q = Math.floor((event.offsetY - TOP) / cell);
  if (k < 0 || k >= K || q < 0 || q >= Q) { at = null; show(); return; }
  at = from ? q + OFF : k; show();
  make("div", told, hidden(q, k) ? `${name(k)} is later than ${name(q + OFF)}: masked` :
    `${name(q + OFF)} attends to ${name(k)}: ${value(head, q, k).toFixed(4)}`);
});
canvas.addEventListener("mouseleave", () => { at = null; show(); });
canvas.addEventListener("click", () => { if (at !== null) press(at); });

const name = i => `${i} ${data.tokens[i]}`;
function show() {
  const one = at ?? locked ?? K - 1;
  const shares = data.tokens.map((_, i) => {
    const [q, k] = from ? [one - OFF, i] : [i - OFF, one];
    return q < 0 || hidden(q, k) ? null : value(head, q, k);
  });
  buttons.forEach((button, i) => {
    paint(button, shares[i] === null ? null : colorAt("sequential", shares[i] / data.most));
    button.classList.toggle("at", i === one); button.classList.toggle("locked", i === locked);
    button.classList.toggle("off", shares[i] === null && i !== one);
    button.setAttribute("aria-label", `${name(i)}${shares[i] === null ? "" : `: ${shares[i].toFixed(3)}`}`);
    button.setAttribute("aria-pressed", i === locked);
  });
  heading.textContent = `${data.names[head]}: ${from ? "what" : "what attends to"} ${name(one)}${from ? " attends to" : ""}`;
  told.replaceChildren();
  const list = make("ol", told);
  shares.map((share, i) => [share, i]).filter(([share]) => share !== null).sort((a, b) => b[0] - a[0]).slice(0, 5)
    .forEach(([share, i]) => make("li", list, `${name(i)}: ${share.toFixed(3)}`));
  make("span", told, "Point at a token or a cell, or use Tab and the arrows; a click holds it, Escape lets go.", "soft");
  large();
}
function draw() {
  if (bar) bar.remove();
  bar = legend(controls, "sequential", "0", number(data.most));
  thumbs.forEach((one, i) => { one.button.setAttribute("aria-pressed", i === head); });
  canvas.setAttribute("aria-label", `the pattern of ${data.names[head]}, queries downwards and keys to the right`);
  show();
}
function all() { thumbs.forEach((_, i) => thumb(i)); draw(); }
media.addEventListener("change", all);
addEventListener("resize", show);
all();
"""


def attention_view(
    patterns: Num[Tensor, "*layer head query key"],
    tokens: Sequence[str],
    *,
    title: str = "",
    layer: int | Sequence[int] | None = None,
) -> View:
    """Patterns to explore: all heads small, one of them large, and the tokens colored by what one of them attends to.

    Pointing at a token or a cell shows what it attends to (or what attends to it); a click holds it, Escape lets go. All of
    it is reached by the keyboard: Tab, and the arrows among heads and among tokens.

    Args:
        patterns: such as `model.attention_probabilities[4][0]`; or of several layers, stacked. Each value takes about
            three bytes of the page.
        tokens: of the prompt, the keys; where there are fewer queries, they are the last ones.
        title: of the page.
        layer: which layer's they are (which layers', where several are stacked; by default from 0 on).

    Returns:
        A View: it shows itself in a notebook, and `save(view, "heads.html")` writes it.

    Raises:
        InputError: if there are not as many tokens as keys, or layers as patterns are stacked, or if a value is not
            between 0 and 1.

    Example:
        >>> import torch
        >>> from nnatomy.plots import attention_view
        >>> view = attention_view(torch.eye(3).expand(2, 3, 3), ["The", " end", "."], layer=4)
        >>> "L4H1" in view.page
        True
    """
    names = head_names(patterns, layer)
    shown = masked(patterns, tokens)
    causal = bool(shown.isnan().any() and not patterns.isnan().any())
    shown = shown.nan_to_num()
    if not len(names) or not shown.numel():
        raise InputError("There are no patterns: give those of at least one head and one token.")
    if shown.min() < 0 or shown.max() > 1 + 1e-3 or patterns.isnan().any():
        raise InputError(
            f"Attention probabilities lie between 0 and 1; these go from {float(patterns.min()):.3g} to "
            f"{float(patterns.max()):.3g}. For scores, use `heat_map`."
        )
    steps = (shown.clamp(max=1).double() * 65535).round().int().numpy().astype("<u2")
    data = {
        "tokens": [visible(token) for token in tokens],
        "breaks": [False for _ in tokens],
        "names": names,
        "queries": shown.shape[1],
        "keys": shown.shape[2],
        "causal": causal,
        "most": float(shown.max()) or 1.0,
        "patterns": base64.b64encode(steps.tobytes()).decode(),
    }
    thumbs = min(-(-len(names) // 10), 3) * 98
    return View(title, data, style=_STYLE, script=_SCRIPT, height=min(220 + thumbs + 480, 900))
