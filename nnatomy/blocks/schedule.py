"""Several blocks on one forward pass, and whose turn it is.

Each block of `tracer.invoke` is a coroutine on a thread of its own, as the forward pass is one, and has rows of its own in the
joined batch. The thread that opened the trace owns them all, and alone decides who is next: a block that can go on, in
the order in which they were given; else the trace's own body, if it can; else the forward pass, to the nearest point
that any of them waits for. So there is exactly one thread at work at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from nnatomy.blocks.joining import Joining
from nnatomy.blocks.row_slot import Edit, RowSlot, merge
from nnatomy.blocks.rows import Rows
from nnatomy.blocks.shared_block import BatchShape, SharedBlock, Waiting
from nnatomy.core.block import Block
from nnatomy.core.frames import user_line
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Question, Slot
from nnatomy.core.run import Run
from nnatomy.errors import OutOfOrderError, UsageError

if TYPE_CHECKING:
    from nnatomy.blocks.invoke import Invoke


class Schedule(SharedBlock):
    """The trace's own body, and the others that share its run.

    Attributes:
        invokes: the others, in their order.
        without_body: those given with no function, whose `with` has not been entered yet.
        given: how many rows and positions the model is given.
    """

    def __init__(self, run: Run, blocks: OpenBlocks, joining: Joining | None) -> None:
        super().__init__(run)
        self.blocks = blocks
        self._joining = joining
        self.invokes: list[Invoke] = []
        self.without_body: list[Invoke] = []
        self.given = BatchShape(run.root)
        self.started = False
        #: The edits of the slot where the forward pass stands, which are made together.
        self._edits: list[Edit] = []
        self._edited: Slot | None = None

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return self

    def block_here(self) -> SharedBlock:
        """The block at work in this thread."""
        here = get_ident()
        return next((invoke for invoke in self.invokes if invoke.coroutine.thread == here), self)

    def wait(self, question: Question | None) -> None:
        if self.invokes or self.without_body:
            super().wait(question)
        else:
            Block.wait(self, question)

    def view(self, slot: Slot) -> Slot:
        if self._edits:
            self.merge_edits()
        return slot

    def _give_way(self) -> None:
        self.go_on(lambda: self.is_ready)

    # Whose turn it is: all of this in the thread that opened the trace.

    def go_on(self, is_done: Callable[[], bool]) -> None:
        """Let the blocks, and the forward pass, go on until that is so, or nobody can go on."""
        if not self.started:
            self._start()
        try:
            while True:
                ready = next((invoke for invoke in self.invokes if not invoke.done and invoke.is_ready), None)
                if ready is not None:
                    ready.coroutine.resume()
                    if (error := ready.coroutine.error) is not None:
                        raise error
                elif is_done() or not self._let_the_model_go_on():
                    return
        except BaseException:
            self.dismiss()
            raise

    def _let_the_model_go_on(self) -> bool:
        """To the nearest point that a block waits for. False if none does."""
        waiting = [block for block in (*self.invokes, self) if block.waits is not None]
        waits = [block.waits for block in waiting if block.waits is not None]
        if any(not one.others for one in waits):
            self.merge_edits()
            self.run.wait(tuple(one.question for one in waits if one.question is not None))
        elif waits:
            others = "; ".join(one.others for one in waits)
            waiting[0].failure = OutOfOrderError(
                f"No order lets all blocks go on: {others}, which waits as well."
            )
        return bool(waits)

    def _start(self) -> None:
        """All blocks are known: begin.

        Raises:
            UsageError: if an invoke has no block.
            InputError: if their inputs cannot be joined.
        """
        for invoke in self.without_body:
            raise UsageError(
                f"tracer.invoke(...) at {invoke.line} has no block: write `with tracer.invoke(...):`, or give "
                "a function, tracer.invoke(prompt, function)."
            )
        with_inputs = [invoke for invoke in self.invokes if invoke.inputs is not None]
        if with_inputs:
            assert self._joining is not None
            call, rows = self._joining.join([invoke.inputs for invoke in with_inputs])
            if not self.run.started:  # else it has been stopped, and never will run
                self.run.call = call
            for invoke, mine in zip(with_inputs, rows, strict=True):
                invoke.rows = mine
            self.run.replace(self.given)
        self.started = True

    # Edits.

    def note_edits(self, view: RowSlot) -> None:
        """What a block has edited of its rows is to be made before anybody sees the whole."""
        self._edited = view.whole
        self._edits += view.edits()

    def has_edited(self, slot: Slot, rows: Rows) -> bool:
        """Whether edits of those rows of the slot are still to be made."""
        return self._edited is slot and any(edit.rows[:2] == rows[:2] for edit in self._edits)

    def replaced(self, slot: Slot) -> set[int]:
        """The leaves of the slot's value in which other rows are still to be put."""
        return {edit.leaf for edit in self._edits if not edit.only_read} if self._edited is slot else set()

    def merge_edits(self) -> None:
        edits, self._edits = self._edits, []
        if edits:
            assert self._edited is not None
            merge(self._edited, edits)
        self._edited = None

    # Names.

    def look_up(self, invoke: Invoke, name: str) -> Any:
        """What a name means in a block that has not bound it itself: what an earlier block has bound, or a later one,
        which is waited for; else what it meant in the frame when the block was captured."""
        body = invoke.body
        assert body is not None
        place = self.invokes.index(invoke)
        others = self.invokes[:place][::-1]
        if name not in body.binds or name not in body.names:
            others = others + self.invokes[place + 1 :]
        for other in others:
            if other.body is not None and other.body.frame is body.frame and name in other.body.binds:
                if not other.done and name not in other.names:
                    where = f"{name!r}, needed at {user_line()}, is bound by the block at {other.line}"
                    self.block_here().let_others_go_on(
                        Waiting(lambda: other.done or name in other.names, where)  # noqa: B023
                    )
                if name in other.names:
                    return other.names[name]
        if name in body.names:
            return body.names[name]
        return body.frame.f_globals[name]  # KeyError: a builtin, or nothing

    # The end.

    def complete(self) -> None:
        """Let the others come to their ends, and bind what they have bound."""
        self.write_back()
        waited_for = [invoke for invoke in self.invokes if not invoke.lasting]
        if self.without_body or waited_for:
            self.go_on(lambda: all(invoke.done for invoke in waited_for))
        for invoke in self.invokes:
            lost = invoke.lasting and invoke.coroutine.lost
            if (
                error := invoke.coroutine.error
            ) is not None and not lost:  # also one that the body has caught
                raise error
        for invoke in self.invokes:
            if invoke.body is not None and (names := invoke.names.own()):
                invoke.body.bind(names)
        super().complete()

    def dismiss(self) -> None:
        """End the forward pass and whatever block is still there; wait until all are gone."""
        try:
            super().dismiss()
        finally:
            for invoke in self.invokes:
                invoke.coroutine.cancel()

    def forget(self) -> None:
        """Drop what the blocks hold: they and this hold each other, and would keep it until Python looks for cycles."""
        for invoke in self.invokes:
            if invoke.body is not None and invoke.body.makes_functions:
                invoke.names.look_up = self._look_up_after(invoke)
        for invoke in self.invokes + self.without_body:
            invoke.forget()
        self.invokes, self.without_body = [], []
        super().forget()

    def _look_up_after(self, invoke: Invoke) -> Callable[[str], Any]:
        """What names mean in a function that a block has defined, when the trace is over (see `look_up`)."""
        body, place = invoke.body, self.invokes.index(invoke)
        assert body is not None
        names, global_names = dict(body.names), body.frame.f_globals
        for other in self.invokes[:place:-1] + self.invokes[:place]:
            if other.body is not None and other.body.frame is body.frame:
                names |= other.names.own()
        return lambda name: names[name] if name in names else global_names[name]
