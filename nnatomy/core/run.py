"""A run: one call of the model in a worker thread, which stands still where a block asks for a value.

Exactly one thread is ever at work: the worker, or the one block that it has handed over to. The
worker parks in a module's gate (see `gates`) while a block holds the point, and goes on when that
block asks for the next one. This is the model's side; `block` is the user's, `points` the words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock, get_ident
from types import TracebackType
from typing import Any

from torch.nn import Module
from torch.overrides import TorchFunctionMode

from nnatomy.core.gates import module_call, put_gates, remove_gates, runs
from nnatomy.core.points import Collector, Slot, Waiter
from nnatomy.core.worker import ThreadState, Worker


class Cancelled(BaseException):
    """Ends a forward pass nobody needs any more; seen by the model's code alone."""


class Run:
    """One call of the model, from the first question of a block to its end.

    Args:
        root: the module whose calls are the steps.
        call: what to run in the worker.
        state: the thread state to run it with.
    """

    def __init__(self, root: Module, call: Callable[[], Any], state: ThreadState) -> None:
        self.root = root
        self.result: Any = None
        self.has_result = False
        #: Whether somebody still wants what comes after the block's end.
        self.run_to_end = False
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None
        self.started = self.ended = self.cancelled = False
        self.step = 0
        #: How often each module has been called in this step.
        self.entered: dict[Module, int] = {}
        #: The calls in flight, outermost first.
        self.stack: list[tuple[Module, int]] = []
        #: The modules where the forward pass has to stop and look.
        self.watched: set[Module] = set()
        self.blocks: list[Waiter] = []
        self.collectors: list[Collector] = []
        self._call: Callable[[], Any] | None = call
        self._state: ThreadState | None = state
        self._modes: list[tuple[tuple[Module, int], str, TorchFunctionMode]] = []
        self._tapped: set[tuple[Module, int, str]] = set()
        self._gated: list[Module] = []
        self._wake = Lock()
        self._wake.acquire()
        self._done = Lock()
        self._ident = 0
        self._interruptible = Lock()
        self._in_model = self._parked = False

    # What the threads of blocks call.

    def resume(self) -> None:
        """Let the forward pass go on, or start."""
        if self.started:
            self._wake.release()
        else:
            self.started = True
            self._done.acquire()
            self._gated = put_gates(self.root)
            self._worker = Worker.start(self._work)

    def watch(self) -> None:
        """Look again which modules anybody waits for."""
        self.watched = {block.want.module for block in self.blocks if block.want is not None}
        for collector in self.collectors:
            self.watched |= collector.modules

    def finish(self) -> None:
        """Let the forward pass run to its end and wait for it. The caller holds the baton."""
        if not self.ended:
            self.resume()
            self._done.acquire()
            self._done.release()

    def cancel(self) -> None:
        """End the forward pass where it stands and wait until it is gone."""
        self._call = self._state = None
        if self.ended or not self.started:
            self.ended = True
            return
        self.cancelled = True
        with self._interruptible:
            if self._in_model and not self._parked:  # interrupted while the model was at work
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._ident), ctypes.py_object(Cancelled)
                )
        if self._wake.locked():
            self._wake.release()
        self._done.acquire()
        self._done.release()

    def forget(self) -> None:
        """Drop what the run holds, so that nothing but the user's names keeps a tensor alive."""
        self.error = self.traceback = None
        self.collectors = []

    def in_flight(self, module: Module, call: int) -> bool:
        return (module, call) in self.stack

    def has_passed(self, module: Module, kind: str, call: int, step: int) -> bool:
        """Whether that point can no longer be reached (it may be the one just reached)."""
        if self.ended or step != self.step:
            return self.ended or step < self.step
        if call >= self.entered.get(module, 0):
            return False
        if kind == "input" or not self.in_flight(module, call):
            return True
        return kind != "output" and (module, call, kind) in self._tapped

    # What the worker calls.

    def _work(self) -> Callable[[], None]:
        self._ident = get_ident()
        runs[self._ident] = self
        call, state = self._call, self._state
        self._call = self._state = None
        assert call is not None
        assert state is not None
        try:
            self._in_model = True
            try:
                self.result = state.call(call)
                self.has_result = True
            finally:
                with self._interruptible:
                    self._in_model = False
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the block waits
            if not (self.cancelled and _comes_of_cancelling(error)):
                self.error = error
                self.traceback = _without_our_frames(error.__traceback__)
        finally:
            del call, state
            runs.pop(self._ident, None)
            remove_gates(self._gated)
            self._gated = []
            self.entered.clear()
            self.stack.clear()
            self._modes.clear()
            self.ended = True
        return self._tell_ended

    def _tell_ended(self) -> None:
        self._done.release()
        for block in self.blocks:
            block.run_ended()

    def enter(self, module: Module, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a watched module: inputs first, then its own call, or what is put in its place."""
        slot = self.arrive(module, "input", call, (args, kwargs))
        if slot.skipped:
            return slot.instead
        args, kwargs = slot.value
        del slot
        return module_call(module, *args, **kwargs)

    def leave(self, in_flight: tuple[Module, int]) -> None:
        """A call is over, or was left by an exception."""
        stack = self.stack
        while stack and stack.pop() is not in_flight:
            pass
        while self._modes and self._modes[-1][0] is in_flight:
            self._modes.pop()[2].__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def arrive(self, module: Module, kind: str, call: int, value: Any) -> Slot:
        """The forward pass is at a point of a watched module: let everybody look at it who waits for it."""
        if self.cancelled:
            raise Cancelled
        slot = Slot(module, kind, call, self.step, value)
        while block := self._waiting_for(slot):
            self._hand_over(block, slot)
        for collector in self.collectors:
            if module in collector.modules and kind in collector.kinds:
                collector.take(slot)
        if not slot.skipped:
            self._enter_taps()
        return slot

    def end_step(self) -> None:
        """A call of the root is over: what was asked for in this step and has not come will not come."""
        for block in self.blocks:
            while block.want is not None and block.want.step <= self.step:
                self._hand_over(block, None)
        self.step += 1
        self.entered.clear()
        self._tapped.clear()

    def _waiting_for(self, slot: Slot) -> Waiter | None:
        for block in self.blocks:
            want = block.want
            if want is None or want.module is not slot.module or want.step != slot.step:
                continue
            if want.call == slot.call:
                if want.kind == slot.kind:
                    return block
                if slot.kind == "output":  # its tap has found nothing in the whole call
                    self._hand_over(block, None)
                    return self._waiting_for(slot)
        return None

    def _hand_over(self, block: Waiter, slot: Slot | None) -> None:
        self._parked = True
        block.take(slot)
        self._wake.acquire()
        self._parked = False
        if self.cancelled:
            raise Cancelled

    def _enter_taps(self) -> None:
        """Put on the modes of the taps that are waited for inside the calls in flight.

        A tap asked for while its module is in flight goes on top of whatever modes the model's own
        code has entered since; should that code leave one of them before the module is done, torch
        pops ours instead, and the point comes as not reached.
        """
        wanted = [
            (block.want.module, block.want.kind, block.want.tap)
            for block in self.blocks
            if block.want is not None and block.want.tap is not None
        ]
        wanted += [
            (module, kind, tap)
            for collector in self.collectors
            for kind, tap in collector.kinds.items()
            if tap is not None
            for module in collector.modules
        ]
        if not wanted:
            return
        for in_flight in self.stack:
            for module, kind, tap in wanted:
                if in_flight[0] is module and not any(
                    m[0] is in_flight and m[1] == kind for m in self._modes
                ):
                    mode = tap(module, self._visitor(in_flight, kind))
                    self._modes.append((in_flight, kind, mode))
                    mode.__enter__()  # type: ignore[no-untyped-call]

    def _visitor(self, in_flight: tuple[Module, int], kind: str) -> Callable[[Any], Slot]:
        def visit(value: Any) -> Slot:
            self._tapped.add((*in_flight, kind))
            return self.arrive(in_flight[0], kind, in_flight[1], value)

        return visit


def _comes_of_cancelling(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Cancelled):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of `nnatomy.core`, which stand between every two modules."""
    kept = []
    while traceback is not None:
        if not traceback.tb_frame.f_globals.get("__name__", "").startswith("nnatomy.core."):
            kept.append(traceback)
        traceback = traceback.tb_next
    for this, following in zip(kept, [*kept[1:], None], strict=True):
        this.tb_next = following
    return kept[0] if kept else None
