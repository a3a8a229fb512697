"""nnatomy: one interface to the inside of every Hugging Face transformer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnatomy.arch_configs import ArchConfig as ArchConfig
    from nnatomy.standardized import StandardizedTransformer as StandardizedTransformer
    from nnatomy.tracing import Traceable as Traceable

#: The room of each name. It is imported when the name is used: `nnatomy --help` needs no PyTorch.
_ROOMS = {
    "ArchConfig": "nnatomy.arch_configs",
    "StandardizedTransformer": "nnatomy.standardized",
    "Traceable": "nnatomy.tracing",
}

__version__ = "0.1.0"
__all__ = ["ArchConfig", "StandardizedTransformer", "Traceable", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    if name in ("methods", "plots", "errors"):
        return import_module(f"nnatomy.{name}")
    raise AttributeError(f"module 'nnatomy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "methods", "plots", "errors"})
