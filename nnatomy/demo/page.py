"""The results as one self-contained HTML page with plots."""

from __future__ import annotations

import html
import inspect
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

import nnatomy.demo.analysis as analysis
from nnatomy.demo.analysis import Lens, Patching, Results, Steering
from nnatomy.demo.tables import patching_sentence, show_token
from nnatomy.plots.labels import label

_STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --soft: #5c6577; --back: #ffffff; --card: #f5f7fa;
        --line: #dde2ea; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaf2; --soft: #a3adbf; --back: #14181f;
        --card: #1c222c; --line: #303846; --accent: #7ab5f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--back);
       color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; } h2 { margin: 3rem 0 .25rem; font-size: 1.35rem; }
p { max-width: 46rem; margin: .4rem 0 1rem; } .soft { color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
        margin-bottom: 1rem; }
.pair.wide { grid-template-columns: 1fr; }
.card { min-width: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
        padding: .9rem; overflow-x: auto; }
.card h3 { margin: 0 0 .3rem; font-size: 1rem; } .card p { margin: .3rem 0 0; font-size: .92rem; }
details { margin: .6rem 0 1.2rem; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border: 1px solid var(--line);
      border-radius: .5rem; font-size: .84rem; line-height: 1.45; }
"""

#: How many tokens of a lens can be read in half the page.
_COLUMNS = 7

# Plots have no background of their own; their text and grid follow the page's colours, also when they change.
_SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    const change = {"font.color": text};
    for (const axis of Object.keys(plot.layout).filter(key => /^[xy]axis/.test(key))) {
      change[axis + ".gridcolor"] = line; change[axis + ".linecolor"] = line;
    }
    Plotly.relayout(plot, change).then(() => Plotly.Plots.resize(plot));
  }
}
dark.addEventListener("change", paint);
paint();
"""


def page(all_results: Sequence[Results]) -> str:
    """The page for the results of several models, one beside the other."""
    body = [
        "<h1>nnatomy: one analysis, two architectures</h1>",
        "<p class=soft>The same code ran on both models below; nothing in it knows which one it looks at. "
        "Spaces in tokens are shown as · .</p>",
        _pair(f"<h3>demo:{html.escape(r.name)}</h3><p>{html.escape(r.summary)}</p>" for r in all_results),
        "<h2>Logit lens: what each layer would say next</h2>",
        "<p>Each cell is the most probable next token, were its layer the last one; darker is more probable. "
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
        _pair(_card(r, attention_plot(r), f"Layer {r.attention_layer}.") for r in all_results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>nnatomy demo</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
    )


def lens_plot(lens: Lens) -> go.Figure:
    """Layers upwards, positions to the right."""
    figure = go.Figure(
        go.Heatmap(
            z=lens.probs.tolist(),
            x=_positions(lens.tokens),
            y=list(range(len(lens.top))),
            text=[[_text(token) for token in row] for row in lens.top],
            texttemplate="%{text}",
            customdata=[[_text(token) for token in row] for row in lens.top],
            hovertemplate="layer %{y}, after %{x}<br>%{customdata}: %{z:.1%}<extra></extra>",
            colorscale="Blues",
            zmin=0,
            zmax=1,
            colorbar={"title": "p", "thickness": 10},
        )
    )
    figure.update_yaxes(dtick=1)
    return _laid_out(figure, lens.prompt, "layer", 330)


def patching_plot(patching: Patching) -> go.Figure:
    """The effect of each patch."""
    names = [show_token(a) if a == b else f"{show_token(a)}→{show_token(b)}" for a, b in patching.tokens]
    figure = go.Figure(
        go.Heatmap(
            z=patching.effect.tolist(),
            x=_positions(names),
            y=list(range(len(patching.effect))),
            hovertemplate="layer %{y}, %{x}<br>effect %{z:.2f}<extra></extra>",
            texttemplate="%{z:.2f}",
            colorscale="RdBu",
            zmid=0,
            zmin=-1,
            zmax=1,
            colorbar={"title": "effect", "thickness": 10},
        )
    )
    figure.update_yaxes(dtick=1)
    return _laid_out(figure, f"{patching.clean} / {patching.corrupted}", "layer", 330)


def steering_plot(steering: Steering) -> go.Figure:
    """The probabilities of the two tokens over the factor."""
    figure = go.Figure()
    for i, token in enumerate(steering.tokens):
        figure.add_scatter(
            x=steering.factors,
            y=steering.probs[:, i].tolist(),
            name=_text(token),
            mode="lines+markers",
        )
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    figure.update_xaxes(title="factor")
    figure.update_layout(legend={"orientation": "h", "y": 1.12, "x": 0})
    return _laid_out(figure, steering.prompt, "probability", 340)


def attention_plot(results: Results) -> go.Figure:
    """One small map a head."""
    heads = len(results.attention)
    names = _positions(results.lenses[0].tokens)
    columns = min(3, heads)
    titles = [f"head {head}" for head in range(heads)]
    figure = make_subplots(
        rows=-(-heads // columns),
        cols=columns,
        subplot_titles=titles,
        shared_xaxes=True,
        vertical_spacing=0.12,
    )
    for head in range(heads):
        figure.add_trace(
            go.Heatmap(
                z=results.attention[head].tolist(),
                x=names,
                y=names,
                colorscale="Blues",
                zmin=0,
                zmax=1,
                showscale=False,
                hovertemplate="%{y} attends to %{x}: %{z:.2f}<extra></extra>",
            ),
            row=head // columns + 1,
            col=head % columns + 1,
        )
    figure.update_yaxes(autorange="reversed", showticklabels=False)
    figure.update_yaxes(showticklabels=True, col=1)
    return _laid_out(figure, results.lenses[0].prompt, "", 220 * -(-heads // columns))


def _positions(tokens: Sequence[str]) -> list[str]:
    """Axis labels, made different from each other: plotly would merge equal ones."""
    return [f"{i} {_text(token)}" for i, token in enumerate(tokens)]


def _text(token: str) -> str:
    """A token as plotly is to be given it: it knows no &quot;, and takes $ for TeX."""
    return label(show_token(token))


def _laid_out(figure: go.Figure, title: str, y_title: str, height: int) -> go.Figure:
    figure.update_layout(
        title={"text": label(title), "font": {"size": 14}, "x": 0, "xanchor": "left"},
        height=height,
        margin={"l": 50, "r": 10, "t": 60, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    if y_title:
        figure.update_yaxes(title=y_title)
    return figure


def _card(results: Results, figure: go.Figure, note: str = "") -> str:
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})
    below = f"<p class=soft>{html.escape(note)}</p>" if note else ""
    return f"<h3>demo:{html.escape(results.name)}</h3>{plot}{below}"


def _pair(cards: Any, wide: bool = False) -> str:
    """Cards side by side; wide ones one below the other."""
    kind = "'pair wide'" if wide else "pair"
    return f"<div class={kind}>{''.join(f'<div class=card>{card}</div>' for card in cards)}</div>"


def _code(function: Any) -> str:
    source = html.escape(inspect.getsource(function))
    return f"<details><summary>the code</summary><pre>{source}</pre></details>"
