"""A block: the user's side of a run. It asks for points; the forward pass comes to them."""

from types import FrameType
from typing import Any

from torch.nn import Module

from nnatomy.core.frames import user_line
from nnatomy.core.gates import is_seen
from nnatomy.core.points import Question, Slot, Tap
from nnatomy.core.progress import Place
from nnatomy.core.run import Run
from nnatomy.errors import NotCalledError, NotReachedError, OutOfOrderError


class Block:
    """The `with` body of one trace.

    `wait`, `view`, `own` and `peek` are what a block that shares its run with others has otherwise.

    Attributes:
        step: which step (see `points`) the block's questions mean.
        frame: the frame of its `with`, while that is open.
        thread: which thread has opened it.
    """

    frame: FrameType | None = None
    thread = 0

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = 0

    def wait(self, question: Question | None) -> None:
        """Let the forward pass run until it is at that point, cannot come to it, or (also with None) ends."""
        self.run.wait(() if question is None else (question,))

    def view(self, slot: Slot) -> Slot:
        """A slot as this block sees and edits it."""
        return slot

    def peek(self, slot: Slot) -> Slot:
        """A slot as this block sees it while the forward pass goes on."""
        return slot

    def own(self, result: Any) -> Any:
        """The traced call's result as this block sees it."""
        return result

    def reach(self, module: Module, kind: str, name: str, call: int = 0, tap: Tap | None = None) -> Slot:
        """Let the forward pass run until it is at that point.

        Raises:
            OutOfOrderError: if it is past it.
            NotReachedError: if it ended, or left that step, without coming there.
            UsageError: if the point is inside a transform of torch.func in the model's own code.
            OutsideTraceError: if the process has been forked since the pass began.
            Exception: what the model raised on the way, as it was raised.
        """
        run = self.run
        question = Question(module, kind, call, self.step, tap, name)
        before = run.place(question)
        if before is Place.AHEAD and run.started and module._compiled_call_impl is not None:
            raise self._not_reached(question)
        if before is Place.AHEAD:
            self.go_on(question)
        if run.place(question) is not Place.HERE:
            if run.error is not None:
                raise run.error
            never_came = before is Place.AHEAD or run.progress.never_came(question)
            raise self._not_reached(question) if never_came else self._out_of_order(question)
        assert run.slot is not None
        return self.view(run.slot)

    def go_on(self, question: Question | None) -> None:
        """`wait`, unless the forward pass has ended, and note who asked for what."""
        if not self.run.ended:
            self.wait(question)
            self.run.last = question or "its end", user_line()

    def reach_end(self) -> None:
        """Let the forward pass run to its end. Raises what the model raised on the way."""
        self.go_on(None)
        if self.run.error is not None:
            raise self.run.error

    def complete(self) -> None:
        """The body has ended well: let the forward pass come to its end, if that is still wanted."""
        if self.run.run_to_end and not self.run.ended:
            self.reach_end()

    def dismiss(self) -> None:
        """The body is over: end the forward pass where it stands."""
        self.run.cancel()

    def forget(self) -> None:
        """Drop what would keep a tensor alive."""
        self.run.forget()

    # Errors of order.

    def _out_of_order(self, question: Question) -> OutOfOrderError:
        run = self.run
        step = run.progress.step - 1 if run.ended else run.progress.step  # the last one, if all are over
        last, line = run.last
        if run.cancelled:
            return OutOfOrderError(
                f"{question} was asked for at {user_line()}, after the forward pass had been stopped (it stood at "
                f"{last}, asked for at {line})."
            )
        steps = ""
        if step > self.step:
            steps = (
                f" The model is in step {step} and this question means step {self.step}: to ask in "
                "another step, do so inside `for step in tracer.iter[...]:`."
            )
        here = user_line()
        mend = f"ask for {question} before {last}" if line == here else f"move this line above {line}"
        return OutOfOrderError(
            f"{question} was asked for at {here}, but the forward pass is already past it: it stands behind {last}, "
            f"asked for at {line}. Ask for values in the order the model computes them: {mend}.{steps}"
        )

    def _not_reached(self, question: Question) -> NotReachedError:
        run, progress = self.run, self.run.progress
        module, call = question.module, question.call
        seen = any(is_seen(module, root) for root in run.roots)
        if not seen or module._compiled_call_impl is not None:
            return NotReachedError(
                f"{question} cannot be reached: the module is not among those of the traced model, or it is compiled "
                "(torch.compile), so that Python does not see its calls. Trace the model it belongs to, without compiling it."
            )
        if progress.calls.get(module, 0) > call:
            hint = getattr(question.tap, "hint", lambda _: "")(question.name)
            return NotReachedError(f"{question} was asked for, but that call has ended without computing one.{hint}")
        end = f"step {question.step}" if not run.ended or progress.step > question.step else "the forward pass"
        return NotCalledError(
            f"{question} was asked for at {user_line()}, but {end} ended without coming to it: with these inputs "
            "the model does not call that module (or not that often, or not that many steps), or calls it in another thread, or in "
            "compiled code (torch.compile), where Python does not see it."
        )
