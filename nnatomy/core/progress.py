"""How far a forward pass has come: which calls have begun and ended, and so whether a point is still to come.

This is the one place that answers "is that point ahead, here, or passed?". The run asks it to know whether to stop,
a block to know whether a question comes too late, several blocks to know whose point has come.
"""

from enum import Enum, auto
from typing import Any

from torch.nn import Module

from nnatomy.core.points import Question, Slot


class Place(Enum):
    """Where a point lies, seen from where the forward pass stands."""

    AHEAD = auto()
    HERE = auto()
    PASSED = auto()


#: The stages of a call in flight: its input is being shown; the module is at work; its output is being shown.
ENTERING, INSIDE, RETURNING = range(3)
#: In which of them each end of a call is shown.
SHOWN_IN = {"input": ENTERING, "output": RETURNING}


class Progress:
    """What has happened in one run.

    Attributes:
        step: how many calls of the root have ended.
        calls: how often each module has been called in this step.
        stack: the calls in flight, outermost first: [module, which of its calls, stage].
        found: what taps have found in this step: (module, call, kind).
        step_is_over: whether the root has returned, and the next step has not begun.
    """

    def __init__(self) -> None:
        self.step = 0
        self.calls: dict[Module, int] = {}
        self.stack: list[list[Any]] = []
        self.found: set[tuple[Module, int, str]] = set()
        self.step_is_over = False

    def place(self, question: Question, slot: Slot | None) -> Place:
        """Where that point lies. `slot` is where the forward pass stands for a block, if it does."""
        module, kind, call, step, _, _ = question
        if slot is not None and slot.module is module and (slot.kind, slot.call, slot.step) == (kind, call, step):
            return Place.HERE
        if step < self.step:
            return Place.PASSED
        if step > self.step:
            return Place.AHEAD
        if call >= self.calls.get(module, 0):
            return Place.PASSED if self.step_is_over else Place.AHEAD
        for entered, its_call, stage in self.stack:
            if entered is module and its_call == call:
                if kind == "output" or stage == ENTERING:
                    return Place.AHEAD
                passed = stage == RETURNING or kind == "input" or (module, call, kind) in self.found
                return Place.PASSED if passed else Place.AHEAD
        return Place.PASSED

    def never_came(self, question: Question) -> bool:
        """Whether the step of that point is over, and has just not had that call."""
        return self.step_is_over and question.step == self.step and self.calls.get(question.module, 0) <= question.call

    def begin_next_step(self) -> None:
        self.step += 1
        self.calls.clear()
        self.found.clear()
        self.step_is_over = False
