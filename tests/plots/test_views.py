"""Viewers: their pages hold the values given, and no token is markup or a script."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from nnatomy.errors import InputError
from nnatomy.plots import attention_view, save, token_view
from nnatomy.plots.view import View

BAD = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)>"
TOKENS = ["The", BAD, " end", "a\n"]


def data_of(view: View) -> Any:
    return json.loads(re.search(r"^const data = (.*);$", view.page, re.MULTILINE)[1])  # type: ignore[index]


class Tags(HTMLParser):
    """What a browser would take for tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.found


def views(bad: str = BAD) -> list[View]:
    tokens = ["The", bad, " end", "a\n"]
    return [
        attention_view(torch.eye(4).expand(2, 4, 4), tokens, title=bad),
        token_view(tokens, {bad: torch.ones(4), "b": torch.arange(4.0)}, title=bad),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_no_token_or_title_is_run(which: int) -> None:
    bad, good = tags(views()[which].page), tags(views("good")[which].page)
    assert [tag for tag, _ in bad] == [tag for tag, _ in good]
    assert sum(tag == "script" for tag, _ in bad) == 1
    assert "innerHTML" not in views()[which].page
    assert "insertAdjacentHTML" not in views()[which].page


@pytest.mark.parametrize("which", [0, 1])
def test_a_page_asks_for_nothing_outside_itself(which: int) -> None:
    view = views()[which]
    found = tags(view.page)
    assert not [
        tag for tag, attributes in found if tag in ("link", "img", "iframe") or {"src", "href"} & attributes.keys()
    ]
    (policy,) = [a["content"] for _, a in found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
    assert not re.search(r"fetch\(|XMLHttpRequest|https?://|import\(", view.page)


@pytest.mark.parametrize("which", [0, 1])
def test_in_a_notebook_it_is_a_frame_that_reaches_nothing(which: int) -> None:
    view = views()[which]
    ((tag, attributes),) = tags(view._repr_html_())
    assert tag == "iframe"
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == view.page
    assert len(repr(view)) < 120


def test_attention_has_its_values_and_names() -> None:
    patterns = torch.rand(2, 3, 3, 4).softmax(-1)
    data = data_of(attention_view(patterns, TOKENS, layer=[4, 9]))
    assert data["names"] == ["L4H0", "L4H1", "L4H2", "L9H0", "L9H1", "L9H2"]
    stored = (
        torch.frombuffer(bytearray(base64.b64decode(data["patterns"])), dtype=torch.uint16).to(torch.float64) / 65535
    )
    assert torch.allclose(stored.view(6, 3, 4), patterns.flatten(0, 1).double(), atol=1e-5)
    assert (data["queries"], data["keys"], data["causal"]) == (3, 4, False)
    assert data["most"] == pytest.approx(float(patterns.max()))
    assert data["tokens"] == ["The", BAD, "·end", "a⏎"]
    assert data_of(attention_view(patterns.tril(1), TOKENS))["causal"] is True


def test_tokens_have_the_values_of_each_channel() -> None:
    values = {"loss": torch.tensor([0.5, torch.nan, 2.0, 1.0]), "gap": torch.tensor([-1.0, 0.0, 3.0, torch.inf])}
    data = data_of(token_view(TOKENS, values))
    assert data["channels"] == ["loss", "gap"]
    assert data["values"] == [[0.5, None, 2.0, 1.0], [-1.0, 0.0, 3.0, None]]
    assert data["kinds"] == ["sequential", "diverging"]
    assert data["limits"] == [[0.0, 2.0], [-3.0, 3.0]]
    assert data["breaks"] == [False, False, False, True]
    assert data_of(token_view(TOKENS, torch.zeros(4), value_name="zero"))["channels"] == ["zero"]


@pytest.mark.parametrize("which", [0, 1])
def test_the_keyboard_reaches_all_of_it(which: int) -> None:
    page = views()[which].page
    assert 'make("button"' in page  # buttons and menus are reached by Tab without more
    for key in ("ArrowRight", "ArrowLeft", "Home", "End", "Escape"):
        assert key in page
    assert "focus-visible" in page
    assert "aria-label" in page


def test_a_view_is_saved_as_a_page_alone(tmp_path: Path) -> None:
    view = views()[0]
    save(view, tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == view.page
    with pytest.raises(InputError) as caught:
        save(view, tmp_path / "a.png")
    assert str(caught.value) == "a.png: a viewer is saved as .html."


def test_the_title_is_shown_as_it_is() -> None:
    assert f"<h1>{html.escape(BAD)}</h1>" in views()[1].page


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (
            lambda: attention_view(torch.full((1, 4, 4), -2.0), TOKENS),
            "Attention probabilities lie between 0 and 1; these go from -2 to -2. For scores, use `heat_map`.",
        ),
        (
            lambda: attention_view(torch.ones(1, 2, 2), TOKENS),
            "The patterns are over 2 queries and 2 keys, and not over 4 tokens.",
        ),
        (
            lambda: attention_view(torch.ones(1, 1, 1, 4, 4), TOKENS),
            "The patterns have the axes (1, 1, 1, 4, 4): give (head, query, key), or layers of them.",
        ),
        (
            lambda: token_view(TOKENS, {"loss": torch.ones(3)}),
            "'loss' has values of shape (3,) for 4 tokens: give one each.",
        ),
        (lambda: token_view(TOKENS, {}), "There are no values: give a tensor, or at least one by name."),
    ],
)
def test_what_does_not_fit_is_said(draw: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        draw()
    assert str(caught.value) == text
