"""Envoys: nnsight's views of modules, with aliases, modules of the user's own, and what the modules themselves have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Module

from nnatomy.compat.nnsight.hooked import call_as_part
from nnatomy.compat.nnsight.source import Operations, operations_of
from nnatomy.core.block import Block
from nnatomy.core.points import Report, Slot, Tap
from nnatomy.core.values import Values
from nnatomy.errors import NoSuchModuleError, UsageError
from nnatomy.tracing import ModuleView

Aliases = Mapping[str, str | list[str]]
#: What nnsight calls the root.
ROOT = "model"
NO_NEXT = ".next() is gone from nnsight: loop over the steps, `for step in tracer.iter[:]:`, and read in each."


class Naming:
    """What all envoys of one model share.

    Args:
        rename: aliases, by a module's name or the end of its path.
        envoys: the class of all envoys, or classes by that of the module or the end of its path.

    Attributes:
        added: the modules that the user has put at a module, by name. The model itself carries nothing of them.
        calls: which call of a module a block means, where its loop over `tracer.iter` is over calls.
        with_operations: the modules whose `source` has been asked for.
    """

    def __init__(self, rename: Aliases | None = None, envoys: Any = None) -> None:
        self.aliases: list[tuple[str, str]] = []  # (alias, path)
        for path, names in (rename or {}).items():
            each = [names] if isinstance(names, str) else names
            self.aliases += [(name.strip("."), path.strip(".")) for name in each]
        self.envoys = envoys
        #: Further names of what lies below a module: by module, name and path from there.
        self.own: WeakKeyDictionary[Module, dict[str, str]] = WeakKeyDictionary()
        self.added: WeakKeyDictionary[Module, dict[str, Module]] = WeakKeyDictionary()
        self.calls: WeakKeyDictionary[Block, int] = WeakKeyDictionary()
        self.with_operations: dict[Module, Operations] = {}
        #: What a block still holds while a module of the user's own is at work there.
        self.held: WeakKeyDictionary[Block, dict[tuple[Module, str], Slot]] = WeakKeyDictionary()

    def tap(self, module: Module, report: Report) -> Any:
        """Finds the operations of those modules: see `core.points.Tap`."""
        return self.with_operations[module].tap(module, report)

    def aliased(self, name: str) -> list[str]:
        """The paths that a name is an alias of."""
        return [path for alias, path in self.aliases if alias == name]

    def class_of(self, module: Module, path: str) -> type[Envoy]:
        """The class of a module's envoy."""
        if not isinstance(self.envoys, Mapping):
            return self.envoys or Envoy
        for kind in type(module).__mro__:
            if kind in self.envoys:
                found: type[Envoy] = self.envoys[kind]
                return found
        names = [known for known in self.envoys if isinstance(known, str)]
        return next((self.envoys[name] for name in names if self._ends_with(path, name.strip("."))), Envoy)

    def _ends_with(self, path: str, end: str) -> bool:
        parts, wanted = path.split("."), end.split(".")
        tail = parts[-len(wanted) :]
        return len(tail) == len(wanted) and all(
            one == other or (other, one) in self.aliases for one, other in zip(tail, wanted, strict=True)
        )


class Envoy(ModuleView):
    """A view of a module under nnsight's names: paths begin with `model.`, and what it lacks the module itself may have."""

    _naming: Naming

    def __new__(cls, *args: Any, **_: Any) -> Any:
        if cls is Envoy and args and isinstance(args[0], Module):  # nnsight's own way to wrap a module
            from nnatomy.compat.nnsight.model import NNsight

            return object.__new__(NNsight)
        return object.__new__(cls)

    def _module_view(self, module: Module, path: str, call: int = 0) -> Envoy:
        view = self._naming.class_of(module, path)(self._blocks, module, path, call)
        view._naming = self._naming
        return view

    def _asking(self, kind: str, name: str, tap: Tap | None = None) -> Any:
        if self._naming.held:
            held = self._naming.held.get(self._blocks.current(self.path), {}).get((self.module, kind))
            if held is not None:
                return lambda: held
        if self._naming.calls and not self._call and (call := self._naming.calls.get(self._blocks.current(self.path))):
            return self._module_view(self.module, self.path, call)._asking(kind, name, tap)
        return super()._asking(kind, name, tap)

    # The tree.

    def _child(self, name: str) -> Any:
        if (child := self.module._modules.get(name)) is not None:
            return self._module_view(child, f"{self.path}.{name}")
        own = self._naming.own.get(self.module, {})
        for path in [*self._naming.aliased(name), *([own[name]] if name in own else [])]:
            if (found := self._below(path)) is not None:
                return found
        if (module := self._naming.added.get(self.module, {}).get(name)) is not None:
            return self._module_view(module, f"{self.path}.{name}")
        if name.startswith("E_") and name[2:] in self.module._modules:
            return self._child(name[2:])
        raise self._no_such(name)

    def _below(self, path: str) -> Any:
        module, where = self.module, self.path
        for name in path.split("."):
            child = module._modules.get(name)
            if child is None:
                return None
            module, where = child, f"{where}.{name}"
        return self._module_view(module, where)

    def __getattr__(self, name: str) -> Any:
        if name == "_naming":
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except NoSuchModuleError:
            if name.startswith("_") or not hasattr(self.module, name):
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module) and name not in ("module", "steps_of") and not name.startswith("_"):
            self._naming.added.setdefault(self.module, {})[name] = value
        else:
            super().__setattr__(name, value)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Call the module on values of your own; with `hook`, as a part of the traced forward pass, whose values are points."""
        if hook:
            return call_as_part(self, args, kwargs)
        return super().__call__(*args, **kwargs)

    @property
    def source(self) -> Any:
        """The operations in the module's forward, by nnsight's names."""
        return operations_of(self)

    @property
    def _module(self) -> Module:
        return self.module

    def at(self, path: str) -> Any:
        """The view at a path below this one, which may have aliases in it."""
        view = self
        for name in path.split(".") if path else ():
            view = view._child(name)
        return view

    # Values, under further names where a child has the name of one.

    @property
    def nns_output(self) -> Any:
        """What the call returns, also where a child is called `output`."""
        return self._asking("output", "output")().value

    @nns_output.setter
    def nns_output(self, value: Any) -> None:
        self._asking("output", "output")().value = value

    @property
    def output(self) -> Any:
        """What the call returns; a child of that name, where there is one."""
        return self._child("output") if "output" in self.module._modules else self.nns_output

    @output.setter
    def output(self, value: Any) -> None:
        self.nns_output = value

    @property
    def inputs(self) -> Any:
        """The arguments of the call: (args, kwargs)."""
        return self._asking("input", "inputs")().value

    @inputs.setter
    def inputs(self, value: Any) -> None:
        if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], (tuple, list)):
            value = (value[0],), value[1]  # a single argument
        set_inputs: Any = Values.inputs
        set_inputs.__set__(self, value)

    def next(self, *_: Any) -> Any:
        """Raises UsageError."""
        raise UsageError(NO_NEXT)

    def get(self, path: str) -> Any:
        """What lies at a path: `get("transformer.h.1.output")`."""
        found: Any = self
        for name in path.split("."):
            found = found[name] if isinstance(found, ModuleView) and name.isdigit() else getattr(found, name)
        return found

    def modules(self) -> list[Envoy]:
        """This one and all below."""
        return [envoy for _, envoy in self.named_modules()]

    def named_modules(self) -> list[tuple[str, Envoy]]:
        """The same, with their paths."""
        return [(envoy.path, envoy) for envoy in self._all_below()]

    def _all_below(self) -> Iterator[Any]:
        yield self
        for name in self.module._modules:
            yield from self._child(name)._all_below()

    def paths(self, modules: Iterable[Any] | None = None) -> dict[Module, str]:
        named = {module: f"{self.path}.{path}".rstrip(".") for path, module in self.module.named_modules()}
        if modules is None:
            return named
        found: dict[Module, str] = {}
        for one in modules:
            view: Any = self.at(one.removeprefix(f"{ROOT}.")) if isinstance(one, str) else one
            module = view.module if isinstance(view, ModuleView) else view
            found[module] = named[module]
        return found

    # What changes the module gives its view.

    def to(self, *args: Any, **kwargs: Any) -> Envoy:
        """The module's own; returns the view."""
        self.module.to(*args, **kwargs)
        return self

    def cpu(self) -> Envoy:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: Any = "cuda") -> Envoy:
        """`to("cuda")`."""
        return self.to(device)

    def eval(self) -> Envoy:
        """The module's own; returns the view."""
        self.module.eval()
        return self

    def train(self, mode: bool = True) -> Envoy:
        """The module's own; returns the view."""
        self.module.train(mode)
        return self
