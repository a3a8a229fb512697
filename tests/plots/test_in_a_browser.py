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

from nnatomy.plots import attention, attention_view, circuit, heat_map, parts, save, token_view

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


@pytest.mark.parametrize("width", [700, 1400, 2000])
def test_a_figure_of_many_maps_fills_its_page_and_its_cells_stay_square(show: Callable[..., Tab], width: int) -> None:
    tab = show(attention(torch.rand(4, 6, 5, 5).tril(), tokens=TOKENS, title="All layers"), width=width)
    look = "document.querySelector('.plotly-graph-div')._fullLayout"
    cells = f"[{look}.xaxis{{0}}._length / 5, {look}.yaxis{{0}}._length / 5]"
    wide, high = tab.value(cells.format(""))
    assert wide == pytest.approx(high, rel=0.02)  # (the color bar takes nine pixels of the height)
    if width > 1000:
        assert tab.value(f"{look}.width") > 0.9 * width
    else:
        assert tab.value(f"{look}.width") == 940  # not smaller: the page scrolls sideways
    tab.click(*tab.middle(".updatemenu-header"))
    tab.click(*tab.middle(".updatemenu-dropdown-button:nth-of-type(2)"))
    wide, high = tab.value(cells.format(""))
    assert wide == pytest.approx(high, rel=0.02)


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
