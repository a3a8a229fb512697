"""Paths that users give: whether they are any, and what of this library is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nnatomy.errors import InputError, UsageError, a_kind

#: What files of this library have in their header, what they are, and what reads them.
_FILES = {
    "nnatomy.Result": ("a result of a method", "nnatomy.methods.result.Result.load(path)"),
    "nnatomy.SteeringVector": ("a steering vector", "SteeringVector.load(path)"),
    "nnatomy": ("a cache", "ActivationCache.load(path)"),
    "format": ("a tuned lens", "TunedLens.load(path)"),
}
_FOLDERS = {
    "plan.json": ("a plan", "load_plan(path)"),
    "index.json": ("activations", "ActivationStore(path)"),
    "config.json": ("a model", "StandardizedTransformer(path)"),
}


def path_of(value: Any, what: str, error: type[UsageError] = InputError) -> Path:
    """A path that was given.

    Args:
        what: of what it is to be the path: "a file that TunedLens.save wrote".
        error: what is raised for what is no path.
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        text = repr(value)
        short = text if len(text) < 60 else a_kind(value)
        raise error(f"path={short}: give the path of {what}, as a text or a pathlib.Path.")
    return Path(value)


def file_of(value: Any, what: str) -> Path:
    """The path of a file that is to be read. Raises InputError for no path, or a folder."""
    path = path_of(value, what)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the path of {what}.{what_is_at(path)}")
    return path


def what_is_at(path: Path) -> str:
    """What of this library is there, and how it is read, as a sentence behind another one; "" if nothing is."""
    for name, (what, how) in _FOLDERS.items():
        if path.is_dir() and (path / name).is_file():
            return f" It holds {what}: {how}."
        if path.is_file() and path.name == name and name == "plan.json":
            return f" It is a part of {what}: load_plan takes the path of its folder."
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError, TypeError):
        return ""
    for name, (what, how) in _FILES.items():
        if name == "format" and "tuned lens" not in header.get(name, ""):
            continue
        if name in header:
            return f" It is {what}{_class(header[name])}: {how}."
    return ""


def _class(header: str) -> str:
    try:
        found = json.loads(header)["class"]
    except (ValueError, KeyError, TypeError):
        return ""
    return f", {found}"
