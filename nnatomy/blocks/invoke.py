"""`tracer.invoke`: a block with inputs of its own, taken out of the user's frame; and barriers between such blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nnatomy.blocks.capture import Body, Names
from nnatomy.blocks.schedule import Schedule
from nnatomy.blocks.shared_block import SharedBlock, Waiting
from nnatomy.core.coroutine import Coroutine
from nnatomy.core.frames import user_line
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import UsageError


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

    def __enter__(self) -> Invoke:
        if self.function is not None:
            raise UsageError(
                "This block has its body: tracer.invoke(prompt, function) is no `with`, and any other is entered once."
            )
        self.body = Body()
        self.function = partial(self.body.run, self.names)
        self.body.skip()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        assert self.body is not None
        return self.body.left(kind)

    def _work(self) -> None:
        assert self.function is not None
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
