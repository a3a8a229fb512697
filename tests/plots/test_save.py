"""Files: a page that needs nothing else, and pictures."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from contrast import contrast

from nnatomy.errors import InputError, MissingPackageError
from nnatomy.plots import attention, bars, curves, heat_map, save
from nnatomy.plots.look import SCALES, spaced, theme

BAD = "</script><script>alert(1)</script>"


class Tags(HTMLParser):
    """What a browser would take for tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def saved(figure: Any, tmp_path: Path) -> str:
    save(figure, tmp_path / "a.html")
    return (tmp_path / "a.html").read_text(encoding="utf-8")


def a_map(**more: Any) -> Any:
    return heat_map(torch.tensor([[0.5, -0.5]]), rows=["0"], columns=["a", "b"], **more)


@pytest.mark.parametrize(
    "figure",
    [
        a_map(),
        bars(torch.ones(2), labels=["a", "b"]),
        curves([0], {"a": [1]}),
        attention(torch.ones(2, 1, 1), tokens=["a"]),
    ],
)
def test_a_page_asks_for_nothing_outside_itself(figure: Any, tmp_path: Path) -> None:
    page = saved(figure, tmp_path)
    tags = Tags()
    tags.feed(page)
    assert not [tag for tag, attributes in tags.found if tag in ("link", "img", "iframe") or "src" in attributes]
    policy = next(a["content"] for tag, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "plotly.js v" in page
    assert '"showSendToCloud": false' in page


def test_tokens_are_not_run(tmp_path: Path) -> None:
    figure = heat_map(
        torch.ones(1, 1), rows=[BAD], columns=[BAD], title=BAD, texts=[[BAD]], hover=[[BAD]], value_name=BAD
    )
    page = saved(figure, tmp_path)
    assert "<script>alert" not in page
    assert page.count("</script>") == saved(a_map(), tmp_path).count("</script>")


def test_a_lone_surrogate_can_be_saved(tmp_path: Path) -> None:
    figure = heat_map(torch.ones(1, 1), rows=["0"], columns=["\udce2"], title="\udce2")
    assert "U+DCE2" in saved(figure, tmp_path)


@pytest.mark.parametrize("kind", ["sequential", "diverging"])
def test_a_page_has_a_light_and_a_dark_look(kind: str, tmp_path: Path) -> None:
    page = saved(a_map(diverging=kind == "diverging"), tmp_path)
    tags = Tags()
    tags.feed(page)
    (data,) = (attributes["data-plot"] for _, attributes in tags.found if "data-plot" in attributes)
    looks = json.loads(data or "")["looks"]
    for dark, look in enumerate(looks):
        assert look["template"] == theme(bool(dark))
        assert look["coloraxis.colorscale"] == [list(step) for step in spaced(SCALES[kind][dark])]
    assert looks[0] != looks[1]
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_its_background(dark: bool) -> None:
    look = theme(dark)["layout"]
    for color in [look["font"]["color"], *look["colorway"]]:
        assert contrast(color, look["paper_bgcolor"]) > (4.5 if color == look["font"]["color"] else 3)


@pytest.fixture
def kaleido(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Kaleido's interface without a browser behind it."""
    module, errors = ModuleType("kaleido"), ModuleType("kaleido.errors")
    module.asked = []  # type: ignore[attr-defined]

    def calc_fig_sync(figure: Any, *, opts: Any, kopts: Any) -> bytes:
        module.asked.append((figure, opts, kopts))  # type: ignore[attr-defined]
        return b"picture"

    module.calc_fig_sync = calc_fig_sync  # type: ignore[attr-defined]
    errors.ChromeNotFoundError = type("ChromeNotFoundError", (RuntimeError,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaleido", module)
    monkeypatch.setitem(sys.modules, "kaleido.errors", errors)
    return module


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn_without_a_network(ending: str, kaleido: Any, tmp_path: Path) -> None:
    save(a_map(), tmp_path / f"a.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == b"picture"
    ((figure, options, more),) = kaleido.asked
    assert figure["layout"]["coloraxis"]["cmin"] == -0.5
    assert options == {"format": ending, "width": 900, "height": a_map().layout.height, "scale": 2}
    assert more == {"mathjax": False}


def test_without_a_browser_the_error_says_so(kaleido: Any, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise sys.modules["kaleido.errors"].ChromeNotFoundError("long advice")

    kaleido.calc_fig_sync = fail
    with pytest.raises(MissingPackageError) as caught:
        save(a_map(), tmp_path / "a.png")
    assert str(caught.value) == (
        "a.png: kaleido draws with Chrome or Chromium, and finds none. Install one, or set BROWSER_PATH to it; "
        "or save the figure as .html."
    )
    assert not list(tmp_path.iterdir())


def test_without_kaleido_the_error_says_what_to_install(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(MissingPackageError) as caught:
        save(a_map(), tmp_path / "a.svg")
    assert str(caught.value) == (
        "a.svg: pictures are drawn by kaleido: pip install kaleido. Or save the figure as .html."
    )


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        save(a_map(), tmp_path / "a.gif")
    assert str(caught.value) == "a.gif: a figure is saved as .html, .png, .svg or .pdf."
