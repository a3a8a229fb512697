"""What the documentation site is made of: the pages as they lie in the repository, and what is made of its code.

The site has the repository's folders, so that links between pages are the same here as on GitHub. Notebooks and scripts that pages
link to become pages. Of each room that users import from there is a page of its docstrings. The build fails if anything in the site
would be fetched from another host: it is read where there is no network, too.
"""

from __future__ import annotations

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
#: Pages that do not lie in docs/.
OTHERS = ("README.md", "CHANGELOG.md", "studies/README.md", "benchmarks/README.md", "nnatomy/core/README.md")
#: Pages that are the only one of their menu, beside which it would be empty.
ALONE = ("README.md", "docs/plots.md")
#: The rooms of the reference, by the name in the menu; each has what its `__all__`, or its imports, say.
ROOMS = {
    "nnatomy": ("nnatomy", "nnatomy.tracing", "nnatomy.standardized"),
    "methods": ("nnatomy.methods",),
    "metrics and results": ("nnatomy.methods.metrics",),
    "plots": ("nnatomy.plots",),
    "weights": ("nnatomy.weights",),
    "plans": ("nnatomy.plans",),
    "validation": ("nnatomy.validation",),
    "arch_configs": ("nnatomy.arch_configs.config",),
    "remote": ("nnatomy.remote.model", "nnatomy.remote.methods"),
    "serve": ("nnatomy.serve.app", "nnatomy.serve.limits", "nnatomy.serve.keys"),
    "images": ("nnatomy.standardized.image_tokens",),
    "diffusion": ("nnatomy.diffusion",),
    "parallel": ("nnatomy.parallel",),
    "compat": ("nnatomy.compat.nnsight", "nnatomy.compat.nnterp", "nnatomy.compat.transformer_lens"),
    "errors": ("nnatomy.errors",),
}


class Examples(griffe.Extension):
    """A docstring's `Example:` is code, as `Examples:` is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)


_ELSEWHERE = re.compile(r"(https?:)?//")
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Fill the menu of the reference."""
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [{room: f"api/{room.replace(' ', '_')}.md"} for room in ROOMS]
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages under their paths in the repository, and those that are made."""
    made = [one for one in files if one.src_dir != config.docs_dir]  # the theme's own
    for path in [*sorted((ROOT / "docs").rglob("*")), *(ROOT / name for name in OTHERS)]:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb":
            made.append(_page(config, name.removesuffix(".ipynb") + ".md", notebook(json.loads(path.read_text()))))
        elif path.suffix in (".md", ".png", ".svg", ".css", ".js"):
            made.append(File.generated(config, name, abs_src_path=str(path)))
    linked = {script for one in made if one.src_uri.endswith(".md") for script in _scripts(one)}
    for name in sorted(linked):
        text = f"# {name}\n\n```python\n{(ROOT / name).read_text()}```\n"
        made.append(_page(config, f"{name}.md", text, InclusionLevel.NOT_IN_NAV))
    made += [_page(config, f"api/{room.replace(' ', '_')}.md", reference(room)) for room in ROOMS]
    return Files(made)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to notebooks and scripts lead to the pages made of them, links to folders to the list of all pages."""

    def there(match: re.Match[str]) -> str:
        path, heading = match[1], match[2] or ""
        target = (ROOT / page.file.src_uri).parent / path
        if path.endswith((".ipynb", ".py")):
            path = re.sub(r"\.ipynb$", "", path) + ".md"
        elif target.is_dir():
            path = f"{path.split('docs/')[0]}docs/README.md"
        return f"]({path}{heading})"

    if page.file.src_uri in ALONE:
        page.meta["hide"] = ["navigation"]
    return _LINK.sub(there, markdown)


def on_post_build(config: Any) -> None:
    """Fail if a page or a style asks another host for something, or the site for what it has not."""
    site = Path(config.site_dir)
    wrong: list[str] = []
    for path in sorted(site.rglob("*.html")):
        for one in fetched(path.read_text()):
            there = one.partition("?")[0].partition("#")[0]
            if (
                _ELSEWHERE.match(one)
                or not ((site if there.startswith("/") else path.parent) / there.lstrip("/")).exists()
            ):
                wrong.append(f"{path.relative_to(site)}: {one}")
    for path in sorted(site.rglob("*.css")):
        text = path.read_text()
        addresses = re.findall(r"url\(\s*[\"']?([^\"')]+)", text) + re.findall(r"@import\s*[\"']([^\"']+)", text)
        wrong += [f"{path.relative_to(site)}: {one}" for one in addresses if _ELSEWHERE.match(one)]
    if wrong:
        raise PluginError("These would be fetched from other hosts, or are not there:\n" + "\n".join(wrong))


def fetched(page: str) -> list[str]:
    """The addresses of what a browser would fetch to show the page.

    Example:
        >>> fetched('<img src="a.png"><a href="https://b.org"></a><script src="https://c.org/d.js"></script>')
        ['a.png', 'https://c.org/d.js']
    """
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = {name: value or "" for name, value in attrs}
            found.extend(given.get(name, "") for name in ("src", "poster", "data"))
            found.extend(one.split()[0] for one in given.get("srcset", "").split(",") if one.strip())
            if tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "edit"):
                found.append(given.get("href", ""))
            found.extend(re.findall(r"url\([\"']?([^\"')]+)", given.get("style", "")))

    Reader().feed(page)
    return [one for one in found if one and not one.startswith("data:")]


def notebook(data: dict[str, Any]) -> str:
    """A notebook as a page: its texts, its code and what that printed or showed."""
    parts: list[str] = []
    for cell in data["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [text for output in cell.get("outputs", []) if (text := _shown(output))]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img class="output" alt="what the cell shows" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(output.get("text", "") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def reference(room: str) -> str:
    """The page of a room: each module's own text, and what it exports."""
    modules = ROOMS[room] or tuple(f"nnatomy.{room}.{name}" for name in _modules(ROOT / "nnatomy" / room))
    parts = [f"# {room}"]
    for module in modules:
        parts.append(_first_line(module))
        parts += [text for where in exported(module) if (text := f"::: {where}") not in parts]
    return "\n\n".join(parts) + "\n"


def exported(module: str) -> list[str]:
    """What a module gives its users, each by the path of where it is written."""
    tree = ast.parse(_file(module).read_text())
    wanted: list[str] | None = None
    places: dict[str, str] = {}
    for node in [*tree.body, *(inner for one in tree.body if isinstance(one, ast.If) for inner in one.body)]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnatomy"):
            places |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            places[node.name] = f"{module}.{node.name}"
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            wanted = ast.literal_eval(node.value)
    own = {name: place for name, place in places.items() if place == f"{module}.{name}"}
    if wanted is None:
        wanted = list(places if _file(module).name == "__init__.py" else own)
    found = [_written(places[name]) for name in wanted if name in places]
    return [one for one in found if one is not None]


def _written(place: str) -> str | None:
    """Where a class or function is written that a package hands on; None of what is neither."""
    module, _, name = place.rpartition(".")
    tree = ast.parse(_file(module).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return place
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            there = f"{node.module}.{next(one.name for one in node.names if (one.asname or one.name) == name)}"
            return None if there == place else _written(there)  # a module of the package's own
    return None


def _first_line(module: str) -> str:
    text = ast.get_docstring(ast.parse(_file(module).read_text())) or ""
    return text.partition("\n\n")[0]


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _modules(folder: Path) -> list[str]:
    return [path.stem for path in sorted(folder.iterdir()) if not path.name.startswith("_")]


def _scripts(file: File) -> set[str]:
    found = (((ROOT / file.src_uri).parent / match[1]).resolve() for match in _LINK.finditer(file.content_string))
    return {path.relative_to(ROOT.resolve()).as_posix() for path in found if path.suffix == ".py" and path.exists()}


def _page(config: Any, name: str, text: str, inclusion: InclusionLevel = InclusionLevel.INCLUDED) -> File:
    return File.generated(config, name, content=text, inclusion=inclusion)
