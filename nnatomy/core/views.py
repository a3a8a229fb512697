"""Views: the module tree of a model, with the values of its modules during a trace."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

from torch.nn import Module

from nnatomy.core.frames import hide_our_frames
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Slot, Tap
from nnatomy.core.values import Calls, Values
from nnatomy.errors import NoSuchModuleError


class ModuleView(Values):
    """One module of a traced model.

    Children are reached as in the module tree: `view.encoder.layers[3]`, or by a path:
    `view["encoder.layers.3"]`. The latter also reaches a child that has the name of one of the
    attributes below (BERT's layers have a child called `output`: `layer["output"].output`).

    Inside a trace of the model, `input`, `inputs` and `output` give the values of the module's call,
    and can be assigned; `calls[k]` is the same for the k-th call of a module that the forward pass
    calls several times.
    """

    __slots__ = ("__weakref__", "_blocks", "_call", "module", "path")

    def __init__(self, blocks: OpenBlocks, module: Module, path: str, call: int = 0) -> None:
        self._blocks = blocks
        self.module = module
        self.path = path
        self._call = call

    # Values.

    def skip(self, value: Any) -> None:
        """Do not run the module in this call: `value` is its output. Errors as `output`."""
        self._asking("input", "skip")().skip(value)

    @property
    def calls(self) -> Calls[ModuleView]:
        """The calls of this module in one step: `view.calls[1].output` is its second call's."""
        return Calls(self.path or "the model", partial(self._module_view, self.module, self.path))

    def _module_view(self, module: Module, path: str, call: int = 0) -> ModuleView:
        """A view of one of the model's modules, of the kind that this model's views are."""
        return ModuleView(self._blocks, module, path, call)

    def _asking(self, kind: str, name: str, tap: Tap | None = None) -> Callable[[], Slot]:
        reach = self._blocks.current(self.path).reach
        return partial(reach, self.module, kind, f"{self.path or 'the model'}.{name}", self._call, tap)

    # The module tree.

    def __getattr__(self, name: str) -> ModuleView:
        prop = getattr(type(self), name, None)
        if isinstance(prop, property):  # it raised an AttributeError of the model's own: not to be hidden
            try:
                return prop.__get__(self)
            except AttributeError as error:
                raise hide_our_frames(error)  # noqa: B904
        if name.startswith("__"):
            raise AttributeError(name)
        return self._child(name)

    def __getitem__(self, which: int | slice | str) -> Any:
        if isinstance(which, str):
            return reduce(lambda view, name: view._child(name), which.split("."), self)
        names = list(self.module._modules)
        if isinstance(which, slice):
            return [self._child(name) for name in names[which]]
        try:
            name = names[which]
        except IndexError:
            raise IndexError(f"{self.path or 'the model'} has {len(names)} children, so no [{which}].") from None
        return self._child(name)

    def _child(self, name: str) -> Any:
        child = self.module._modules.get(name)
        if child is None:
            raise self._no_such(name)
        return self._module_view(child, f"{self.path}.{name}" if self.path else name)

    def paths(self, modules: Iterable[ModuleView | Module | str] | None = None) -> dict[Module, str]:
        """The submodules that views, modules or paths name (all of them by default), with their paths."""
        if modules is None:
            return {module: path for path, module in self.module.named_modules()}
        views = [self[one] if isinstance(one, str) else one for one in modules]
        bare = dict.fromkeys(one for one in views if not isinstance(one, ModuleView))
        known = self.paths() if bare else {}
        for module in bare.keys() - known.keys():
            raise NoSuchModuleError(f"{type(module).__name__} is not a submodule of {type(self.module).__name__}.")
        return dict((one.module, one.path) if isinstance(one, ModuleView) else (one, known[one]) for one in views)

    def _no_such(self, name: str) -> NoSuchModuleError:
        here = f"{self.path or 'the model'} ({type(self.module).__name__})"
        names = [known for known in dir(self) if not known.startswith("_")]
        near = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        if hasattr(self.module, name):
            hint = f" It is an attribute of the module itself: use `.module.{name}`."
        children = ", ".join(list(self.module._modules)[:20]) or "none"
        return NoSuchModuleError(f"{here} has no submodule {name!r}.{hint} Its children: {children}.")

    def __len__(self) -> int:
        return len(self.module._modules)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[ModuleView]:
        return (self._child(name) for name in self.module._modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module itself on values of your own; not part of the traced forward pass."""
        return self.module(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in self.module._modules if name.isidentifier())]

    def __repr__(self) -> str:
        return f"<{self.path or 'root'}: {self.module!r}>"
