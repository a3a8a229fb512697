"""Several blocks on one forward pass.

Each block of `tracer.invoke` runs in a thread of its own, and has rows of its own in the joined batch. Of all threads, the
forward pass's and the caller's too, exactly one is ever at work. Whoever comes to a halt decides who is next: a
block that can go on; else one that waits for the point where the forward pass stands; else the forward pass
goes on to the nearest point that any of them waits for.

A hand-over is one assignment, of `Ensemble.turn`; the locks only wake those who sleep, and may do so once too often. So
whenever Ctrl-C comes to the caller it is known whether it or another one is at work. If another, the caller has
it end, and waits for its own turn before it goes on. What decides in a block's thread is never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from nnatomy.core.block import OpenBlocks
from nnatomy.core.blocks.joining import Joining
from nnatomy.core.blocks.member import END, Given, Member
from nnatomy.core.frames import user_line
from nnatomy.core.run import OWNER_SECONDS, PATIENCE_SECONDS, Run
from nnatomy.core.threads.interrupts import Cancelled
from nnatomy.core.threads.openmp import release_helpers
from nnatomy.core.threads.worker import HELPERS_SECONDS, Worker, wait_for
from nnatomy.errors import OutOfOrderError, UsageError

if TYPE_CHECKING:
    from nnatomy.core.blocks.invoke import Invoke


class Ensemble:
    """The blocks on one run, and whose turn it is."""

    def __init__(self, run: Run, blocks: OpenBlocks, joining: Joining | None) -> None:
        self.run = run
        self.blocks = blocks
        self._joining = joining
        self.caller = Member(self)
        self.invokes: list[Invoke] = []
        self.given = Given(run.root)
        #: Those given with no function, whose `with` has not been entered yet.
        self.without_block: list[Invoke] = []
        self.started = False
        #: Who is at work. To assign it is to hand over.
        self.turn: Member = self.caller
        #: How often the forward pass has been let go on. Only that brings a point, so each wait is looked at once a time.
        self.moves = 0
        #: Whether the caller's block is over, and waits for the others.
        self.ending = False
        #: Whether all blocks are to end, wherever they are.
        self.over = False
        self.error: BaseException | None = None

    def member_here(self) -> Member:
        """The block at work in this thread."""
        here = get_ident()
        return next((member for member in self.invokes if member.thread == here), self.caller)

    # Whose turn it is.

    def give_way(self, member: Member) -> None:
        """The member, at work until now, waits for something: let all others go on until it can."""
        if not self.started:
            self.start()
        if self.run.lost:
            assert self.run.error is not None
            raise self.run.error
        if member is self.caller:
            try:
                self.hand_over(self.next())
                self._sleep(member)
            except BaseException:  # Ctrl-C
                self.dismiss(at_once=True)
                raise
            if self.error is not None and not self.ending:
                raise self.error
            return
        member.at_work.end()
        release_helpers()
        try:
            self.hand_over(self.next())
            self._sleep(member)
        finally:
            member.at_work.begin()
        if self.over:
            raise Cancelled

    def hand_over(self, following: Member) -> None:
        if following is self.turn:
            return
        self.turn = following
        try:
            following.wake()
        except RuntimeError as error:  # no more threads to be had
            self.fail(error)
            self.turn = self.caller
            self.caller.wake()

    def _sleep(self, member: Member) -> None:
        while self.turn is not member:
            if member is self.caller:
                patience = 0.0 if Worker.was_long else HELPERS_SECONDS
                came = wait_for(member.alarm, OWNER_SECONDS, patience)
            else:  # it has no helpers left to give up
                came = member.alarm.acquire(timeout=OWNER_SECONDS)
            if not came and self.run.owner() is None:
                self.over = True  # the caller was interrupted before it could say so
                raise Cancelled

    def _recall(self, at_once: bool = False) -> None:
        """Have the block that is at work end, and wait until it is the caller's turn.

        Args:
            at_once: interrupt it, rather than let it come to a halt.
        """
        self.over = True
        while (at_work := self.turn) is not self.caller and not self.run.lost:
            if at_work.keep_from_beginning():
                self.turn = self.caller
                return
            at_work.wake()  # Ctrl-C may have come just before that
            if at_once:
                self.run.interrupt()
                at_work.at_work.interrupt()
            at_once = not wait_for(self.caller.alarm, PATIENCE_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Have all blocks end, and the caller raise this."""
        if not self.over:
            self.error, self.over = error, True

    def next(self) -> Member:
        """Whose turn it is next."""
        run = self.run
        everybody = [*self.invokes, self.caller]
        while True:
            if self.over:
                for invoke in self.invokes:
                    invoke.keep_from_beginning()
                return next((invoke for invoke in self.invokes if not invoke.done), self.caller)
            for member in everybody:
                if self._can_go_on(member):
                    return member
            if self.ending and all(member.done or member.lasting for member in self.invokes):
                return self.caller
            wants = [member.want for member in everybody if member.want is not None]
            if not wants:
                stuck = [member for member in everybody if member.waits_for or member.at_barrier]
                if not stuck:
                    return self.caller
                stuck[0].failure = _deadlock(stuck)
                stuck[0].waits_for, stuck[0].at_barrier = None, False
                return stuck[0]
            self.moves += 1
            run.wait(tuple(want for want in wants if want.kind != END))

    def _can_go_on(self, member: Member) -> bool:
        if member.done:
            return False
        if member.want is not None:
            if member.looked_at == self.moves:
                return False
            member.looked_at = self.moves
            (module, kind, call, step, _, _), run, here = member.want, self.run, self.run.here
            if kind == END or run.ended:
                come = run.ended
            elif here is None:
                come = run.started and (step <= run.step or run.has_passed(module, kind, call, step))
            elif here.is_at(module, here.kind, call, step):
                come = here.kind in (kind, "output")
            else:
                come = run.has_passed(module, kind, call, step)
            if come:
                member.want = None
            return come
        if member.waits_for is not None:
            name, binder, _ = member.waits_for
            if binder.done or name in binder.names:
                member.waits_for = None
            return member.waits_for is None
        return not member.at_barrier and member is not self.caller

    # Names.

    def look_up(self, invoke: Invoke, name: str) -> Any:
        """What a name means in a block, that the block itself has not bound."""
        body = invoke.body
        assert body is not None
        place = self.invokes.index(invoke)
        others = self.invokes[:place][::-1]
        if name not in body.binds or name not in body.names:
            others = others + self.invokes[place + 1 :]
        for other in others:
            if other.body is not None and other.body.frame is body.frame and name in other.body.binds:
                if not other.done and name not in other.names:
                    member = self.member_here()  # a function that the block has defined may be called in any
                    member.waits_for = name, other, user_line()
                    member.halt()
                if name in other.names:
                    return other.names[name]
        if name in body.names:
            return body.names[name]
        return body.frame.f_globals[name]  # KeyError: a builtin, or nothing

    # From the first question to the end.

    def start(self) -> None:
        """All blocks are known: begin.

        Raises:
            UsageError: if an invoke has no block.
            InputError: if their inputs cannot be joined.
        """
        for invoke in self.without_block:
            raise UsageError(
                f"tracer.invoke(...) at {invoke.line} has no block: write `with tracer.invoke(...):`, or give "
                "a function, tracer.invoke(prompt, function)."
            )
        with_inputs = [invoke for invoke in self.invokes if invoke.inputs is not None]
        if with_inputs:
            assert self._joining is not None
            call, rows = self._joining.join([invoke.inputs for invoke in with_inputs])
            self.run.call_instead(call)
            for invoke, mine in zip(with_inputs, rows, strict=True):
                invoke.rows = mine
            self.run.replacements.append(self.given)
        self.started = True
        if Worker.was_long:
            release_helpers()  # the caller's
        for invoke in self.invokes:
            invoke.job = invoke.work

    def end(self) -> None:
        """The caller's block is over: let the others come to their ends, and bind what they have bound."""
        self.caller.settle()
        self.ending = True
        if self.without_block or not all(member.lasting for member in self.invokes):
            self.give_way(self.caller)
        self.ending = False
        if self.error is not None:
            raise self.error
        for invoke in self.invokes:
            invoke.bind()

    def forget(self) -> None:
        """Drop what the blocks hold: they and this hold each other, and would keep it until Python looks for cycles."""
        for invoke in self.invokes:
            if invoke.body is not None and invoke.body.makes_functions:
                invoke.names.look_up = self._look_up_after(invoke)
        for invoke in self.invokes + self.without_block:
            invoke.forget()
        self.invokes, self.without_block, self.error = [], [], None

    def _look_up_after(self, invoke: Invoke) -> Callable[[str], Any]:
        """What names mean in a function that a block has defined, when the trace is over (see `look_up`)."""
        body, place = invoke.body, self.invokes.index(invoke)
        assert body is not None
        names, global_names = dict(body.names), body.frame.f_globals
        for other in self.invokes[:place:-1] + self.invokes[:place]:
            if other.body is not None and other.body.frame is body.frame:
                names |= other.names.own()
        return lambda name: names[name] if name in names else global_names[name]

    def dismiss(self, at_once: bool = False) -> None:
        """End the forward pass and whatever block is still there; wait until all are gone."""
        if self.run.lost:  # and with it the blocks' threads
            return
        self._recall(at_once)
        self.run.cancel()
        self.hand_over(self.next())
        self._recall()


def _deadlock(stuck: list[Member]) -> OutOfOrderError:
    waits = [
        f"{member.waits_for[0]!r}, needed at {member.waits_for[2]}, is bound by the block at {member.waits_for[1].line}"
        if member.waits_for
        else f"the block at {member.line} stands at a barrier"
        for member in stuck
    ]
    return OutOfOrderError(f"No order lets all blocks go on: {'; '.join(waits)}, which waits as well.")
