"""A run: one call of the model, which stands still where its block asks for a value.

The call is a coroutine on a thread of its own (see `coroutine`). It is suspended in a module's gate (see `gates`) while
the block holds the point, and goes on when the block asks for the next one. This is the model's side; `block` is
the user's.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch._C import _functorch
from torch.nn import Module

from nnatomy.core.coroutine import Cancelled, Coroutine
from nnatomy.core.frames import Line
from nnatomy.core.gates import gated
from nnatomy.core.points import Axes, Collector, Question, Slot
from nnatomy.core.progress import INSIDE, SHOWN_IN, Place, Progress
from nnatomy.core.recompute import is_recomputed, unchanged
from nnatomy.core.taps import Taps
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import UsageError

#: The result of a call that has not come to its end.
NO_RESULT = object()


class Run(Coroutine):
    """One call of the model, from the first question of its block to its end.

    Args:
        root: the module whose calls are the steps.
        whole: the module whose submodules can be asked for: `root`, or what wraps it.
        call: what to run.
        state: the thread state to run it with.

    Attributes:
        call: what is to run, until it has begun.
        roots: the modules whose submodules can be asked for: `whole`, and what is attached to it.
        progress: how far the forward pass has come.
        questions: the points that the blocks wait for, while they wait.
        slot: the point that the blocks have been given, while they hold it.
        last: the question that was answered last, and the line that asked it.
        collectors: told about points after the blocks.
        replacements: told about points before any block sees them, to put another value there.
        watched_inputs, watched_outputs: the modules at whose input or output the gates have the run look (see `watch`).
        taps: those that somebody waits for.
        run_to_end: whether somebody still wants what comes after the block's end.
        result: what the call returned, or NO_RESULT.
    """

    def __init__(self, root: Module, whole: Module, call: Callable[[], Any], state: ThreadState) -> None:
        super().__init__(self._work, state)
        self.root = root
        self.roots = [whole]
        self.call: Any = call
        self.progress = Progress()
        self.questions: tuple[Question, ...] = ()
        self.slot: Slot | None = None
        self.last: tuple[Question | str, Line | str] = "the start", "the trace's first line"
        self.collectors: list[Collector] = []
        self.replacements: list[Collector] = []
        self.watched_inputs: set[Module] = set()
        self.watched_outputs: set[Module] = set()
        self.taps = Taps()
        self.run_to_end = False
        self.result: Any = NO_RESULT
        self._records_gradients, self._transforms = state.grad, len(state.transforms)

    # What a block asks and says.

    def place(self, question: Question) -> Place:
        """Whether the forward pass is before that point, at it, or past it."""
        return Place.PASSED if self.ended else self.progress.place(question, self.slot)

    def wait(self, questions: tuple[Question, ...]) -> None:
        """Let the forward pass go on (or start) until it is at one of those points, cannot come to one, or ends."""
        self.slot, self.questions = None, questions
        self.watch()
        try:
            self.resume()
        finally:
            self.questions = ()

    @contextmanager
    def collecting(self, *collectors: Collector) -> Iterator[None]:
        """Within, those are told about their points."""
        self.collect(*collectors)
        try:
            yield
        finally:
            for collector in collectors:
                self.collectors.remove(collector)
            self.watch()

    def collect(self, *collectors: Collector) -> None:
        """Tell those about their points until the run ends."""
        self.collectors += collectors
        self.watch()

    def replace(self, collector: Collector, place: int | None = None) -> None:
        """Have that one put other values in the place of its points', before any block sees them."""
        self.replacements.insert(len(self.replacements) if place is None else place, collector)
        self.watch()

    def watch(self) -> None:
        """Look again at which modules the forward pass has to stop and tell somebody.

        A module that a tap waits in is watched at both ends: at its output it shows that the value did not come.
        """
        waited = [({question.module}, {question.kind: question.tap}) for question in self.questions]
        waited += [(one.modules, one.kinds) for one in (*self.replacements, *self.collectors)]
        inputs: set[Module] = set()
        outputs: set[Module] = set()
        taps = self.taps.waiting = {}
        for modules, kinds in waited:
            if kinds.keys() != {"output"}:
                inputs |= modules
            if kinds.keys() != {"input"}:
                outputs |= modules
            for kind, tap in kinds.items():
                if tap is not None:
                    for module in modules:
                        taps.setdefault(module, []).append((kind, tap))
        self.watched_inputs, self.watched_outputs = inputs, outputs

    def forget(self) -> None:
        """Drop what the run holds, so that nothing but the user's names keeps a tensor alive."""
        self.result, self.slot = NO_RESULT, None
        super().forget()
        self.collectors, self.replacements = [], []
        self.taps.modes.clear()

    # What the forward pass does, in its own thread.

    def around(self) -> AbstractContextManager[Any]:
        return gated(self)

    def _work(self) -> None:
        call, self.call = self.call, None
        result = call()
        if not self.cancelled:
            self.result = result

    def arrive(self, module: Module, kind: str, call: int, value: Any, axes: Axes | None = None) -> Slot:
        """The forward pass is at a point of a watched module: let everybody look at it who waits for it.

        Returns:
            The slot with what goes on in its place.
        """
        if self.cancelled:
            raise Cancelled
        progress = self.progress
        if kind in SHOWN_IN:
            progress.stack[-1][2] = SHOWN_IN[kind]
        slot = Slot(module, kind, call, progress.step, value, axes)
        for replacement in tuple(self.replacements):
            if replacement.takes(module, kind):
                self._let_edit(slot, replacement.take, replacement)
        if kind not in SHOWN_IN:
            progress.found.add((module, call, kind))
        while self.questions:
            places = [progress.place(question, slot) for question in self.questions]
            if Place.HERE in places:
                question = self.questions[places.index(Place.HERE)]
                self._check_transforms(question)
                self._let_edit(slot, self._hand_over, question)
            elif Place.PASSED in places:
                self._hand_over(None)
            else:
                break
        for collector in tuple(self.collectors):
            if collector.takes(module, kind):
                collector.take(slot)
        if self.taps.waiting:
            self.taps.enter(self)
        if kind == "input":
            progress.stack[-1][2] = INSIDE
        return slot

    def _let_edit(self, slot: Slot, look: Callable[[Slot], Any], who: Question | Collector) -> None:
        """Let somebody look at the slot, who may edit it where that can be had."""
        slot.recomputed = self._records_gradients and is_recomputed()
        with unchanged(slot, who) if slot.recomputed else nullcontext():
            look(slot)

    def _check_transforms(self, question: Question) -> None:
        if len(_functorch.get_interpreter_stack() or ()) != self._transforms:
            raise UsageError(
                f"{question} is inside a transform of torch.func (grad, vmap, ...) in the model's own code: its value is "
                "nothing outside of that. Ask for a module around it, or put a hook on it."
            )

    def end_step(self) -> None:
        """A call of the root is over: what was asked for in this step and has not come will not come."""
        self.progress.step_is_over = True
        while any(self.progress.place(question, None) is Place.PASSED for question in self.questions):
            self._hand_over(None)
        self.progress.begin_next_step()

    def _hand_over(self, slot: Slot | None) -> None:
        self.slot = slot
        self.suspend()
