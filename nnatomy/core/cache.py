"""Caches: the values of many modules of one run, collected without stopping the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core.points import Collector, Slot
from nnatomy.core.views import Inputs, ModuleView
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
    ) -> None:
        self.modules = set(paths)
        self.kinds = dict.fromkeys(kinds)
        self._paths = paths
        self._device = device
        self._dtype = dtype
        self._clone = clone
        self._taken: list[tuple[Module, str, int, int, Any]] = []  # since it was last asked for anything
        self._sorted: dict[str, dict[tuple[int, int], CachedCall]] = {}
        self._versions: dict[str, list[tuple[Tensor, int]]] = {}

    def take(self, slot: Slot) -> None:
        module, value = slot.module, slot.value
        if isinstance(value, Tensor):
            value = self._keep(module, value)
        else:
            value = pytree.tree_map_only(Tensor, lambda tensor: self._keep(module, tensor), value)
        self._taken.append((module, slot.kind, slot.step, slot.call, value))

    def _keep(self, module: Module, tensor: Tensor) -> Tensor:
        kept = tensor
        if self._device is not None or (self._dtype is not None and tensor.is_floating_point()):
            dtype = self._dtype if tensor.is_floating_point() else None
            kept = tensor.to(device=self._device, dtype=dtype, non_blocking=False)
        if kept is tensor and (self._clone or tensor.is_inference()):  # which has no version to compare
            kept = tensor.clone()
        if kept is tensor:
            self._versions.setdefault(self._paths[module], []).append((tensor, tensor._version))
        return kept

    @property
    def _calls(self) -> dict[str, dict[tuple[int, int], CachedCall]]:
        taken, self._taken = self._taken, []
        for module, kind, step, call, value in taken:
            calls = self._sorted.setdefault(self._paths[module], {})
            if kind == "input":
                calls[step, call] = CachedCall(step, call, None, value)
            else:
                known = calls.get((step, call))
                calls[step, call] = CachedCall(step, call, value, known and known.inputs)
        return self._sorted

    def __getitem__(self, module: str | ModuleView) -> CachedCalls:
        path = module if isinstance(module, str) else self._paths.get(module.module, module.path)
        calls = self._calls.get(path)
        if calls is None:
            if path in self._paths.values():
                raise CacheError(f"{path!r} was not called while the cache was open.")
            held = ", ".join(list(self._calls)[:20]) or "nothing yet"
            raise CacheError(f"{path!r} is not in the cache. It holds: {held}.")
        for tensor, version in self._versions.get(path, ()):
            if tensor._version != version:
                raise CacheError(
                    f"A value of {path!r} was changed in place after it had been collected (by the model, or "
                    "by you), so it is no longer what the module gave. Collect with tracer.cache(clone=True)."
                )
        return CachedCalls(path, list(calls.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, module: object) -> bool:
        path = self._paths.get(module.module) if isinstance(module, ModuleView) else module
        return path in self._calls

    def keys(self) -> Iterable[str]:
        """The paths of the modules that have been called, in the order of their first call's first value."""
        return self._calls.keys()

    def __repr__(self) -> str:
        names = ", ".join(list(self._calls)[:8])
        return f"<Cache of {len(self)} modules: {names}{', ...' if len(self) > 8 else ''}>"


class CachedCalls(list[CachedCall]):
    """The calls of one module in a cache, in order; with one call, `.output` and `.inputs` are its values."""

    def __init__(self, path: str, calls: list[CachedCall]) -> None:
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
