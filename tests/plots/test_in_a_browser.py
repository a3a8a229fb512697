"""What viewers and saved figures do with pointer and keys, in Chromium; and that what they write can be read there."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Tab, installed, opened
from contrast import contrast
from PIL import Image

from nnatomy.plots import attention, attention_view, circuit, heat_map, over_picture, parts, save, token_view

TOKENS = ["The", " capital", " of", "\n", " France"]
LOSS = torch.tensor([3.25, 0.5, torch.nan, 1.0, 2.0])
GAP = torch.tensor([-1.5, 0.0, 0.25, 3.0, -3.0])


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    program = installed()
    if program is None:
        pytest.skip("Neither Chromium nor Chrome is installed, in which pages are pointed at and clicked.")
    with opened(program) as tab:
        yield tab


@pytest.fixture
def show(browser: Tab, tmp_path: Path) -> Iterator[Callable[..., Tab]]:
    """Save and open; at the end, the page has complained of nothing."""

    def saved(figure: Any, **look: Any) -> Tab:
        save(figure, tmp_path / "page.html")
        browser.show(tmp_path / "page.html", **look)
        return browser

    yield saved
    assert browser.errors == []


def text(tab: Tab, selector: str) -> str:
    return str(tab.value(f"document.querySelector({json.dumps(selector)}).innerText"))


def token(i: int) -> str:
    """The selector of a token's button."""
    return f".tokens button:nth-of-type({i + 1})"


def unreadable(tab: Tab, selector: str) -> list[Any]:
    """Text, ink and color of those among the elements whose contrast is below WCAG's 4.5 to 1."""
    found = tab.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(one => {{ const look = getComputedStyle(one);"
        " return [one.innerText, look.color, look.backgroundColor]; })"
    )
    assert found

    def hexadecimal(color: str) -> str:
        return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", color)[:3])

    return [one for one in found if contrast(hexadecimal(one[1]), hexadecimal(one[2])) < 4.5]


def test_a_token_tells_its_values_under_the_pointer_and_by_the_keys(show: Callable[..., Tab]) -> None:
    tab = show(token_view(TOKENS, {"loss": LOSS, "gap": GAP}))
    assert text(tab, "output").startswith("Point at a token")
    tab.point(*tab.middle(token(1)))
    assert text(tab, "output").split("\n") == ["1 ·capital", "loss: 0.5", "gap: 0"]
    tab.point(*tab.middle(token(2)))
    assert text(tab, "output").split("\n") == ["2 ·of", "loss: no value", "gap: 0.25"]
    tab.click(*tab.middle(token(0)))  # held
    tab.point(*tab.middle(token(4)))
    assert text(tab, "output").split("\n")[0] == "4 ·France"
    tab.point(1, 1)
    assert text(tab, "output").split("\n") == ["0 The", "loss: 3.25", "gap: -1.5"]
    tab.press("ArrowRight")
    assert text(tab, "output").split("\n")[0] == "1 ·capital"
    tab.press("End")
    assert text(tab, "output").split("\n")[0] == "4 ·France"
    tab.press("Escape")
    assert text(tab, "output").startswith("Point at a token")


def test_tokens_are_colored_by_the_value_chosen_and_can_be_read(show: Callable[..., Tab]) -> None:
    tab = show(token_view(["a"] * 41, {"one": torch.linspace(0, 1, 41), "two": torch.linspace(-2, 2, 41)}))

    def color(i: int) -> str:
        return str(tab.value(f"getComputedStyle(document.querySelector('{token(i)}')).backgroundColor"))

    seen = []
    for dark in (False, True):
        tab.look(dark=dark)
        for channel, ends in enumerate((("0", "1"), ("-2", "2"))):
            tab.value(
                f"(s => {{ s.value = {channel}; s.dispatchEvent(new Event('change')); }})(document.querySelector('select'))"
            )
            assert tuple(text(tab, ".scale").split()) == ends
            assert unreadable(tab, ".tokens button") == []
            assert len({color(i) for i in range(41)}) > 30
            seen.append(color(0))
    assert len(set(seen)) == 4


def test_attention_is_explored_head_by_head(show: Callable[..., Tab]) -> None:
    torch.manual_seed(0)
    patterns = torch.rand(3, 5, 5).tril()
    patterns /= patterns.sum(-1, keepdim=True)
    tab = show(attention_view(patterns, TOKENS, layer=4))
    assert text(tab, "h2") == "L4H0: what 4 ·France attends to"
    tab.click(*tab.middle(".heads button:nth-of-type(2)"))
    assert text(tab, "h2") == "L4H1: what 4 ·France attends to"
    assert tab.value("[...document.querySelectorAll('.heads button')].map(one => one.ariaPressed)") == [
        "false",
        "true",
        "false",
    ]
    tab.press("ArrowRight")
    assert text(tab, "h2") == "L4H2: what 4 ·France attends to"

    def told(shares: torch.Tensor) -> list[str]:
        shown = ["The", "·capital", "·of", "⏎", "·France"]
        return [
            f"{i} {shown[i]}: {float(shares[i]):.3f}" for i in shares.argsort(descending=True).tolist() if shares[i] > 0
        ]

    tab.point(*tab.middle(token(3)))
    assert text(tab, "h2") == "L4H2: what 3 ⏎ attends to"
    assert tab.value("[...document.querySelectorAll('ol li')].map(one => one.innerText)") == told(patterns[2, 3])
    tab.value("(s => { s.value = 'to'; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))")
    tab.point(*tab.middle(token(1)))
    assert text(tab, "h2") == "L4H2: what attends to 1 ·capital"
    assert tab.value("[...document.querySelectorAll('ol li')].map(one => one.innerText)") == told(patterns[2, :, 1])

    left, top, cell = tab.value(
        "(() => { const box = canvas.getBoundingClientRect(); return [box.x + edge, box.y + TOP, cell]; })()"
    )
    tab.point(left + 1.5 * cell, top + 3.5 * cell)
    assert f"3 ⏎ attends to 1 ·capital: {float(patterns[2, 3, 1]):.4f}" in text(tab, "output")
    tab.point(left + 3.5 * cell, top + 1.5 * cell)
    assert "3 ⏎ is later than 1 ·capital: masked" in text(tab, "output")
    for dark in (False, True):
        tab.look(dark=dark)
        tab.drawn()
        assert unreadable(tab, ".tokens button:not(.off)") == []


def at(tab: Tab, x: float, y: float) -> tuple[float, float]:
    """Where a place of a figure's axes lies on the page."""
    left, top = tab.value(
        f"(() => {{ const plot = document.querySelector('.plotly-graph-div'), {{xaxis, yaxis}} = plot._fullLayout;"
        " const box = plot.getBoundingClientRect();"
        f" return [box.x + xaxis._offset + xaxis.l2p({x}), box.y + yaxis._offset + yaxis.l2p({y})]; }})()"
    )
    return left, top


def hover(tab: Tab) -> list[str]:
    """The lines under the pointer, waited for: plotly shows them a moment later."""
    lines = (
        "document.querySelectorAll('.hoverlayer .hovertext .nums .line, .hoverlayer .hovertext .nums:not(:has(.line))')"
    )
    tab.until(f"{lines}.length")
    return list(tab.value(f"[...{lines}].map(one => one.textContent)"))


def test_a_circuit_is_pointed_at_and_filtered(show: Callable[..., Tab]) -> None:
    names = [f"L{i}H0" for i in range(12)]
    torch.manual_seed(0)
    scores = torch.rand(12, 12).triu(1)
    figure = circuit(scores, sources=names, destinations=names)
    tab = show(figure)
    nodes = figure.data[len(figure.data) - 3]
    node = next(i for i, told in enumerate(nodes.hovertext) if told.startswith("L3H0<br>"))
    x, y = at(tab, nodes.x[node], nodes.y[node])
    tab.point(x + 2, y + 2)  # in the very middle edges end, and are as near
    assert hover(tab) == nodes.hovertext[node].split("<br>")
    edge = figure.data[0]
    tab.point(*at(tab, edge.x[8], edge.y[8]))
    changed = "document.querySelector('.hoverlayer').textContent.includes('→ L9H0effect')"
    tab.until(changed)
    assert hover(tab) == edge.text.split("<br>") == ["L5H0 → L9H0", "effect: 0.9801"]

    seen = "document.querySelector('.plotly-graph-div').data.filter(one => one.mode === 'lines' && one.text && one.visible !== false)"
    assert tab.value(f"{seen}.length") == 66
    left, middle, width = tab.value(
        "(() => { const box = document.querySelector('.slider-rail-touch-rect').getBoundingClientRect();"
        " return [box.x, box.y + box.height / 2, box.width]; })()"
    )
    tab.click(left + width * 0.26, middle)  # the second of five steps
    assert tab.value(f"{seen}.length") == 10
    largest = sorted((float(value) for value in scores[scores > 0]), reverse=True)[:10]
    assert tab.value(f"{seen}.map(one => one.text.split(': ')[1])") == [f"{value:.4g}" for value in largest]


def test_one_head_alone_is_chosen_by_the_menu(show: Callable[..., Tab]) -> None:
    tab = show(attention(torch.rand(3, 5, 5).tril(), tokens=TOKENS, layer=2))
    maps = "[...document.querySelectorAll('.heatmaplayer image, .heatmaplayer .hm')].filter(one => one.getBoundingClientRect().width)"
    tab.click(*tab.middle(".updatemenu-header"))
    assert tab.value("[...document.querySelectorAll('.updatemenu-item-text')].map(one => one.textContent)")[-3:] == [
        "L2H0",
        "L2H1",
        "L2H2",
    ]
    tab.click(*tab.middle(".updatemenu-dropdown-button:last-of-type"))
    assert tab.value("document.querySelector('.plotly-graph-div').data.map(one => one.visible)") == [False, False, True]
    assert tab.value(f"{maps}.length") > 0


LOOK = "document.querySelector('.plotly-graph-div')._fullLayout"


@pytest.mark.parametrize("width", [390, 700, 1400, 2000])
def test_a_figure_of_many_maps_fills_its_page_and_its_cells_stay_square(show: Callable[..., Tab], width: int) -> None:
    tab = show(attention(torch.rand(4, 6, 5, 5).tril(), tokens=TOKENS, title="All layers"), width=width)
    cells = f"[{LOOK}.xaxis{{0}}._length / 5, {LOOK}.yaxis{{0}}._length / 5]"
    wide, high = tab.value(cells.format(""))
    assert wide == pytest.approx(high, rel=0.005)
    assert 25 <= wide <= 50  # once to twice what is drawn
    assert 0.9 * width < tab.value(f"{LOOK}.width") <= width - 32
    assert all_is_seen(tab)
    for choice in (2, 1):
        tab.click(*tab.middle(".updatemenu-header"))
        tab.click(*tab.middle(f".updatemenu-dropdown-button:nth-of-type({choice})"))
        wide, high = tab.value(cells.format(""))
        assert wide == pytest.approx(high, rel=0.005)
        assert all_is_seen(tab)


def all_is_seen(tab: Tab) -> bool:
    """Whether the plot's place is as large as the plot: nothing is cut off, or has to be scrolled inside it."""
    return bool(
        tab.value(
            "[...document.querySelectorAll('.plot')].every(one => one.scrollHeight <= one.clientHeight"
            " && one.scrollWidth <= one.clientWidth && one.clientHeight + 1 >="
            " one.querySelector('.main-svg').getBoundingClientRect().height)"
        )
    )


@pytest.mark.parametrize(
    ("width", "high", "across"), [(390, 1100, 1), (600, 1100, 2), (2000, 1500, 3), (2000, 1100, 6)]
)
def test_maps_are_as_large_as_lets_all_of_them_be_seen(
    show: Callable[..., Tab], width: int, high: int, across: int
) -> None:
    tab = show(attention(torch.rand(6, 5, 5).tril(), tokens=TOKENS), width=width, height=high)
    lefts = tab.value(f"[0, 2, 3, 4, 5, 6].map(i => {LOOK}[`xaxis${{i || ''}}`]._offset.toFixed())")
    assert len(set(lefts)) == across
    names = tab.value("[...document.querySelectorAll('.annotation-text')].map(one => one.getBoundingClientRect().x)")
    assert len({round(place) for place in names}) == across


def test_maps_over_a_picture_are_laid_out_as_wide_as_their_page(show: Callable[..., Tab]) -> None:
    grey = torch.full((60, 90, 3), 128, dtype=torch.uint8)
    figure = over_picture(grey, {f"map {i}": torch.rand(2, 3) for i in range(6)})
    for width, across in ((390, 1), (600, 2), (2000, 4)):
        tab = show(figure, width=width)
        assert (
            len(set(tab.value(f"[1, 2, 3, 4, 5, 6, 7].map(i => {LOOK}[`xaxis${{i > 1 ? i : ''}}`]._offset.toFixed())")))
            == across
        )
        assert all_is_seen(tab)


@pytest.mark.parametrize("columns", [5, 70])
def test_a_wide_page_is_filled_and_no_title_lies_on_labels(show: Callable[..., Tab], columns: int) -> None:
    words = [f" word{i}" for i in range(columns)]
    figure = heat_map(torch.rand(6, columns), rows=[str(i) for i in range(6)], columns=words)
    heights = []
    for width in (1000, 1400, 2000):
        tab = show(figure, width=width)
        assert tab.value(f"{LOOK}.width") == max(width - 32, figure.layout.width or 0)
        heights.append(tab.value(f"{LOOK}.height"))
        assert tab.value("document.querySelector('.plot').scrollHeight") == pytest.approx(heights[-1], abs=1)
        below = tab.value(
            "document.querySelector('.xtitle').getBoundingClientRect().top"
            " - Math.max(...[...document.querySelectorAll('.xtick text')].map(one => one.getBoundingClientRect().bottom))"
        )
        assert 4 < below < 16
    assert heights[0] < heights[1] < heights[2]


def test_the_titles_of_one_map_are_beside_its_labels(show: Callable[..., Tab]) -> None:
    figure = attention(torch.rand(1, 5, 5).tril(), tokens=TOKENS)
    boxes = "[...document.querySelectorAll('{}')].map(one => one.getBoundingClientRect().toJSON())"
    for width in (390, 1400):
        tab = show(figure, width=width)
        (key,), (query,) = tab.value(f"[{boxes.format('.xtitle')}, {boxes.format('.ytitle')}]")
        keys, queries = tab.value(f"[{boxes.format('.xtick text')}, {boxes.format('.ytick text')}]")
        assert 4 < key["top"] - max(one["bottom"] for one in keys) < 16
        assert 4 < min(one["left"] for one in queries) - query["right"] < 50


def test_what_plotly_draws_once_follows_the_look(show: Callable[..., Tab]) -> None:
    tab = show(attention(torch.rand(2, 5, 5).tril(), tokens=TOKENS))
    inks = "['.updatemenu-header-arrow', '.updatemenu-item-text'].map(one => getComputedStyle(document.querySelector(one)).fill)"
    for dark in (False, True):
        tab.look(dark=dark)
        tab.value("paint().then(() => 0)")
        arrow, words = tab.value(inks)
        assert arrow == words


def test_names_in_a_circuit_are_not_crossed_by_edges(show: Callable[..., Tab]) -> None:
    tab = show(
        circuit(torch.rand(3, 3).triu(1), sources=["L0H0", "L1H0", "L2H0"], destinations=["L0H0", "L1H0", "L2H0"])
    )
    for dark in (False, True):
        tab.look(dark=dark)
        tab.drawn()
        drawn, around, paper = tab.value(
            "(() => { const look = getComputedStyle(document.querySelector('.textpoint text'));"
            " return [look.paintOrder, look.stroke, getComputedStyle(document.body).backgroundColor]; })()"
        )
        assert (drawn, around) == ("stroke", paper)


def test_what_a_mask_hides_is_unlike_zero_in_the_small_maps(show: Callable[..., Tab]) -> None:
    tab = show(attention_view(torch.eye(5)[None], TOKENS))
    for dark in (False, True):
        tab.look(dark=dark)
        tab.drawn()
        hidden, paper = tab.value(
            "[document.querySelector('.heads canvas'), document.body].map(one => getComputedStyle(one).backgroundColor)"
        )
        assert hidden == paper


@pytest.mark.parametrize("diverging", [False, True])
def test_a_heat_map_tells_its_cells_whose_texts_can_be_read_light_and_dark(
    show: Callable[..., Tab], tmp_path: Path, diverging: bool
) -> None:
    values = torch.linspace(-1.0 if diverging else 0.0, 1.0, 48).view(6, 8)
    texts = [["xx"] * 8] * 6
    layers, heads = [str(i) for i in range(6)], [str(i) for i in range(8)]
    tab = show(heat_map(values, rows=layers, columns=heads, texts=texts, diverging=diverging, value_name="effect"))
    tab.point(*at(tab, 5, 3))
    assert hover(tab) == ["layer 3", "position 5", f"effect: {float(values[3, 5]):.4g}", "xx"]
    tab.point(1, 1)
    for dark in (False, True):
        tab.look(dark=dark)
        tab.value("paint().then(() => 0)")
        tab.drawn()
        assert low_contrast(tab, tmp_path, 48) == []


def low_contrast(tab: Tab, folder: Path, count: int) -> list[Any]:
    """Texts in cells that are too little unlike the pixels beside them."""
    found = tab.value(
        "[...document.querySelectorAll('.heatmap-label text')].map(one => { const box = one.getBoundingClientRect();"
        " const inner = one.querySelector('tspan') ?? one; return [box.x + scrollX, box.y + scrollY + box.height / 2,"
        " getComputedStyle(inner).fill]; })"
    )
    assert len(found) == count
    tab.picture(folder / "page.png")
    image = Image.open(io.BytesIO((folder / "page.png").read_bytes())).convert("RGB")
    wrong = []
    for x, y, ink in found:
        pixel = image.getpixel((round(x) - 5, round(y)))
        assert isinstance(pixel, tuple)
        inked = "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", ink)[:3])
        color = "#" + "".join(f"{part:02x}" for part in pixel)
        if contrast(inked, color) < 4.5:
            wrong.append((inked, color))
    return wrong


def test_a_part_of_no_layer_is_one_band_with_its_value(show: Callable[..., Tab]) -> None:
    names = ["embeddings", *(f"L{i}H{j}" for i in range(4) for j in range(8))]
    tab = show(parts(torch.linspace(-2, 1, 33), labels=names, value_name="logit"))
    assert tab.value("[...document.querySelectorAll('.heatmap-label text')].map(one => one.textContent)") == ["-2"]
    for column in (0, 7):
        tab.point(*at(tab, column, 0))
        assert hover(tab) == ["embeddings", "logit: -2"]


@pytest.mark.parametrize("width", [390, 1000])
def test_pages_are_as_wide_as_their_window(show: Callable[..., Tab], width: int) -> None:
    words = [f" word{i}" for i in range(70)]
    for figure in (
        heat_map(torch.rand(4, 70), rows=["0", "1", "2", "3"], columns=words, title=" ".join(words)),
        attention_view(torch.eye(70)[None], words, title=" ".join(words)),
        token_view(words, torch.rand(70), title="x" * 300),
    ):
        assert show(figure, width=width).too_wide() <= 0
