"""The tokens of a prompt, colored by a value of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.plots.labels import visible
from nnatomy.plots.look import numbers
from nnatomy.plots.view import View

_STYLE = ".values { display: flex; flex-wrap: wrap; gap: 0 1.2rem; }\n"

_SCRIPT = r"""
let channel = 0, locked = null;
const controls = make("div", main, undefined, "controls");
let bar = null;
if (data.channels.length > 1) {
  const name = make("label", controls, "value ");
  const select = make("select", name);
  data.channels.forEach((one, i) => { make("option", select, one).value = i; });
  select.addEventListener("change", () => { channel = +select.value; draw(); });
} else make("span", controls, data.channels[0]);
const told = document.createElement("output");
const buttons = tokenButtons(main, i => tell(i ?? locked), i => { locked = i === locked ? null : i; tell(i); });
main.append(told);
function tell(i) {
  buttons.forEach((one, j) => { one.classList.toggle("at", j === i); one.classList.toggle("locked", j === locked); });
  told.replaceChildren();
  if (i === null) {
    make("span", told, "Point at a token, or reach it with Tab and the arrows. A click holds it, Escape lets go.", "soft");
    return;
  }
  make("b", told, `${i} ${data.tokens[i]}`);
  const list = make("div", told, undefined, "values");
  data.channels.forEach((one, c) => make(c === channel ? "b" : "span", list, `${one}: ${number(data.values[c][i])}`));
}
function draw() {
  const [low, high] = data.limits[channel], kind = data.kinds[channel];
  if (bar) bar.remove();
  bar = legend(controls, kind, number(low), number(high));
  buttons.forEach((one, i) => {
    const value = data.values[channel][i];
    paint(one, value === null ? null : colorAt(kind, (value - low) / (high - low)));
    one.setAttribute("aria-label", `${i} ${data.tokens[i]}: ${number(value)}`);
  });
  tell(locked);
}
media.addEventListener("change", draw);
draw();
"""


def token_view(
    tokens: Sequence[str],
    values: Num[Tensor, " token"] | Mapping[str, Num[Tensor, " token"]],
    *,
    title: str = "",
    value_name: str = "value",
) -> View:
    """The tokens as a text, colored by a value of each; the pointer, or the arrow keys, tell the values.

    Args:
        tokens: of the prompt.
        values: one for each token, NaN where there is none; or several by name (features, heads, losses), of which a menu
            chooses the one that colors. A name whose values are below zero somewhere has zero in the middle of its colors.
        title: of the page.
        value_name: what the values are, where they have no names.

    Returns:
        A View: it shows itself in a notebook, and `save(view, "tokens.html")` writes it.

    Raises:
        InputError: if there are not as many values as tokens.

    Example:
        >>> import torch
        >>> from nnatomy.plots import token_view
        >>> view = token_view(["The", " end"], {"loss": torch.tensor([3.1, 0.2]), "gap": torch.tensor([-1.0, 2.0])})
        >>> "end" in view.page
        True
    """
    named = dict(values) if isinstance(values, Mapping) else {value_name: values}
    if not named:
        raise InputError("There are no values: give a tensor, or at least one by name.")
    channels: dict[str, list[float | None]] = {}
    kinds, limits = [], []
    for name, given in named.items():
        shown = numbers(name, given, "(token)")
        if given.shape != (len(tokens),):
            raise InputError(
                f"{name!r} has values of shape {tuple(given.shape)} for {counted(len(tokens), 'token')}: give one each."
            )
        finite = shown[shown.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        kinds.append("diverging" if low < 0 else "sequential")
        most = max(abs(low), abs(high)) or 1.0
        limits.append((-most if low < 0 else 0.0, most))
        channels[name] = [float(value) if torch.isfinite(value) else None for value in shown]
    data: dict[str, Any] = {
        "tokens": [visible(token) for token in tokens],
        "breaks": ["\n" in token for token in tokens],
        "channels": [visible(name) for name in channels],
        "values": list(channels.values()),
        "kinds": kinds,
        "limits": limits,
    }
    letters = sum(len(token) + 1.5 for token in data["tokens"])
    height = 150 + 26 * (1 + round(letters / 90) + sum(data["breaks"])) + 22 * (len(channels) // 6)
    return View(title, data, style=_STYLE, script=_SCRIPT, height=min(height, 700))
