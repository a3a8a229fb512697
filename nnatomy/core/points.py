"""The words of the core.

run     one call of the model, at work in a worker thread
block   the user's side of it: the body of one `with ...trace(...)`
point   what a block can ask for: a module's "input" or "output", or a value inside its call that
        a tap finds; of one `call` (a shared module is called several times) in one `step`
step    how many calls of the root module have ended: 0 in a plain forward pass; 0, 1, 2, ...
        while generating
slot    a point that has been reached, and its value, which a block may replace
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Axes(NamedTuple):
    """Which axes of a tensor are of positions: those of this step alone, and those of all so far."""

    here: tuple[int, ...] = ()
    so_far: tuple[int, ...] = ()


class Slot:
    """A point that the forward pass has reached.

    Attributes:
        value: (args, kwargs) at an "input", what the call returned at an "output".
        skipped: at an "input": do not run the module, `instead` is its output.
        fresh: tensors of the value that have been made here for some rows of them, and nobody holds as a whole.
        axes: which axes of the value are of the positions of this step, and which of all so far, where a tap says so.
    """

    __slots__ = ("axes", "call", "fresh", "instead", "kind", "module", "skipped", "step", "value")

    def __init__(
        self, module: Module, kind: str, call: int, step: int, value: Any, axes: Axes | None = None
    ) -> None:
        self.module = module
        self.kind = kind
        self.call = call
        self.step = step
        self.value = value
        self.skipped = False
        self.fresh: tuple[Tensor, ...] = ()
        self.axes = axes

    def is_at(self, module: Module, kind: str, call: int, step: int) -> bool:
        """Whether it is that point."""
        return self.module is module and self.kind == kind and self.call == call and self.step == step

    def skip(self, value: Any) -> None:
        """Put `value` in the place of the module's output, and do not run the module."""
        self.skipped, self.instead = True, value


def versions(value: Any) -> Any:
    """What tells that a tensor in `value` is changed in place: version counters, which inference tensors lack."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return [versions(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def described(value: Any) -> str:
    """What was given in the place of a tensor, for an error to say."""
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@runtime_checkable
class Visit(Protocol):
    """What a mode inside a module's call is given to show values to those who wait for them."""

    def __call__(self, value: Any, kind: str = ..., axes: Axes | None = None) -> Slot:
        """This value has come; the slot holds the one to go on with. A mode that finds several kinds names the kind."""

    def awaited(self, kind: str) -> bool:
        """Whether anybody waits for that kind. If not, it is passed, and need not be shown."""


#: Makes the mode that finds values inside a call of the module.
Tap = Callable[[Module, Visit], TorchFunctionMode]


class Want(NamedTuple):
    """A point that the block waits for."""

    module: Module
    kind: str
    call: int
    step: int
    tap: Tap | None
    name: str

    def __str__(self) -> str:
        call = f" (call {self.call})" if self.call else ""
        step = f" of step {self.step}" if self.step else ""
        return f"{self.name}{call}{step}"


class Collector:
    """Takes values as the forward pass makes them, without stopping it.

    Attributes:
        modules: the modules to be told about.
        kinds: the kinds of points to be told about, each with its tap where it is no input or output.
    """

    modules: set[Module]
    kinds: dict[str, Tap | None]

    def take(self, slot: Slot) -> None:
        """One of these points has been reached, and the blocks are done with it."""
        raise NotImplementedError
