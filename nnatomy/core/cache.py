"""Caches: the values of many modules of one run, collected without stopping the forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from nnatomy.core.points import Collector, Slot, Tap, versions
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


@dataclass(eq=False, repr=False)
class Cache(Collector, Mapping[str, "CachedCalls"]):
    """The values of many modules, by path: `cache["layers.3"].output`.

    Tensors are the model's own (nothing is copied) unless `device` or `dtype` says otherwise or
    `clone` is set. If the model changes one of them in place after it was collected, asking for it is
    an error rather than a wrong value; `clone=True` keeps it as it was. (In inference mode tensors do not
    tell that they were changed: there every one is copied.)

    Args:
        root: the module that they are of: one that is shared has further paths there.
        paths: the modules, with the path of each.
        kinds: "input" or "output" or both.
        view: a slot as the block sees it.
    """

    root: Module
    paths: dict[Module, str]
    kinds: dict[str, Tap | None]
    view: Callable[[Slot], Slot]
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    clone: bool = False

    def __post_init__(self) -> None:
        self.modules = set(self.paths)
        #: By module, and then by step and call.
        self._calls: dict[Module, dict[tuple[int, int], CachedCall]] = {}
        #: The values that are no clones, by module, with the versions of their tensors.
        self._shared: dict[Module, list[tuple[Any, Any]]] = {}

    def take(self, slot: Slot) -> None:
        value: Any = self.view(slot).value  # mostly a tensor, for which pytree takes ten times as long
        kept = self._keep(value) if isinstance(value, Tensor) else pytree.tree_map_only(Tensor, self._keep, value)
        if not self.clone:
            self._shared.setdefault(slot.module, []).append((kept, versions(kept)))
        calls, key = self._calls.setdefault(slot.module, {}), (slot.step, slot.call)
        field = "output" if slot.kind == "output" else "inputs"
        calls[key] = calls.get(key, CachedCall(*key))._replace(**{field: kept})

    def _keep(self, tensor: Tensor) -> Any:
        dtype = self.dtype if tensor.is_floating_point() else None
        kept = tensor.to(device=self.device, dtype=dtype)
        if kept is tensor and (self.clone or tensor.is_inference()):  # which has no version to compare
            kept = tensor.clone()
        return kept

    def __getitem__(self, module: str | ModuleView) -> "CachedCalls":
        path, found = module if isinstance(module, str) else module.path, self._find(module)
        if found not in self._calls:
            if found in self.paths:
                raise CacheError(f"{path!r} was not called while the cache was open.")
            held = ", ".join(list(self)[:20]) or "nothing yet"
            raise CacheError(f"{path!r} is not in the cache. It holds: {held}.")
        if any(versions(value) != then for value, then in self._shared.get(found, ())):
            raise CacheError(
                f"A value of {path!r} was changed in place after it had been collected (by the model, or "
                "by you), so it is no longer what the module gave. Collect with tracer.cache(clone=True)."
            )
        return CachedCalls(path, self._calls[found].values())

    def _find(self, module: object) -> Any:
        if isinstance(module, ModuleView):
            return module.module
        mine = next((known for known, path in self.paths.items() if path == module), None)
        return mine or dict(self.root.named_modules(remove_duplicate=False)).get(module)

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping's would compare tensors

    def __iter__(self) -> Iterator[str]:
        return (self.paths[module] for module in self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, module: object) -> bool:
        return self._find(module) in self._calls

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
