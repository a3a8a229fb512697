"""`tracer.invoke`: a block with inputs of its own, taken out of the user's frame; and barriers between such blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from nnatomy.core.blocks.capture import Body, Names
from nnatomy.core.blocks.ensemble import Ensemble
from nnatomy.core.blocks.member import Member
from nnatomy.core.frames import frame_of_with, hide_our_frames
from nnatomy.core.threads.interrupts import Cancelled
from nnatomy.core.threads.worker import ThreadState
from nnatomy.errors import UsageError


class Invoke(Member):
    """`with tracer.invoke(prompt):`, or `tracer.invoke(prompt, function)`.

    Attributes:
        value: what `function` returned, once the trace is over.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        inputs: Any,
        function: Callable[[], Any] | None,
        lasting: bool = False,
    ) -> None:
        super().__init__(ensemble, lasting)
        self.inputs = inputs
        self.function = function
        self.body: Body | None = None
        self.names = Names(lambda name: ensemble.look_up(self, name))
        self.value: Any = None
        self._state = ThreadState()
        if function is not None:
            self._join()
        else:
            ensemble.without_block.append(self)

    def _join(self) -> None:
        if self.ensemble.started or self.ensemble.run.started:
            raise UsageError(
                "tracer.invoke has to come before the first value is asked for: the forward pass, which runs all "
                "prompts together, has begun."
            )
        self.ensemble.invokes.append(self)

    def __enter__(self) -> Invoke:
        if self.function is not None:
            raise UsageError(
                "tracer.invoke(prompt, function) is no `with`: it has its block in the function."
            )
        self.ensemble.without_block.remove(self)
        self.body = Body(frame_of_with())
        self._join()
        self.body.skip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self.body is not None
        return self.body.left(kind)

    def work(self) -> tuple[bool, Callable[[], None]]:
        """What its thread does."""
        ensemble = self.ensemble
        if not self.begin():
            return True, lambda: None
        try:
            self.at_work.begin()
            if ensemble.over:
                raise Cancelled
            try:
                self._state.call(self._run)
            finally:
                self.at_work.end()
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001
            ensemble.fail(hide_our_frames(error))
        self.at_work.end()  # again: a Cancelled may have come just before it
        try:
            self.settle()
        except BaseException as error:  # noqa: BLE001
            ensemble.fail(error)
        self.done = True
        self.want = self.waits_for = None
        if ensemble.turn is not self:  # the caller is gone, see `_sleep`
            return True, lambda: None
        try:
            following = ensemble.next()
        except BaseException as error:  # noqa: BLE001
            ensemble.fail(error)
            following = ensemble.caller
        return True, partial(ensemble.hand_over, following)

    def _run(self) -> None:
        thread = self.thread = self.ensemble.blocks.add(self)
        try:
            if self.function is not None:
                self.value = self.function()
            else:
                assert self.body is not None
                self.body.run(self.names)
        finally:
            self.ensemble.blocks.remove(self, thread)
            self.thread = 0  # which another block may have next

    def forget(self) -> None:
        """The trace is over."""
        self.inputs = self.function = self.body = self.job = None
        del self.names

    def bind(self) -> None:
        """Bind in the user's frame what the block has bound."""
        if self.body is not None and (names := self.names.own()):
            self.body.bind(names)


class Barrier:
    """`tracer.barrier(n)`: a block that calls it goes on when `n` blocks have."""

    def __init__(self, ensemble: Ensemble, count: int) -> None:
        self._ensemble = ensemble
        self._count = count
        self._waiting: list[Member] = []

    def __call__(self) -> None:
        member = self._ensemble.blocks.current("barrier")
        if not isinstance(member, Member):
            raise UsageError("A barrier holds blocks of tracer.invoke(...): call it inside of one.")
        self._waiting.append(member)
        if len(self._waiting) == self._count:
            for other in self._waiting:
                other.at_barrier = False
            self._waiting = []
            return
        member.at_barrier = True
        member.halt()
