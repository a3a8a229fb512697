"""`tracer.invoke`: several blocks on one forward pass, each with inputs of its own, and whose turn it is.

Each block of `tracer.invoke` is a coroutine on a thread of its own, as the forward pass is one, and has rows of its own in the
joined batch. The thread that opened the trace owns them all, and alone decides who is next: a block that can go on, in
the order in which they were given; else the trace's own body, if it can; else the forward pass, to the nearest point
that any of them waits for. So there is exactly one thread at work at any time.
"""

from collections.abc import Callable
from functools import partial
from threading import get_ident
from types import FrameType
from typing import Any

from nnatomy.blocks.capture import Body, Names
from nnatomy.blocks.joining import Joining
from nnatomy.blocks.shared_block import Batch, SharedBlock, Waiting
from nnatomy.core.block import Block
from nnatomy.core.coroutine import Coroutine
from nnatomy.core.frames import user_line
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Question
from nnatomy.core.run import Run
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import OutOfOrderError, UsageError


class Schedule(SharedBlock):
    """The trace's own body, and the others that share its run.

    Attributes:
        invokes: the others, in their order.
        joining: how their inputs become those of one call, where the trace has none of its own.
        started: whether all blocks are known, and their inputs are joined.
    """

    def __init__(self, run: Run, blocks: OpenBlocks) -> None:
        super().__init__(run, Batch(run))
        self.blocks = blocks
        self.joining: Any = run.call if isinstance(run.call, Joining) else None
        self.invokes: list[Invoke] = []
        self.started = False

    def block_here(self) -> SharedBlock:
        """The block at work in this thread."""
        here = get_ident()
        return next((invoke for invoke in self.invokes if invoke.coroutine.interruptible.thread == here), self)

    def wait(self, question: Question | None) -> None:
        if self.invokes:
            super().wait(question)
        else:  # this block is alone, and always the next: without asking who is, a read takes two thirds of the time
            Block.wait(self, question)

    # Whose turn it is: all of this in the thread that opened the trace.

    def _give_way(self) -> None:
        """Let the other blocks, and the forward pass, go on until this one can.

        Raises:
            OutOfOrderError: if nobody can go on.
        """
        if not self.started:
            self._start()
        try:
            while True:
                ready = next((invoke for invoke in self.invokes if not invoke.done and invoke.is_ready), None)
                if ready is not None:
                    ready.coroutine.resume()
                    if (error := ready.coroutine.error) is not None:
                        raise error
                elif self.is_ready:
                    return
                else:
                    self._let_the_model_go_on()
        except BaseException:
            self.dismiss()
            raise

    def _let_the_model_go_on(self) -> None:
        """To the nearest point that a block waits for."""
        waits = [block.waits for block in (*self.invokes, self) if block.waits is not None]
        if all(one.others for one in waits):
            others = "; ".join(one.others for one in waits)
            raise OutOfOrderError(f"No order lets all blocks go on, as they wait for each other: {others}.")
        self.batch.merge_edits()
        self.run.wait(tuple(one.question for one in waits if one.question is not None))

    def _start(self) -> None:
        """All blocks are known: begin.

        Raises:
            InputError: if their inputs cannot be joined.
        """
        with_inputs = [invoke for invoke in self.invokes if invoke.inputs is not None]
        if with_inputs:
            call, rows = self.joining.join([invoke.inputs for invoke in with_inputs])
            if not self.run.started:  # a run that has been stopped needs no call any more
                self.run.call = call
            for invoke, mine in zip(with_inputs, rows, strict=True):
                invoke.rows = mine
            self.run.replace(self.batch, 0)
        self.started = True

    # Names.

    def look_up(self, invoke: "Invoke", name: str) -> Any:
        """What a name means in a block that has not bound it itself: what an earlier block has bound, or a later one,
        which is waited for; else what it meant in the frame when the block was captured."""
        body: Any = invoke.body
        index = self.invokes.index(invoke)
        others = self.invokes[:index][::-1]
        if name not in body.binds or name not in body.outer:
            others += self.invokes[index + 1 :]
        for other in others:
            if other.body is None or other.body.frame is not body.frame or name not in other.body.binds:
                continue
            if not other.done and name not in other.names:
                where = f"{name!r}, needed at {user_line()}, is bound by the block at {other.line}"
                self.block_here().let_others_go_on(Waiting(lambda: other.done or name in other.names, where))  # noqa: B023
            if name in other.names:
                return other.names[name]
        return body.look_up(name)

    # The end.

    def complete(self) -> None:
        """Let the others come to their ends, and bind what they have bound."""
        waited_for = [invoke for invoke in self.invokes if not invoke.lasting]
        if waited_for:
            self.let_others_go_on(Waiting(lambda: all(one.done for one in waited_for), "the trace's end waits for all"))
        for invoke in self.invokes:
            if (error := invoke.coroutine.error) is not None and not (invoke.lasting and invoke.coroutine.lost):
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


class Invoke(SharedBlock):
    """`with tracer.invoke(prompt):`, or `tracer.invoke(prompt, function)`.

    Attributes:
        value: what `function` returned, once the trace is over.
        function: what the block runs; None until its `with` is entered, if it has one.
        lasting: whether it stays in the background: the trace does not wait for its end.
        body: that of its `with`, if it has one.
        names: those of the body.
    """

    def __init__(
        self, schedule: Schedule, inputs: Any, function: Callable[[], Any] | None, lasting: bool = False
    ) -> None:
        super().__init__(schedule.run, schedule.batch)
        if schedule.started or self.run.started:
            raise UsageError(
                "tracer.invoke has to come before the first value is asked for: the forward pass, which runs all "
                "prompts together, has begun."
            )
        self.schedule = schedule
        self.line = user_line()
        self.inputs = inputs
        self.function = function
        self.lasting = lasting
        self.body: Body | None = None
        self.names = Names(partial(schedule.look_up, self))
        self.value: Any = None
        self.coroutine = Coroutine(self._work, ThreadState())
        self.coroutine.owner = self.run.owner
        schedule.invokes.append(self)

    def __enter__(self) -> "Invoke":
        if self.function is not None:
            raise UsageError(
                "This block has its body: tracer.invoke(prompt, function) is no `with`, and any other is entered once."
            )
        self.body = Body()
        self.function = partial(self.body.run, self.names)
        self.body.skip()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool | None:  # to a type checker the body runs
        assert self.body is not None
        return self.body.left(kind)

    def _work(self) -> None:
        if self.function is None:
            raise UsageError(
                f"tracer.invoke(...) at {self.line} has no block: write `with tracer.invoke(...):`, or give "
                "a function, tracer.invoke(prompt, function)."
            )
        self.schedule.blocks.add(self)
        try:
            self.value = self.function()
            self.note_edits()
        finally:
            self.schedule.blocks.remove(self)

    @property
    def done(self) -> bool:
        """Whether its body is over."""
        return self.coroutine.ended

    def _give_way(self) -> None:
        self.coroutine.suspend()

    def forget(self) -> None:
        """The trace is over."""
        self.inputs = self.function = self.body = None
        self.coroutine.forget()
        del self.names


class Barrier:
    """`tracer.barrier(n)`: a block that calls it goes on when `n` blocks have."""

    def __init__(self, schedule: Schedule, count: int) -> None:
        self._schedule = schedule
        self._count = count
        self._waiting: list[SharedBlock] = []

    def __call__(self) -> None:
        block = self._schedule.blocks.current("barrier")
        assert isinstance(block, SharedBlock)
        mine = self._waiting
        mine.append(block)
        if len(mine) == self._count:
            self._waiting = []
        else:
            where = f"a block stands at the barrier at {user_line()}"
            block.let_others_go_on(Waiting(lambda: mine is not self._waiting, where))
