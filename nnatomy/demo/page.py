"""The results as one self-contained HTML page with plots."""

from __future__ import annotations

import html
import inspect
from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

import nnatomy.demo.analysis as analysis
from nnatomy.demo.analysis import Lens, Patching, Results, Steering
from nnatomy.demo.tables import patching_sentence
from nnatomy.plots import attention, curves, heat_map
from nnatomy.plots.look import Figure, css
from nnatomy.plots.save import SCRIPT, STYLE, part

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--paper);
       color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; } h2 { margin: 3rem 0 .25rem; font-size: 1.35rem; }
p { max-width: 46rem; margin: .4rem 0 1rem; } .soft { color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
        margin-bottom: 1rem; }
.pair.wide { grid-template-columns: 1fr; }
.card { min-width: 0; background: var(--paper); border: 1px solid var(--line); border-radius: .6rem;
        padding: .9rem; }
.card h3 { margin: 0 0 .3rem; font-size: 1rem; } .card p { margin: .3rem 0 0; font-size: .92rem; }
details { margin: .6rem 0 1.2rem; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border: 1px solid var(--line);
      border-radius: .5rem; font-size: .84rem; line-height: 1.45; }
"""

#: How many tokens of a lens can be read in half the page.
_COLUMNS = 7


def page(all_results: Sequence[Results]) -> str:
    """The page for the results of several models, one beside the other."""
    body = [
        "<h1>nnatomy: one analysis, two architectures</h1>",
        "<p class=soft>The same code ran on both models below; nothing in it knows which one it looks at. "
        "Spaces in tokens are shown as · .</p>",
        _pair(f"<h3>demo:{html.escape(r.name)}</h3><p>{html.escape(r.summary)}</p>" for r in all_results),
        "<h2>Logit lens: what each layer would say next</h2>",
        "<p>Each cell is the most probable next token, were its layer the last one; "
        "the more its color stands out from the page, the more probable it is. "
        "Read a column upwards: the answer forms over the layers.</p>",
        _code(analysis.lens),
    ]
    for i, lens in enumerate(all_results[0].lenses):
        wide = len(lens.tokens) > _COLUMNS
        body.append(_pair((_card(r, lens_plot(r.lenses[i])) for r in all_results), wide))
    body += [
        "<h2>Activation patching: where the answer is carried</h2>",
        "<p>One position of one layer's output is taken from the clean run and put into the corrupted one. "
        "0 is no effect, 1 gives the clean run's logit difference back.</p>",
        _code(analysis.patching),
        _pair(_card(r, patching_plot(r.patching), patching_sentence(r.patching)) for r in all_results),
        "<h2>Steering: another question by adding a vector</h2>",
        "<p>A difference of mean activations, added at the last token, turns a question for the language "
        "into one for the capital. The curves are the probabilities of the two answers.</p>",
        _code(analysis.steering),
        _pair(
            _card(
                r,
                steering_plot(r.steering),
                f"Vector: mean of {r.steering.source}; after layer {r.steering.layer}.",
            )
            for r in all_results
        ),
        "<h2>Attention patterns</h2>",
        "<p>What each position (row) attends to (column), by head. Read under the fast attention kernel, "
        "without changing the logits by a bit.</p>",
        _code(analysis.attention),
        _pair((_card(r, attention_plot(r)) for r in all_results), wide=True),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>nnatomy demo</title><style>{css()}{STYLE}{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{''.join(body)}<script>{SCRIPT}</script></body></html>\n"
    )


def lens_plot(lens: Lens) -> Figure:
    """Layers upwards, positions to the right."""
    return heat_map(
        lens.probs,
        rows=_layers(len(lens.top)),
        columns=lens.tokens,
        texts=lens.top,
        hover=lens.top,
        title=lens.prompt,
        value_name="probability",
    )


def patching_plot(patching: Patching) -> Figure:
    """The effect of each patch."""
    return heat_map(
        patching.effect,
        rows=_layers(len(patching.effect)),
        columns=[a if a == b else f"{a}|{b}" for a, b in patching.tokens],
        texts=[[f"{value:z.2f}" for value in row] for row in patching.effect.tolist()],
        title=f"{patching.clean} / {patching.corrupted}",
        diverging=True,
        value_name="share of the logit difference",
    )


def steering_plot(steering: Steering) -> Figure:
    """The probabilities of the two tokens over the factor."""
    figure = curves(
        steering.factors,
        {token: steering.probs[:, i].tolist() for i, token in enumerate(steering.tokens)},
        title=steering.prompt,
        x_title="factor",
        y_title="probability",
    )
    return figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")


def attention_plot(results: Results) -> Figure:
    """One small map a head."""
    lens, layer = results.lenses[0], results.attention_layer
    return attention(results.attention, tokens=lens.tokens, layer=layer, title=f"Layer {layer}: {lens.prompt}")


def _layers(count: int) -> list[str]:
    return [str(layer) for layer in range(count)]


def _card(results: Results, figure: Figure, note: str = "") -> str:
    below = f"<p class=soft>{html.escape(note)}</p>" if note else ""
    return f"<h3>demo:{html.escape(results.name)}</h3>{part(figure, include_plotlyjs=False, buttons=False)}{below}"


def _pair(cards: Any, wide: bool = False) -> str:
    """Cards side by side; wide ones one below the other."""
    kind = "'pair wide'" if wide else "pair"
    return f"<div class={kind}>{''.join(f'<div class=card>{card}</div>' for card in cards)}</div>"


def _code(function: Any) -> str:
    source = html.escape(inspect.getsource(function))
    return f"<details><summary>the code</summary><pre>{source}</pre></details>"
