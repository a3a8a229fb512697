"""Figures hold the values given, at their places, under labels that can be read."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from contrast import contrast

from nnatomy.errors import InputError, MissingPackageError, UsageError
from nnatomy.plots import attention, bars, circuit, curves, heat_map, over_picture, parts, token_view
from nnatomy.plots.look import COLORS, SCALES, SIGNED, cell_texts, color_at, ink_on, theme

TOKENS = ["The", " the", " the", "<b>x</b>"]
VALUES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, float("nan"), 0.7, 0.8]])


def a_map(**more: object) -> go.Figure:
    return heat_map(VALUES, rows=["0", "1"], columns=TOKENS, **more)  # type: ignore[arg-type]


def test_a_heat_map_has_the_values_and_a_column_for_each_of_equal_tokens() -> None:
    figure = a_map(value_name="effect")
    (trace,) = figure.data
    assert torch.equal(torch.tensor(trace.z).nan_to_num(-1), VALUES.double().nan_to_num(-1))
    assert trace.x is None  # columns are places, not names: equal names would fall into one
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]
    assert list(figure.layout.xaxis.ticktext) == ["The", "·the", "·the", "&lt;b&gt;x&lt;/b&gt;"]
    assert list(figure.layout.yaxis.ticktext) == ["0", "1"]
    assert figure.layout.yaxis.autorange is None  # the first row is the lowest


def test_hover_has_row_column_value_and_what_is_added() -> None:
    hover = [["", "", "", ""], ["", "", " Rome\n<i>", ""]]
    text = a_map(value_name="effect", hover=hover).data[0].hovertext
    assert text[1][2] == "layer 1<br>position 2: ·the<br>effect: 0.7<br>·Rome<br>&lt;i&gt;"
    text = a_map(row_title="head", column_title="key").data[0].hovertext
    assert text[0][3] == "head 0<br>key 3: &lt;b&gt;x&lt;/b&gt;<br>value: 0.4"


def test_texts_stand_in_the_cells() -> None:
    texts = [[" a", "b", "c", "<u>"], ["1", "2", "3", "x" * 30]]
    (trace,) = a_map(texts=texts).data
    assert list(map(bare, trace.text[0])) == ["·a", "b", "c", "&lt;u&gt;"]
    assert bare(trace.text[1][3]) == "x" * 11 + "…"
    assert trace.texttemplate == "%{text}"


def bare(text: str) -> str:
    """A cell's text without its color."""
    return re.fullmatch(r'<span style="color:#[0-9a-f]{6}">(.*)</span>', text)[1]  # type: ignore[index]


def test_long_texts_are_cut_where_all_of_them_fit_no_page() -> None:
    def texts(columns: int, text: str) -> object:
        drawn = heat_map(torch.ones(1, columns), rows=["0"], columns=["a"] * columns, texts=[[text] * columns]).data[0]
        assert drawn.hovertext[0][0].endswith(f"<br>{text}")
        return None if drawn.text is None else bare(drawn.text[0][0])

    assert texts(12, "Washington") == "Washing…"
    assert texts(8, "Washington") == "Washington"
    assert texts(18, "0.53") == "0.53"
    assert texts(18, "Washington") is None
    assert texts(60, "a") is None


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", SCALES)
def test_text_can_be_read_on_every_color_of_a_scale(kind: str, dark: bool) -> None:
    for i in range(1001):
        color = color_at(SCALES[kind][dark], i / 1000)
        assert contrast(ink_on(color), color) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("diverging", [False, True])
def test_each_cell_has_the_ink_of_its_color(dark: bool, diverging: bool) -> None:
    values = torch.linspace(-1.0 if diverging else 0.0, 1.0, 21)[None]
    values[0, 5] = torch.nan
    figure = heat_map(values, rows=["0"], columns=["a"] * 21, texts=[["x"] * 21], diverging=diverging)
    (texts,) = cell_texts(figure, dark)[0]
    scale = SCALES["diverging" if diverging else "sequential"][dark]
    colors = [color_at(scale, i / 20) for i in range(21)]
    colors[5] = COLORS["paper"][dark]  # empty
    inks = [re.search("#[0-9a-f]{6}", text)[0] for text in texts]  # type: ignore[index]
    assert len(set(inks)) == 2
    assert min(contrast(ink, color) for ink, color in zip(inks, colors, strict=True)) >= 4.5
    if not dark:
        assert [list(row) for row in figure.data[0].text] == [texts]


@pytest.mark.parametrize(
    ("values", "diverging", "limits"),
    [
        ([[0.2, 0.6]], False, (0.0, 0.6)),
        ([[-3.0, -1.0]], False, (-3.0, -1.0)),
        ([[-1.0, 4.0]], False, (-1.0, 4.0)),
        ([[-1.0, 4.0]], True, (-4.0, 4.0)),
        ([[-1.0, float("inf")]], True, (-1.0, 1.0)),
        ([[float("nan"), float("nan")]], False, (0.0, 1.0)),
        ([[0.0, 0.0]], True, (-1.0, 1.0)),
    ],
)
def test_colors_span_the_values(values: list[list[float]], diverging: bool, limits: tuple[float, float]) -> None:
    figure = heat_map(torch.tensor(values), rows=["0"], columns=["a", "b"], diverging=diverging)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == pytest.approx(limits)


def test_zero_has_the_middle_color_where_values_diverge() -> None:
    scale = a_map(diverging=True).layout.coloraxis.colorscale
    assert scale[len(scale) // 2][0] == 0.5
    assert len(scale) % 2 == 1


def test_long_prompts_make_a_wide_figure_and_short_ones_fit_their_place() -> None:
    long = heat_map(torch.rand(2, 200), rows=["0", "1"], columns=[" token"] * 200)
    assert long.layout.width > 200 * 12
    assert len(long.layout.xaxis.ticktext) == 200
    assert a_map().layout.width is None


def test_values_of_any_kind_are_drawn() -> None:
    values = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16, requires_grad=True)
    assert heat_map(values, rows=["0"], columns=["a", "b"]).data[0].z.tolist() == [[1.5, -2.0]]
    assert heat_map(torch.tensor([[1, 2]]), rows=["0"], columns=["a", "b"]).data[0].z.tolist() == [[1.0, 2.0]]
    assert bars(values[0], labels=["a", "b"]).data[0].x.tolist() == [1.5, -2.0]
    assert attention(torch.ones(1, 1, 1, dtype=torch.bfloat16), tokens=["a"]).data[0].z.tolist() == [[1.0]]


def test_bars() -> None:
    labels = ["embedding", " Paris", " Paris"]
    figure = bars(torch.tensor([1.5, -0.5, 0.0]), labels=labels, value_name="logits", title="a < b")
    (trace,) = figure.data
    assert trace.x.tolist() == [1.5, -0.5, 0.0]
    assert trace.y is None
    assert list(figure.layout.yaxis.ticktext) == ["embedding", "·Paris", "·Paris"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first is on top
    assert trace.marker.color.tolist() == [1, 0, 1]
    assert trace.hovertext[1] == "·Paris<br>logits: -0.5"
    assert figure.layout.title.text == "a &lt; b"


def test_curves() -> None:
    ys = {" Paris": [0.1, float("nan"), 1], "<b>": [3, 2, 1]}
    figure = curves([0, 1, 2], ys, x_title="layer", y_title="p")
    assert [trace.name for trace in figure.data] == ["·Paris", "&lt;b&gt;"]
    assert list(figure.data[1].y) == [3.0, 2.0, 1.0]
    assert list(figure.data[0].x) == [0.0, 1.0, 2.0]
    assert figure.data[0].hovertext[2] == "·Paris<br>layer: 2<br>p: 1"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("layer", "p")


@pytest.mark.parametrize(
    ("x", "step"),
    [(range(8), 1), (range(16), 2), (range(101), 10), ([3, 4], 1), ([5], 1), ([0, 0.5, 1], None), ([], None)],
)
def test_an_axis_of_whole_numbers_names_whole_numbers(x: list[float], step: int | None) -> None:
    axis = curves(list(x), {"a": list(x)}).layout.xaxis
    assert axis.dtick == step
    assert step is None or axis.tick0 == min(x)


def test_attention_has_a_map_for_each_head_and_a_menu_for_one_alone() -> None:
    patterns = torch.rand(6, 4, 4)
    figure = attention(patterns, tokens=TOKENS)
    for head, trace in enumerate(figure.data):
        assert torch.equal(torch.tensor(trace.z), patterns[head])
        assert list(trace.x) == list(trace.y) == ["0 The", "1 ·the", "2 ·the", "3 &lt;b&gt;x&lt;/b&gt;"]
    assert [note.text for note in figure.layout.annotations] == [f"H{i}" for i in range(6)]
    assert figure.layout.yaxis.autorange == "reversed"
    everything, *single = figure.layout.updatemenus[0].buttons
    assert everything.args[0]["visible"] == [True] * 6
    assert single[2].args[0]["visible"] == [False, False, True, False, False, False]
    assert figure.data[2].xaxis == "x3"

    def sides(layout: Any) -> tuple[float, float]:
        """How wide and high the third map is, in pixels."""
        wide, high = layout.width - layout.margin.l - layout.margin.r, layout.height - layout.margin.t - layout.margin.b
        return tuple(
            (axis.domain[1] - axis.domain[0]) * size for axis, size in ((layout.xaxis3, wide), (layout.yaxis3, high))
        )

    small = sides(figure.layout)
    alone = figure.update_layout({key.replace(".", "_"): v for key, v in single[2].args[1].items() if "[" not in key})
    large = sides(alone.layout)
    assert large[0] == pytest.approx(large[1], rel=0.02)
    assert large[0] > 1.5 * small[0]
    assert 0 <= alone.layout.xaxis3.domain[0] < alone.layout.xaxis3.domain[1] <= 1
    assert 0 <= alone.layout.yaxis3.domain[0] < alone.layout.yaxis3.domain[1] <= 1
    assert alone.layout.xaxis3.visible
    assert not alone.layout.xaxis2.visible
    assert single[2].label == "H2"


def test_what_a_causal_mask_hides_is_left_out() -> None:
    causal = torch.rand(6, 3, 4).tril(1)  # the queries are the last three of four positions
    for trace, pattern in zip(attention(causal, tokens=TOKENS).data, causal, strict=True):
        shown = torch.tensor(trace.z)
        assert torch.equal(shown.isnan(), torch.ones(3, 4).triu(2).bool())
        assert torch.equal(shown.nan_to_num(), pattern)


def test_every_head_has_its_labels_and_square_cells() -> None:
    for queries, keys in ((4, 4), (3, 4), (4, 4), (90, 90)):
        tokens = [TOKENS[i % 4] for i in range(keys)]
        figure = attention(torch.rand(6, queries, keys), tokens=tokens)
        layout = figure.layout
        wide = layout.width - layout.margin.l - layout.margin.r
        high = layout.height - layout.margin.t - layout.margin.b
        for i in ("", *range(2, 7)):
            x, y = layout[f"xaxis{i}"], layout[f"yaxis{i}"]
            cell = (x.domain[1] - x.domain[0]) * wide / keys, (y.domain[1] - y.domain[0]) * high / queries
            assert cell[0] == pytest.approx(cell[1], rel=0.02)
            assert x.visible is not False
            assert y.visible is not False
            shown = [
                figure.data[0].x.tolist().index(name)
                if hasattr(figure.data[0].x, "tolist")
                else list(figure.data[0].x).index(name)
                for name in x.tickvals
            ]
            assert shown[0] == 0
            assert all((b - a) * cell[0] >= 12.5 for a, b in itertools.pairwise(shown))
        assert 500 < layout.width <= 960


def test_heads_are_named_by_layer_also_where_layers_are_stacked() -> None:
    def names(patterns: torch.Tensor, **more: object) -> list[str]:
        return [note.text for note in attention(patterns, tokens=TOKENS, **more).layout.annotations]  # type: ignore[arg-type]

    patterns = torch.rand(2, 3, 4, 4)
    assert names(patterns) == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert names(patterns, layer=[5, 7])[-1] == "L7H2"
    assert names(patterns[0], layer=3) == ["L3H0", "L3H1", "L3H2"]
    figure = attention(patterns, tokens=TOKENS)
    assert torch.equal(torch.tensor(figure.data[4].z), patterns[1, 1])
    with pytest.raises(InputError) as caught:
        attention(patterns, tokens=TOKENS, layer=[1])
    assert str(caught.value) == "The patterns are of 2 layers, and 1 are named."


def test_zero_is_another_color_than_nothing() -> None:
    for dark in (False, True):
        assert SCALES["sequential"][dark][0] not in (COLORS["paper"][dark], COLORS["card"][dark])


def test_the_color_bar_is_in_sight_however_wide_the_figure_is() -> None:
    figure = heat_map(torch.rand(2, 200), rows=["0", "1"], columns=[" token"] * 200, value_name="effect, nats")
    bar = theme(dark=False)["layout"]["coloraxis"]["colorbar"]
    assert (bar["orientation"], bar["x"], bar["xanchor"]) == ("h", 0, "left")
    assert figure.layout.coloraxis.colorbar.title.text == "effect, nats"


def test_a_lens_of_sixty_tokens_fits_a_page_and_its_texts_are_in_the_hover() -> None:
    texts = [[f"answer {j}" for j in range(60)] for _ in range(2)]
    figure = heat_map(torch.rand(2, 60), rows=["0", "1"], columns=[" token"] * 60, texts=texts)
    assert figure.layout.width is None
    assert figure.layout.meta["least"] <= 900
    assert figure.data[0].text is None
    assert figure.data[0].hovertext[1][7].endswith("<br>answer 7")
    assert len(figure.layout.xaxis.ticktext) == 60


def test_the_menu_goes_back_to_the_overview() -> None:
    figure = attention(torch.rand(6, 4, 4), tokens=TOKENS)
    everything = figure.layout.updatemenus[0].buttons[0].args[1]
    for key, value in everything.items():
        if key.startswith(("xaxis", "yaxis")):
            axis, name = key.split(".")
            assert figure.layout[axis][name] == (tuple(value) if name == "domain" else value)


def test_later_steps_of_a_generation_have_fewer_queries_than_keys() -> None:
    figure = attention(torch.rand(1, 1, 4), tokens=TOKENS)
    assert list(figure.data[0].y) == ["3 &lt;b&gt;x&lt;/b&gt;"]
    assert not figure.layout.updatemenus


def test_parts_of_heads_are_a_map_of_layer_by_head() -> None:
    names = [
        "embeddings",
        *(f"L{i}{part}" for i in range(4) for part in ("H0", "H10", "H2", " mlp", "H1", "H3")),
        "rest",
    ]
    values = torch.arange(float(len(names)))
    figure = parts(values, labels=names, value_name="logit")
    z = torch.tensor(figure.data[0].z)
    assert list(figure.layout.xaxis.ticktext) == ["H0", "H1", "H2", "H3", "H10", "mlp"]
    assert list(figure.layout.yaxis.ticktext) == ["embeddings", "0", "1", "2", "3", "rest"]
    assert z[2, 4] == names.index("L1H10")
    assert z[4, 5] == names.index("L3 mlp")
    assert not z[[0, 5]].isfinite().any()
    assert z.isfinite().sum() == len(names) - 2
    for band, row, value in zip(figure.data[1:], (0, 5), (0, 25), strict=True):  # across all columns
        assert [list(line) for line in band.z] == [[value]]
        assert (list(band.x), list(band.y)) == ([-0.5, 5.5], [row - 0.5, row + 0.5])
        assert bare(band.text[0][0]) == str(value)
        assert band.hovertext[0][0] == f"{names[value]}<br>logit: {value}"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-25, 25)
    assert figure.layout.height < 500
    assert figure.data[0].hovertext[2][4].endswith("<br>L1H10")


def test_few_parts_and_parts_of_no_heads_are_bars() -> None:
    for names in (["L0H0", "L0H1"], [f"L{i} mlp" for i in range(30)], ["L0H1"] * 30):
        assert parts(torch.ones(len(names)), labels=names).data[0].type == "bar"


def a_circuit(k: int = 80) -> go.Figure:
    scores = torch.tensor([[0.5, -2.0, 0.0], [0.0, float("nan"), 1.0], [0.0, 0.0, -0.1]])
    sources, destinations = ["embeddings", "L0H1", "L1 mlp"], ["L0H1.q", "L1 mlp", "logits"]
    return circuit(scores, sources=sources, destinations=destinations, k=k, value_name="<b>", title="a < b")


def test_a_circuit_is_a_graph_of_its_largest_edges() -> None:
    *edges, nodes, _, _ = a_circuit().data
    assert [edge.text for edge in edges] == [
        "embeddings → L1 mlp<br>&lt;b&gt;: -2",
        "L0H1 → logits<br>&lt;b&gt;: 1",
        "embeddings → L0H1.q<br>&lt;b&gt;: 0.5",
        "L1 mlp → logits<br>&lt;b&gt;: -0.1",
    ]
    assert [edge.line.color for edge in edges] == [SIGNED[0], SIGNED[1], SIGNED[1], SIGNED[0]]
    widths = [edge.line.width for edge in edges]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 4
    assert list(nodes.text) == ["embeddings", "H1", "mlp", "logits"]
    at = dict(zip(nodes.text, zip(nodes.x, nodes.y, strict=True), strict=True))
    assert at["embeddings"][1] < at["H1"][1] < at["mlp"][1] < at["logits"][1]
    for edge, (start, end) in zip(
        edges, (("embeddings", "mlp"), ("H1", "logits"), ("embeddings", "H1"), ("mlp", "logits")), strict=True
    ):
        assert (edge.x[0], edge.y[0]) == pytest.approx(at[start])
        assert (edge.x[-1], edge.y[-1]) == pytest.approx(at[end])
    assert nodes.hovertext[1].split("<br>") == ["L0H1", "→ logits: 1", "← embeddings.q: 0.5"]


def test_a_circuit_is_filtered_by_the_number_of_edges() -> None:
    assert len(a_circuit(k=2).data) == 2 + 3
    scores = torch.rand(12, 12).triu(1)
    names = [f"L{i}H0" for i in range(12)]
    figure = circuit(scores, sources=names, destinations=names)
    steps = figure.layout.sliders[0].steps
    assert [step.value for step in steps] == ["5", "10", "20", "40", "66"]
    assert list(steps[1].args[0]["visible"]) == [True] * 10 + [False] * 56
    assert list(steps[1].args[1]) == list(range(66))
    tenth = scores.flatten().sort(descending=True).values[9]
    assert steps[1].label == f"10 (≥ {float(tenth):.2g})"


def test_no_edge_is_no_error() -> None:
    assert circuit(torch.zeros(1, 1), sources=["a"], destinations=["b"]).layout.sliders == ()


def test_a_long_title_is_folded() -> None:
    lines = a_map(title="word " * 200).layout.title.text.split("<br>")
    assert len(lines) == 3
    assert lines[-1].endswith("…")


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (
            lambda: heat_map(VALUES, rows=["0"], columns=TOKENS),
            "values are (2, 4), with labels for 1 row and 4 columns: give one label each.",
        ),
        (lambda: a_map(texts=[["a"] * 4]), "texts is not a list of 2 rows of 4 strings, as the values are."),
        (
            lambda: a_map(hover=[["a"] * 4, ["a"] * 3]),
            "hover is not a list of 2 rows of 4 strings, as the values are.",
        ),
        (lambda: bars(VALUES[0], labels=["a"]), "4 values with 1 label: give one label each."),
        (
            lambda: curves([0, 1], {"a": [1]}),
            "The curve 'a' has 1 value for 2 places on the axis.",
        ),
        (
            lambda: circuit(VALUES, sources=["a"], destinations=["b"]),
            "scores are (2, 4), with names for 1 source and 1 destination: give one name each.",
        ),
        (lambda: a_circuit(k=0), "k=0: give the number of edges to draw, at least 1."),
        (lambda: parts(VALUES[0], labels=["a"]), "4 values with 1 label: give one label each."),
        (
            lambda: attention(VALUES[None], tokens=["a"]),
            "The patterns are over 2 queries and 4 keys, and not over 1 token.",
        ),
    ],
)
def test_what_does_not_fit_is_said(draw: object, text: str) -> None:
    with pytest.raises(InputError) as caught:
        draw()  # type: ignore[operator]
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "draw",
    [
        a_map,
        lambda: bars(VALUES[0], labels=TOKENS),
        lambda: curves([0], {"a": [1]}),
        lambda: attention(torch.ones(1, 4, 4), tokens=TOKENS),
    ],
)
def test_without_plotly_the_error_says_what_to_install(draw: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingPackageError) as caught:
        draw()  # type: ignore[operator]
    assert str(caught.value) == 'Plots are made with plotly: pip install "nnatomy[plot]".'
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, UsageError)


def test_importing_the_plots_imports_no_plotly() -> None:
    code = "import nnatomy.plots, sys; print('plotly' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_map_lies_over_the_picture_cell_by_cell() -> None:
    """Its cells' middles are those of an even division of the picture, in the picture's own coordinates."""
    grey = torch.full((20, 40, 3), 128, dtype=torch.uint8)
    maps = {f"head {i}": torch.full((2, 4), 0.1 * i) for i in range(1, 6)}
    figure = over_picture(
        grey, maps, title="Heads", value_name="probability", hover={"head 2": [["a", "b", "c", "d"]] * 2}
    )
    assert [trace.type for trace in figure.data] == ["image", *["image", "heatmap"] * 5]
    heat = figure.data[4]
    assert torch.equal(torch.tensor(heat.z), maps["head 2"].double())
    assert (heat.x0, heat.dx, heat.y0, heat.dy) == (25, 50, 25, 50)
    axis = figure.layout[heat.xaxis.replace("x", "xaxis")], figure.layout[heat.yaxis.replace("y", "yaxis")]
    assert [tuple(one.range) for one in axis] == [(0, 200), (100, 0)]
    assert heat.hovertext[1][2] == "row 1, column 2<br>probability: 0.2<br>c"
    assert figure.layout.coloraxis.cmax == pytest.approx(0.5)
    assert figure.layout.width <= 940  # five beside one another fit no page
    domains = [tuple(figure.layout[f"xaxis{i + 1}"].domain) for i in range(6)]
    assert domains[0] == domains[4] != domains[1]
    assert figure.layout.yaxis5.domain[1] < figure.layout.yaxis.domain[0]


def test_what_is_no_picture_is_said() -> None:
    with pytest.raises(InputError, match=r"picture is of shape \(2, 2, 3\) and torch.float32: give a PIL image, or"):
        over_picture(torch.zeros(2, 2, 3), {"a": torch.zeros(1, 1)})
    grey = torch.zeros(2, 2, 3, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"maps: give at least one of \(row, column\); got \[\]"):
        over_picture(grey, {})
    with pytest.raises(InputError, match=r"maps: give at least one of \(row, column\); got \[\(0, 3\)\]"):
        over_picture(grey, {"a": torch.zeros(0, 3)})
    with pytest.raises(InputError, match=r"picture is of shape \(0, 2, 3\) and torch.uint8: give a PIL image, or"):
        over_picture(grey[:0], {"a": torch.zeros(1, 1)})


DRAWN_OF: dict[str, Callable[[Any], Any]] = {
    "maps['a']": lambda values: over_picture(torch.zeros(2, 2, 3, dtype=torch.uint8), {"a": values}),
    "values": lambda values: heat_map(values, rows=["0", "1"], columns=["a", "b"]),
    "scores": lambda values: circuit(values, sources=["a", "b"], destinations=["c", "d"]),
    "patterns": lambda values: attention(values[None], tokens=["a", "b"]),
    "values of bars": lambda values: bars(values[0], labels=["a", "b"]),
    "values of parts": lambda values: parts(values[0], labels=["a", "b"]),
    "norms": lambda values: token_view(["a", "b"], {"norms": values[0]}),
}


@pytest.mark.parametrize("name", DRAWN_OF)
def test_what_is_no_one_number_is_not_drawn(name: str) -> None:
    said = re.escape(name.partition(" of ")[0])
    with pytest.raises(
        InputError, match=rf"^{said} is of complex numbers: draw one number of each, its \.abs\(\), \.real or"
    ):
        DRAWN_OF[name](torch.ones(2, 2, dtype=torch.complex64))
    DRAWN_OF[name](torch.ones(2, 2, dtype=torch.int))
