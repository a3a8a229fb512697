"""Several blocks on one forward pass, and whose turn it is.

Each block of `tracer.invoke` is a coroutine on a thread of its own, as the forward pass is one, and has rows of its own in the
joined batch. The thread that opened the trace owns them all, and alone decides who is next: a block that can go on, in
the order in which they were given; else the trace's own body, if it can; else the forward pass, to the nearest point
that any of them waits for. So there is exactly one thread at work at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING, Any

from nnatomy.blocks.joining import Joining
from nnatomy.blocks.shared_block import Batch, SharedBlock, Waiting
from nnatomy.core.block import Block
from nnatomy.core.frames import user_line
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Question
from nnatomy.core.run import Run
from nnatomy.errors import OutOfOrderError, UsageError

if TYPE_CHECKING:
    from nnatomy.blocks.invoke import Invoke


class Schedule(SharedBlock):
    """The trace's own body, and the others that share its run.

    Attributes:
        invokes: the others, in their order.
        started: whether all blocks are known, and their inputs are joined.
    """

    def __init__(self, run: Run, blocks: OpenBlocks, joining: Joining | None) -> None:
        super().__init__(run, Batch(run))
        self.blocks = blocks
        self._joining = joining
        self.invokes: list[Invoke] = []
        self.started = False

    def block_here(self) -> SharedBlock:
        """The block at work in this thread."""
        here = get_ident()
        return next((invoke for invoke in self.invokes if invoke.coroutine.thread == here), self)

    def wait(self, question: Question | None) -> None:
        if self.invokes:
            super().wait(question)
        else:  # this block is alone, and always the next: without asking who is, a read takes two thirds of the time
            Block.wait(self, question)

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
        """To the nearest point that a block waits for. False if none waits."""
        waits = [block.waits for block in (*self.invokes, self) if block.waits is not None]
        if any(not one.others for one in waits):
            self.batch.merge_edits()
            self.run.wait(tuple(one.question for one in waits if one.question is not None))
        elif waits:
            others = "; ".join(one.others for one in waits)
            waits[0].failure = OutOfOrderError(f"No order lets all blocks go on: {others}, which waits as well.")
        return bool(waits)

    def _start(self) -> None:
        """All blocks are known: begin.

        Raises:
            UsageError: if an invoke has no block.
            InputError: if their inputs cannot be joined.
        """
        for invoke in self.invokes:
            if invoke.function is None:
                raise UsageError(
                    f"tracer.invoke(...) at {invoke.line} has no block: write `with tracer.invoke(...):`, or give "
                    "a function, tracer.invoke(prompt, function)."
                )
        with_inputs = [invoke for invoke in self.invokes if invoke.inputs is not None]
        if with_inputs:
            assert self._joining is not None
            call, rows = self._joining.join([invoke.inputs for invoke in with_inputs])
            if not self.run.started:  # a run that has been stopped needs no call any more
                self.run.call = call
            for invoke, mine in zip(with_inputs, rows, strict=True):
                invoke.rows = mine
            self.run.replace(self.batch, 0)
        self.started = True

    # Names.

    def look_up(self, invoke: Invoke, name: str) -> Any:
        """What a name means in a block that has not bound it itself: what an earlier block has bound, or a later one,
        which is waited for; else what it meant in the frame when the block was captured."""
        body = invoke.body
        assert body is not None
        index = self.invokes.index(invoke)
        others = self.invokes[:index][::-1]
        if name not in body.binds or name not in body.outer:
            others += self.invokes[index + 1 :]
        for other in others:
            if other.body is None or other.body.frame is not body.frame or name not in other.body.binds:
                continue
            if not other.done and name not in other.names:
                where = f"{name!r}, needed at {user_line()}, is bound by the block at {other.line}"
                self.block_here().let_others_go_on(
                    Waiting(lambda: other.done or name in other.names, where)  # noqa: B023
                )
            if name in other.names:
                return other.names[name]
        return body.look_up(name)

    # The end.

    def complete(self) -> None:
        """Let the others come to their ends, and bind what they have bound."""
        waited_for = [invoke for invoke in self.invokes if not invoke.lasting]
        if waited_for:
            self.go_on(lambda: all(invoke.done for invoke in waited_for))
        for invoke in self.invokes:
            lost = invoke.lasting and invoke.coroutine.lost
            if (error := invoke.coroutine.error) is not None and not lost:
                raise error  # also one that was raised in the trace's own body before, and caught there
        for invoke in self.invokes:
            if invoke.body is not None:
                invoke.body.bind(invoke.names.bound())
        super().complete()

    def dismiss(self) -> None:
        """End the forward pass and whatever block is still there; wait until all are gone."""
        try:
            super().dismiss()
        finally:
            for invoke in self.invokes:
                invoke.coroutine.cancel()

    def forget(self) -> None:
        """Drop what the blocks hold: they and this hold each other, and would keep it until Python looks for cycles.

        A function that a block has defined keeps its names: what the blocks have bound is what they mean from now on.
        """
        bound: dict[FrameType, dict[str, Any]] = {}
        captured = [(invoke.body, invoke.names) for invoke in self.invokes if invoke.body is not None]
        for body, names in captured:
            bound.setdefault(body.frame, {}).update(names.bound())
        for body, names in captured:
            body.outer |= bound[body.frame]
            body.forget()
            names.look_up = body.look_up
        for invoke in self.invokes:
            invoke.forget()
        self.invokes, self.batch.views = [], {}
        super().forget()
