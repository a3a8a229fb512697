"""Caches: the values of many modules of one run, collected without stopping the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core.points import Collector, Slot, versions
from nnatomy.core.values import Inputs
from nnatomy.core.views import ModuleView
from nnatomy.errors import CacheError


class CachedCall(NamedTuple):
    """What a cache holds of one call of a module.

    Attributes:
        step: the generation step (0 in a plain forward pass).
        call: which call of the module in that step.
        output: what the call returned, or None if outputs are not collected or it did not return.
        inputs: (args, kwargs), or None if inputs are not collected.
    """

    step: int
    call: int
    output: Any = None
    inputs: Inputs | None = None


class Cache(Collector):
    """The values of many modules, by path: `cache["layers.3"].output`.

    Tensors are the model's own (nothing is copied) unless `device` or `dtype` says otherwise or
    `clone` is set. If the model changes one of them in place after it was collected, asking for it is
    an error rather than a wrong value; `clone=True` keeps it as it was. (In inference mode tensors do not
    tell that they were changed: there every one is copied.)
    """

    def __init__(
        self,
        paths: dict[Module, str],
        kinds: Iterable[str] = ("output",),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        clone: bool = False,
        view: Callable[[Slot], Slot] = lambda slot: slot,
        aliases: Callable[[], Mapping[str, Module]] = dict,
    ) -> None:
        self.modules = set(paths)
        self.kinds = dict.fromkeys(kinds)
        self._paths = paths
        self._device = device
        self._dtype = dtype
        self._clone = clone
        self._view = view
        #: Further paths of modules: a shared one has several.
        self._aliases = aliases
        #: By module: (step, call, kind, value, the versions of its tensors unless it is a clone).
        self._taken: dict[Module, list[tuple[int, int, str, Any, Any]]] = {}

    def take(self, slot: Slot) -> None:
        value, keep = self._view(slot).value, self._keep
        kept = keep(value) if isinstance(value, Tensor) else pytree.tree_map_only(Tensor, keep, value)
        then = None if self._clone else versions(kept)
        self._taken.setdefault(slot.module, []).append((slot.step, slot.call, slot.kind, kept, then))

    def _keep(self, tensor: Tensor) -> Tensor:
        kept = tensor
        if self._device is not None or self._dtype is not None:
            dtype = self._dtype if tensor.is_floating_point() else None
            kept = tensor.to(device=self._device, dtype=dtype)
        if kept is tensor and (self._clone or tensor.is_inference()):  # which has no version to compare
            kept = tensor.clone()
        return kept

    def __getitem__(self, module: str | ModuleView) -> CachedCalls:
        if isinstance(module, str):
            path, found = module, self._find(module)
        else:
            path, found = module.path, module.module
        taken = self._taken.get(found) if found is not None else None
        if taken is None:
            if found in self._paths:
                raise CacheError(f"{path!r} was not called while the cache was open.")
            held = ", ".join(list(self)[:20]) or "nothing yet"
            raise CacheError(f"{path!r} is not in the cache. It holds: {held}.")
        calls: dict[tuple[int, int], CachedCall] = {}
        for step, call, kind, value, then in taken:
            if then is not None and versions(value) != then:
                raise CacheError(
                    f"A value of {path!r} was changed in place after it had been collected (by the model, or "
                    "by you), so it is no longer what the module gave. Collect with tracer.cache(clone=True)."
                )
            if kind == "input":
                calls[step, call] = CachedCall(step, call, None, value)
            else:
                known = calls.get((step, call))
                calls[step, call] = CachedCall(step, call, value, known and known.inputs)
        return CachedCalls(path, calls.values())

    def _find(self, path: object) -> Module | None:
        return self._by_path.get(path) or self._aliases().get(path)  # type: ignore[call-overload]

    @cached_property
    def _by_path(self) -> dict[Any, Module]:
        return {path: module for module, path in self._paths.items()}

    def __iter__(self) -> Iterator[str]:
        return (self._paths[module] for module in self._taken)

    def __len__(self) -> int:
        return len(self._taken)

    def __contains__(self, module: object) -> bool:
        return (module.module if isinstance(module, ModuleView) else self._find(module)) in self._taken

    def keys(self) -> Iterable[str]:
        """The paths of the modules that have been called, in the order of their first call's first value."""
        return list(self)

    def __repr__(self) -> str:
        names = ", ".join(list(self)[:8])
        return f"<Cache of {len(self)} modules: {names}{', ...' if len(self) > 8 else ''}>"


class CachedCalls(list[CachedCall]):
    """The calls of one module in a cache, in order; with one call, `.output` and `.inputs` are its values."""

    def __init__(self, path: str, calls: Iterable[CachedCall]) -> None:
        super().__init__(calls)
        self._path = path

    @property
    def output(self) -> Any:
        """The output of the only call. Raises CacheError if there were several."""
        return self._only().output

    @property
    def inputs(self) -> Inputs | None:
        """The (args, kwargs) of the only call. Raises CacheError if there were several."""
        return self._only().inputs

    def _only(self) -> CachedCall:
        if len(self) != 1:
            raise CacheError(
                f"{self._path!r} was called {len(self)} times: say which with "
                f"cache[{self._path!r}][k].output (each has .step and .call)."
            )
        return self[0]
