"""What one call of a layer computes: every torch function's results, what they came of, and where in the code it stands."""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from threading import get_ident
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.call_sites import forward_code, frames_from
from nnatomy.core.frames import frames
from nnatomy.core.gates import is_call, runs

ADDITIONS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
#: What leaves every entry what it is (dropout, when nothing is trained).
SAME = {
    *("to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "contiguous", "dropout"),
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
}
#: What multiplies with a matrix.
MATRIX_PRODUCTS = {
    *("linear", "addmm", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm", "einsum"),
    *("conv1d", "grouped_mm", "_grouped_mm", "_scaled_mm", "grouped_mm_fallback"),
}

#: What functions return that is no tensor, nor holds one: shapes, sizes, ...
_NUMBERS = {torch.Size, int, float, bool, torch.dtype, torch.device}
_NO_CONTAINERS = {Tensor, Parameter, int, float, bool, str, type(None), torch.dtype, torch.device}

#: Where a call stands: in the call of which module, and at which instructions of its forward and of the helpers called.
Where = tuple[Module, tuple[tuple[CodeType, int], ...]]


def where() -> Where | None:
    """Where the torch function that is being called stands."""
    module = next((frame.f_locals["self"] for frame in frames() if is_call(frame)), None)
    if module is None:
        return None
    inside = frames_from(forward_code(module))
    return module, tuple((frame.f_code, _instruction(frame.f_code, frame.f_lasti)) for frame in inside)


@lru_cache(maxsize=10_000)
def _instruction(code: CodeType, last: int) -> int:
    """The instruction itself, where Python, which has made a call quicker, stands at one of its caches."""
    while last > 0 and dis.opname[code.co_code[last]] == "CACHE":
        last -= 2
    return last


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of what a function is given, as pytree has them, but quicker where none is in a container."""
    flat = [*args, *kwargs.values()]
    return flat if _NO_CONTAINERS.issuperset(map(type, flat)) else pytree.tree_leaves((args, kwargs))


class Value:
    """What one torch function returned.

    Attributes:
        inputs: what it came of; `places`: where among the function's arguments each stands.
        leaf: which of the function's results it is.
        stack: the modules at work, outermost first; `modules`: the same as a set.
        where: where the function stands; None of what no function has returned.
        operands: of an addition of two tensors of one size, the two as they were, then the sum.
    """

    def __init__(
        self,
        tensor: Tensor,
        function: str = "",
        inputs: tuple[Value, ...] = (),
        stack: tuple[Module, ...] = (),
    ) -> None:
        self.tensor = tensor  # kept alive so that no identity is used twice
        self.function = function
        self.inputs = inputs
        self.stack = stack
        self.leaf = 0
        self.where: Where | None = None
        self.places: tuple[int, ...] = ()
        self.operands: tuple[Tensor, ...] = ()

    @cached_property
    def modules(self) -> frozenset[Module]:
        return frozenset(self.stack)

    @property
    def same_as(self) -> Value | None:
        """What it is another form of."""
        same = self.function in SAME and self.inputs[0].tensor.numel() == self.tensor.numel()
        return self.inputs[0] if same else None

    def back(self, until: Callable[[Value], bool]) -> list[Value]:
        """What it came of, nearest first, itself included; not beyond where `until` says."""
        seen, found = {self}, [self]
        for one in found:
            if not until(one):
                new = [before for before in one.inputs if before not in seen]
                seen.update(new)
                found += dict.fromkeys(new)
        return found


class Record(TorchFunctionMode):
    """Everything that one call of a layer computes; `order`: in the order in which it does."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = Value(stream)
        self.values = {id(stream): self.stream}
        self.order: list[Value] = []
        self._calls: Counter[Where] = Counter()

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self.values:
            self.values[id(tensor)] = Value(tensor)
        return self.values[id(tensor)]

    def is_once(self, where: Where) -> bool:
        """Whether what stands there is called once."""
        return self._calls[where] == 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # which looks into this method, too
            return func(*args, **kwargs)
        name = func.__name__
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        changes = in_place or name == "__setitem__"
        result = None if changes else func(*args, **kwargs)
        if type(result) in _NUMBERS:
            return result
        leaves = leaves_of(args, kwargs)
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        inputs = tuple(self.value(leaves[i]) for i in places)
        adds = name in ADDITIONS and len(places) == 2 and kwargs.get("alpha", 1) == 1
        operands = tuple(leaves[i].clone() for i in places) if adds else ()
        if changes:
            result = func(*args, **kwargs)
        results = [args[0]] if name == "__setitem__" else leaves_of((result,), {})
        at: Where | None = None
        for leaf, tensor in enumerate(results):
            if isinstance(tensor, Tensor) and (changes or not any(tensor is one.tensor for one in inputs)):
                run = runs.get(get_ident())
                value = Value(tensor, name, inputs, tuple(module for module, *_ in run.progress.stack) if run else ())
                at = at or where()
                value.leaf, value.where, value.places = leaf, at, places
                if operands and all(operand.numel() == tensor.numel() for operand in operands):
                    value.operands = (*operands, tensor.clone())
                self.values[id(tensor)] = value
                self.order.append(value)
        if at is not None:
            self._calls[at] += 1
        return result


class Result(NamedTuple):
    """One of the results of a function."""

    leaf: int = 0


#: A tensor that a function is given (its place among the arguments), or that it returns.
Place = int | Result


@dataclass
class Findings:
    """Where some names are in a record (at which function, as what of it), and why others are not there."""

    shown: dict[str, tuple[Value, Place]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Value) -> None:
        """It is that result of a function."""
        self.shown[name] = value, Result(value.leaf)

    def show_results(self) -> None:
        """What was to be shown where it is read is shown where it is computed.

        What reads it may be an `autograd.Function`, whose gradient is not that of what is put in there (in a module whose
        parameters are split over processes).
        """
        for name, (value, place) in [*self.shown.items()]:
            if not isinstance(place, Result):
                self.add(name, value.inputs[value.places.index(place)])

    def add_read(self, name: str, value: Value, order: list[Value]) -> None:
        """It is that, where the first of those reads it."""
        reading = next(one for one in order if value in one.inputs)
        self.shown[name] = reading, reading.places[reading.inputs.index(value)]


@dataclass
class LayerSums:
    """What is shown inside one layer.

    Attributes:
        shown: by place in the code, what is shown there.
        functions: the functions called there.
        absent: by name, why the layer has none.
        values: by name, what it was when this was found.
        down: the module that reads the neurons, where it is one.
    """

    shown: dict[Where, list[tuple[str, Place]]] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    absent: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    down: Module | None = None

    def add(self, name: str, value: Value, place: Place) -> None:
        """Show that, of the function that returned `value`."""
        assert value.where is not None
        self.shown.setdefault(value.where, []).append((name, place))
        self.functions.add(value.function)

    def take(self, record: Record, findings: Findings) -> None:
        """Show what has been found."""
        self.absent |= findings.absent
        for name, (value, place) in findings.shown.items():
            if value.where is None or (isinstance(place, Result) and not record.is_once(value.where)):
                self.absent[name] = "it is computed in a loop"
                continue
            self.add(name, value, place)
            tensor = value.tensor if isinstance(place, Result) else value.inputs[value.places.index(place)].tensor
            self.values[name] = tensor.reshape(*record.stream.tensor.shape[:2], -1).clone()
