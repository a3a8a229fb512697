"""Views: the module tree of a model, with the values of its modules during a trace."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch.nn import Module

from nnatomy.core.block import Block, OpenBlocks
from nnatomy.core.calls import Calls, Inputs, first_argument, with_first_argument
from nnatomy.core.frames import hide_our_frames
from nnatomy.core.points import described
from nnatomy.core.source import Source
from nnatomy.errors import AssignmentError, NoSuchModuleError


class ModuleView:
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

    @property
    def output(self) -> Any:
        """What the module's call returns (a tensor, a tuple, ...), after its forward hooks.

        Assigning puts another value in its place.

        Raises:
            OutsideTraceError: if no trace of the model is open here.
            OutOfOrderError: if the forward pass is already past this point.
            NotReachedError: if the forward pass ends without calling the module.
        """
        return self._block().reach(self.module, "output", f"{self.path}.output", self._call).value

    @output.setter
    def output(self, value: Any) -> None:
        self._block().reach(self.module, "output", f"{self.path}.output", self._call).value = value

    @property
    def inputs(self) -> Inputs:
        """The arguments of the module's call: (args, kwargs). Assigning replaces both. Errors as `output`."""
        return self._block().reach(self.module, "input", f"{self.path}.inputs", self._call).value

    @inputs.setter
    def inputs(self, value: Any) -> None:
        two = isinstance(value, (tuple, list)) and len(value) == 2
        if not (two and isinstance(value[0], (tuple, list)) and isinstance(value[1], Mapping)):
            raise AssignmentError(
                f"{self.path}.inputs is all that the module is called with: assign (args, kwargs), a tuple and a dict; got "
                f"{described(value)}."
            )
        args, kwargs = value
        slot = self._block().reach(self.module, "input", f"{self.path}.inputs", self._call)
        slot.value = tuple(args), dict(kwargs)

    @property
    def input(self) -> Any:
        """The first positional argument of the module's call, or its first keyword argument if there
        is none. Assigning replaces that argument. Errors as `output`."""
        slot = self._block().reach(self.module, "input", f"{self.path}.input", self._call)
        return first_argument(slot.value)

    @input.setter
    def input(self, value: Any) -> None:
        slot = self._block().reach(self.module, "input", f"{self.path}.input", self._call)
        slot.value = with_first_argument(slot.value, value)

    def skip(self, value: Any) -> None:
        """Do not run the module in this call: `value` is its output. Errors as `output`."""
        slot = self._block().reach(self.module, "input", f"{self.path}.skip", self._call)
        slot.skip(value)

    @property
    def calls(self) -> Calls[ModuleView]:
        """The calls of this module in one forward pass: `view.calls[1].output` is its second call's."""
        return Calls(self.path, partial(ModuleView, self._blocks, self.module, self.path))

    @property
    def source(self) -> Source:
        """The calls inside the module's forward: `view.source.softmax.input`; printing it lists them."""
        return Source(self)

    def _block(self) -> Block:
        return self._blocks.current(self.path)

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
            view = self
            for name in which.split("."):
                view = view._child(name)
            return view
        names = list(self.module._modules)
        if isinstance(which, slice):
            return [self._child(name) for name in names[which]]
        try:
            name = names[which]
        except IndexError:
            children = f"{self.path or 'the model'} has {len(names)} children"
            raise IndexError(f"{children}, so no [{which}].") from None
        return self._child(name)

    def _child(self, name: str) -> ModuleView:
        child = self.module._modules.get(name)
        if child is None:
            raise self._no_such(name)
        return ModuleView(self._blocks, child, f"{self.path}.{name}" if self.path else name)

    def paths(self, modules: Iterable[ModuleView | Module | str] | None = None) -> dict[Module, str]:
        """The submodules that views, modules or paths name (all of them by default), with their paths."""
        if modules is None:
            return {module: path for path, module in self.module.named_modules()}
        paths = {}
        everything: dict[Module, str] = {}
        for given in modules:
            if isinstance(given, Module):
                everything = everything or self.paths()
                if given not in everything:
                    mine = type(self.module).__name__
                    raise NoSuchModuleError(f"{type(given).__name__} is not a submodule of {mine}.")
                paths[given] = everything[given]
            else:
                view = given if isinstance(given, ModuleView) else self[given]
                paths[view.module] = view.path
        return paths

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
