"""A run of the engine: which rows its steps have, what blocks have changed in place, and what is to be put at a later point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from nnatomy.core.points import Collector, Question, Slot
from nnatomy.core.run import Run
from nnatomy.vllm.layout import Layout


class Held(NamedTuple):
    """A value that a block has been given, which is a copy: what is changed in it is put back when the block asks for the next one.

    Attributes:
        name: what it is, with its layer.
        put: puts another value in its place.
        version: counts the changes in place that it had when it was given.
    """

    slot: Slot
    name: str
    value: Tensor
    put: Callable[[Tensor], None]
    version: int


class EngineRun(Run):
    """One generation of the engine.

    Attributes:
        layout: the rows of the newest step; None before the first has begun.
        inputs: what the model is called with in that step.
    """

    layout: Layout | None = None
    inputs: Any = None
    generates: bool = False
    _held: tuple[Held, ...] = ()

    def wait(self, questions: tuple[Question, ...]) -> None:
        self.put_back()
        super().wait(questions)

    def put_back(self) -> None:
        """Put what blocks have changed in place where it came from."""
        held, self._held = self._held, ()
        for one in held:
            if one.value._version != one.version:
                one.put(one.value)

    def hold(self, slot: Slot, name: str, value: Tensor, put: Callable[[Tensor], None]) -> None:
        """Remember a value that has been given."""
        if not value.is_inference():
            self._held = (*self._held, Held(slot, name, value, put, value._version))

    def held(self, slot: Slot, name: str) -> Tensor | None:
        """A value that has been given before, at the point where the block stands."""
        return next((one.value for one in self._held if one.slot is slot and one.name == name), None)

    def let_go(self, slot: Slot, name: str) -> None:
        """Forget one in whose place another is put; others at that point are put back before."""
        self._held = tuple(one for one in self._held if not (one.slot is slot and one.name == name))
        self.put_back()

    def once(self, one: Once | None) -> None:
        """Have that one put another value at its point, when the forward pass comes there."""
        if one is None or any(one.is_done_by(other) for other in self.replacements):
            return
        one.run = self
        self.replace(one)

    def forget(self) -> None:
        self._held, self.inputs, self.layout = (), None, None
        super().forget()


class Once(Collector):
    """Puts another value at one point of one call, and is gone.

    Args:
        call: which call of the module, and in which step.
    """

    run: EngineRun

    def __init__(self, module: Module, kind: str, call: tuple[int, int]) -> None:
        self.modules = {module}
        self.kinds = {kind: None}
        self.call = call

    def take(self, slot: Slot) -> None:
        if (slot.call, slot.step) == self.call:
            self.act(slot)
            self.run.replacements.remove(self)
            self.run.watch()

    def is_done_by(self, _: Collector) -> bool:
        """Whether another one does it already."""
        return False

    def act(self, slot: Slot) -> None:
        """Put it there."""
        raise NotImplementedError


class Requests(Collector):
    """Notes the rows of each step as it begins, before any block sees it.

    Args:
        layout: gives those of the step that begins.
        whole: raises an error if the first step does not have what its caller was promised; None where nothing was.
    """

    def __init__(self, run: EngineRun, layout: Callable[[], Layout], whole: Callable[[Layout], None] | None) -> None:
        self.modules = {run.root}
        self.kinds = {"input": None}
        self._run, self._layout, self._whole = run, layout, whole

    def take(self, slot: Slot) -> None:
        layout = self._layout()
        if self._whole is not None and not slot.step:
            self._whole(layout)
        self._run.layout, self._run.inputs = layout, slot.value
