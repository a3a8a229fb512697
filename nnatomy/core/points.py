"""The words of the core.

run        one call of the model, at work in a thread of its own
block      the user's side of it: the body of one `with ...trace(...)`
point      what a block can ask for: a module's "input" or "output", or a value inside its call that
           a tap finds; of one `call` (a shared module is called several times) in one `step`
step       how many calls of the root module have ended: 0 in a plain forward pass; 0, 1, 2, ...
           while generating (several within one outermost call are one step)
slot       a point that has been reached, and its value, which a block may replace
collector  takes (and may replace) the values of points while the forward pass goes on
tap        finds the values of a kind of point inside a module's call
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.errors import a_kind


class Axes(NamedTuple):
    """Which axes of a tensor are of positions: those of this step alone, and those of all so far. (For other rooms; the core looks at
    neither.)"""

    here: tuple[int, ...] = ()
    so_far: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Slot:
    """A point that the forward pass has reached.

    Attributes:
        value: (args, kwargs) at an "input", what the call returned at an "output".
        skipped: at an "input": do not run the module, `instead` is its output.
        recomputed: whether the code at work will run again in `backward`, without any edit.
        axes: which axes of the value are of the positions of this step, and which of all so far, where a tap says so.
    """

    module: Module
    kind: str
    call: int
    step: int
    value: Any
    axes: Axes | None = None
    skipped: bool = False
    instead: Any = None
    recomputed: bool = False

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
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else a_kind(value)


class Report(NamedTuple):
    """What a tap's mode is given, to report the values that it finds in one call of a module."""

    run: Any
    module: Module
    call: int
    kind: str

    def __call__(self, value: Any, kind: str = "", axes: Axes | None = None) -> Slot:
        """This value has come; the slot holds the one to go on with. A mode that finds several kinds names the kind."""
        return self.run.arrive(self.module, kind or self.kind, self.call, value, axes)

    def awaited(self, kind: str) -> bool:
        """Whether anybody waits for that kind. If not, it need not be reported, and is passed from here on."""
        if any(waited_for == kind for waited_for, _ in self.run.taps.waiting.get(self.module, ())):
            return True
        self.run.progress.found.add((self.module, self.call, kind))
        return False


#: Makes the mode that finds values inside a call of the module.
Tap = Callable[[Module, Report], TorchFunctionMode]


class Question(NamedTuple):
    """A point that a block waits for."""

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
    """Takes values as the forward pass makes them, without stopping it; told before the blocks, it may put others in their place.

    Attributes:
        modules: the modules to be told about.
        kinds: the kinds of points to be told about, each with its tap where it is no input or output.
    """

    modules: set[Module]
    kinds: dict[str, Tap | None]

    def takes(self, module: Module, kind: str) -> bool:
        """Whether it is told about that kind of point of the module."""
        return module in self.modules and kind in self.kinds

    def take(self, slot: Slot) -> None:
        """One of these points has been reached. The blocks are done with it (`Run.collect`), or have yet to see it
        (`Run.replace`)."""
        raise NotImplementedError
