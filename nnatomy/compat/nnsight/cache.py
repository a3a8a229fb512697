"""What `tracer.cache()` gives: values by path, `cache["model.transformer.h.0"].output`, or `cache.model.transformer.h[0].output`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nnatomy import core
from nnatomy.core.points import Slot
from nnatomy.errors import CacheError


class Collected(core.Cache):
    """A cache of copies, which hold no graph where `detach` is set."""

    detach = True

    def take(self, slot: Slot) -> None:
        if not self.detach:
            super().take(slot)
            return
        with torch.no_grad():
            super().take(slot)


class Entry:
    """One call of a module.

    Attributes:
        output: what it returned; None if that is not kept.
        inputs: (args, kwargs), or None.
    """

    def __init__(self, output: Any, inputs: Any) -> None:
        self.output, self.inputs = output, inputs

    @property
    def input(self) -> Any:
        """The first argument, or None."""
        if self.inputs is None:
            return None
        args, kwargs = self.inputs
        return args[0] if args else next(iter(kwargs.values()), None)


class Entries(list[Entry]):
    """The calls of a module that has been called several times, or in several steps; `.output` is a list of theirs."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("output", "inputs", "input"):
            raise AttributeError(name)
        return [getattr(entry, name) for entry in self]


class Cache(Mapping[str, Any]):
    """Values by path; a list of entries where a module has been called several times. Aliases (`rename=`) are names too."""

    def __init__(self, collected: core.Cache, root: Any) -> None:
        self._collected, self._root = collected, root

    def __getitem__(self, path: str) -> Any:
        known = self._known(path)
        if known is None:
            raise CacheKeyError(
                f"{path!r} is not in the cache. It holds: {', '.join(list(self)[:20]) or 'nothing yet'}."
            )
        calls = Entries(Entry(call.output, call.inputs) for call in self._collected[known])
        return calls[0] if len(calls) == 1 else calls

    def _known(self, path: Any) -> str | None:
        if path in {*self._collected}:
            return str(path)
        try:
            view = self._root.at(path.partition(".")[2])
        except (AttributeError, TypeError):
            return None
        found: str | None = self._collected.paths.get(view.module)
        return found if found in {*self._collected} else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._collected)

    def __len__(self) -> int:
        return len(self._collected)

    def __contains__(self, path: object) -> bool:
        return self._known(path) is not None

    @property
    def model(self) -> Node:
        """The values as a tree: `cache.model.transformer.h[0].output`."""
        return Node(self, "model")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)


class CacheKeyError(CacheError, KeyError):
    """A path that is not in the cache."""

    __str__ = CacheError.__str__


class Node:
    """A place in the tree of a cache."""

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache, self._path = cache, path

    def __getattr__(self, name: str) -> Any:
        if name in ("output", "inputs", "input"):
            return getattr(self._cache[self._path], name)
        below = f"{self._path}.{name}"
        if name.startswith("__") or not self._has(below):
            raise AttributeError(f"{below} is not in the cache, nor anything below it.")
        return Node(self._cache, below)

    def __getitem__(self, which: int | str) -> Any:
        if isinstance(which, int) and isinstance(entries := self._cache.get(self._path), Entries):
            return entries[which]
        below = f"{self._path}.{which}"
        if self._has(below):
            return Node(self._cache, below)
        here = f"{self._real(self._path)}."
        if isinstance(which, int) and any(
            known[len(here) :][:1].isdigit() for known in self._cache if known.startswith(here)
        ):
            raise IndexError(f"{below} is not in the cache.")
        raise CacheKeyError(f"{below} is not in the cache, nor anything below it.")

    def _has(self, path: str) -> bool:
        real = self._real(path)
        return real is not None and any(known == real or known.startswith(f"{real}.") for known in self._cache)

    def _real(self, path: str) -> str | None:
        try:
            view: Any = self._cache._root.at(path.partition(".")[2])
        except AttributeError:
            return None
        real: str = view.path
        return real
