"""The documentation site: what its pages are made of, and that nothing in them comes from another host. `make docs` builds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mkdocs.exceptions import PluginError

import nnatomy
from nnatomy import methods, plots

ROOT = Path(__file__).parents[1]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = load()


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ('<script src="https://c.org/d.js"></script>', "https://c.org/d.js"),
        ('<link rel="stylesheet" href="//c.org/d.css">', "//c.org/d.css"),
        ('<link rel="preconnect" href="https://fonts.org">', "https://fonts.org"),
        ('<img srcset="a.png 1x, https://c.org/b.png 2x">', "https://c.org/b.png"),
        ('<p style="background: url(https://c.org/b.png)">', "https://c.org/b.png"),
        ('<img src="not_there.png">', "not_there.png"),
    ],
)
def test_the_build_fails_where_a_page_asks_another_host_or_for_what_is_not_there(
    tmp_path: Path, page: str, expected: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "good.html").write_text(
        '<img src="a.png"><a href="https://b.org">b</a><img src="data:image/png;base64,">'
    )
    config = SimpleNamespace(site_dir=str(tmp_path))
    site.on_post_build(config)
    (tmp_path / "bad.html").write_text(page)
    with pytest.raises(PluginError, match=f"bad.html: {expected}$"):
        site.on_post_build(config)


@pytest.mark.parametrize("style", ["@import url('https://fonts.org/a')", '@import "https://fonts.org/a"'])
def test_the_build_fails_where_a_style_asks_another_host(tmp_path: Path, style: str) -> None:
    (tmp_path / "a.css").write_text(f"{style}; p {{ background: url(a.png) }}")
    with pytest.raises(PluginError, match=r"a.css: https://fonts.org/a$"):
        site.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))


@pytest.mark.parametrize("package", [nnatomy, methods, plots], ids=lambda package: package.__name__)
def test_the_reference_has_all_that_is_public(package: Any) -> None:
    listed = {where.rpartition(".")[2] for where in site.exported(package.__name__)}
    assert listed == {name for name in package.__all__ if callable(getattr(package, name))}


def test_every_room_of_the_reference_has_something() -> None:
    for room in site.ROOMS:
        assert "\n::: nnatomy." in site.reference(room), room


def test_a_notebook_is_shown_with_what_it_printed() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "QUJD", "text/plain": ["<Figure>"]}},
                {"output_type": "display_data", "data": {"text/html": ["<b>"]}},
            ],
        },
    ]
    shown = site.notebook({"cells": cells})
    assert shown.startswith("# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n<img ")
    assert shown.endswith('src="data:image/png;base64,QUJD">\n')


def test_links_lead_to_the_pages_made_of_notebooks_and_scripts() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="README.md"), meta={})
    found = site.on_page_markdown("[a](docs/tutorials/lenses.ipynb) [b](studies/lenses.py#x) [c](docs/tutorials)", page)
    assert found == "[a](docs/tutorials/lenses.md) [b](studies/lenses.py.md#x) [c](docs/README.md)"
