"""A run: one call of the model in a worker thread, which stands still where the block asks for a value.

Exactly one of two threads is ever at work: the worker, or the block that it has handed over to. The
worker parks in a module's gate (see `gates`) while the block holds the point, and goes on when the
block asks for the next one. This is the model's side; `block` is the user's, `points` the words.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, get_ident
from time import monotonic
from types import CodeType, TracebackType
from typing import Any, NamedTuple
from weakref import ref

from torch._C import _functorch
from torch.nn import Module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from nnatomy.core.frames import hide_our_frames
from nnatomy.core.gates import has_gate, modules_seen, put_gates, remove_gates, runs
from nnatomy.core.nesting import Observer, callers_in
from nnatomy.core.points import Axes, Collector, Slot, Tap, Want
from nnatomy.core.recompute import Unedited, is_recomputed
from nnatomy.core.threads.interrupts import Cancelled, Interruptible
from nnatomy.core.threads.openmp import release_helpers
from nnatomy.core.threads.worker import HELPERS_SECONDS, ThreadState, Worker, wait_for
from nnatomy.errors import OutOfOrderError, OutsideTraceError, UsageError

#: How long an interrupted block waits, when interrupted again, for a model that catches everything.
PATIENCE_SECONDS = 1.0

#: How often a parked forward pass looks whether its block is still there.
OWNER_SECONDS = 1.0


class Run:
    """One call of the model, from the first question of its block to its end.

    Args:
        root: the module whose calls are the steps.
        whole: the module whose submodules can be asked for: `root`, or what wraps it.
        call: what to run in the worker.
        state: the thread state to run it with.
    """

    def __init__(self, root: Module, whole: Module, call: Callable[[], Any], state: ThreadState) -> None:
        self.root = root
        self.whole = whole
        #: What is gone when the block's `with` has been left. If Ctrl-C comes just before its end, or in it, nobody else
        #: cancels the run.
        self.owner: ref[Any] = ref(self)
        self.result: Any = None
        self.has_result = False
        #: Whether somebody still wants what comes after the block's end.
        self.run_to_end = False
        #: Whether the block may yet ask for any module. If not, only the watched ones need a gate.
        self.open_to_questions = True
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None
        self.started = self.ended = self.cancelled = False
        #: Whether this process is a fork of the one whose thread is at work on it.
        self.lost = False
        #: The points the blocks wait for, while they wait; the slot they have been given, while they hold it.
        self.wants: tuple[Want, ...] = ()
        self.here: Slot | None = None
        #: The point that was reached last, and the code and instruction that asked for it.
        self.last: tuple[Want, CodeType, int] | None = None
        self.step = 0
        #: How often each module has been called in this step.
        self.entered: dict[Module, int] = {}
        #: Whether modules within the root were called, and the root itself never.
        self.only_within = False
        #: The calls in flight, outermost first.
        self.stack: list[tuple[Module, int]] = []
        #: The modules at whose inputs, and at whose outputs, the forward pass has to stop and look.
        self.watched_inputs: set[Module] = set()
        self.watched_outputs: set[Module] = set()
        self.collectors: list[Collector] = []
        #: Those that put another value in the place of this one, before any block sees it, and modules that they bring.
        self.replacements: list[Collector] = []
        self.guests: list[Module] = []
        self.arriving: list[Slot] = []  # where they are at work, and no block has been yet
        #: The modes of the taps that are on, outermost call first: (depth in the stack, tap, mode).
        self.modes: list[tuple[int, Tap, TorchFunctionMode]] = []
        self._taps: list[tuple[Module, str, Tap]] = []  # those waited for
        self._tapped: set[tuple[Module, int, str]] = set()
        #: The modules with a gate; who calls those that may have none (see `nesting`), and the callers of those without.
        self._gated: list[Module] = []
        self._callers: dict[Module, Module] = {}
        self._closed: set[Module] = set()
        #: Those that have got their gate in this step after their caller was called, whose calls are a guess.
        self._uncounted: set[Module] = set()
        self._observer: Observer | None = None
        self._job: tuple[ThreadState, Callable[[], Any]] | None = (state, call)
        self._begin = Lock()  # taken by the worker when it begins, or else by `cancel`
        self._wake, self._answered, self._done = Lock(), Lock(), Lock()
        self._wake.acquire()  # released to let the parked worker go on
        self._answered.acquire()  # released to let the block go on
        self._done.acquire()  # released when the worker is through
        self._records_gradients, self._transforms = state.grad, len(state.transforms)
        self._ident = 0
        self._began = 0.0  # when the worker did
        self._in_model = Interruptible()
        self._waiting = self._parked = self._cancelling = False

    # What the block's thread calls.

    def wait(self, wants: tuple[Want, ...]) -> None:
        """Let the forward pass go on (or start) until it is at one of those points, cannot come to one, or ends."""
        self.here, self.wants, self._waiting = None, wants, True
        if self.ended:  # nobody will answer
            self.wants, self._waiting = (), False
            return
        self.watch()
        if sys.is_finalizing():
            raise OutsideTraceError(
                "Python is shutting down, and runs no other thread any more: a model cannot be traced now. Trace it "
                "before the script ends, not in a __del__ or a callback at its end."
            )
        try:
            # If the last one was long, then this one will be, most likely.
            long = monotonic() - self._began > HELPERS_SECONDS if self.started else Worker.was_long
            if long:
                release_helpers()
            if self.started:
                self._parked = False
                self._wake.release()
            else:
                self.started, self._began = True, monotonic()
                Worker.start(self._work)
            wait_for(self._answered, patience=0.0 if long else HELPERS_SECONDS)
        except BaseException:  # Ctrl-C
            self.cancel()
            raise

    def watch(self) -> None:
        """Look again which modules anybody waits for."""
        inputs: set[Module] = set()
        outputs: set[Module] = set()
        self._taps = []
        for want in self.wants:
            if want.kind != "output":
                inputs.add(want.module)
            if want.kind != "input":
                outputs.add(want.module)
            if want.tap is not None:
                self._taps.append((want.module, want.kind, want.tap))
        if self.collectors or self.replacements:
            for collector in (*self.replacements, *self.collectors):
                if collector.kinds.keys() != {"output"}:
                    inputs |= collector.modules
                if "output" in collector.kinds:
                    outputs |= collector.modules
                for kind, tap in collector.kinds.items():
                    if tap is not None:
                        self._taps += [(module, kind, tap) for module in collector.modules]
        self.watched_inputs, self.watched_outputs = inputs, outputs
        if self._closed:
            self._put_more_gates()

    def _put_gates(self) -> None:
        """Put on the gates that the pass begins with."""
        if not self.open_to_questions:
            watched = {self.root, self.whole}.union(self.watched_inputs, self.watched_outputs)
            put_gates([module for module in self.modules() if module in watched], self._gated)
            return
        modules = modules_seen(self.whole)
        callers = callers_in(self.whole, modules)
        if callers is None:
            self._observer = Observer(self.whole, modules, self.stack)
            self.collectors.append(self._observer)
            self.watch()
        elif callers:
            # `generate` calls an encoder by itself, which the root may hold, or a module that the root calls.
            outermost = {self.root, *(module for module, caller in callers.items() if caller is self.root)}
            self._callers, self._closed = callers, set(callers.values()) - outermost
            modules = [module for module in modules if callers.get(module) not in self._closed]
        put_gates(modules, self._gated)
        for guest in self.guests:
            put_gates(modules_seen(guest), self._gated)
        if self._closed:
            self._put_more_gates()

    def _put_more_gates(self) -> None:
        """Put them on, too, where what is watched lies, and what the block may ask for while the pass stands there."""
        callers, closed = self._callers, self._closed
        opened = set(closed) if self._taps else set[Module]()
        for module in (*self.watched_inputs, *(callers.get(one, one) for one in self.watched_outputs)):
            while module in callers:
                opened.add(module)
                module = callers[module]
            if module is not self.root and module is not self.whole:  # it may be called anywhere
                opened = set(closed)
        if opened := opened & closed:
            more = [module for module, caller in callers.items() if caller in opened]
            called = {module: calls for module in more if (calls := self._calls(module))}
            self.entered.update(called)
            self._uncounted.update(called)
            put_gates(more, self._gated)
            self._closed = closed - opened

    def _calls(self, module: Module) -> int:
        """How often it has been called in this step: without a gate, as often as its caller."""
        while (caller := self._callers.get(module)) in self._closed:
            module = caller
        return self.entered.get(module, 0)

    def counts(self, module: Module) -> bool:
        """Whether its calls have been counted, and are not taken to be as many as its caller's."""
        return self._callers.get(module) not in self._closed

    def sees(self, module: Module) -> bool:
        """Whether the run sees the calls of this module, or will once they are asked for."""
        return has_gate(module) or not self.counts(module)

    def call_instead(self, call: Callable[[], Any]) -> None:
        """Run this, and not what the run was made for; before it starts."""
        if self._job is not None:  # else it has been stopped, and never will start
            self._job = self._job[0], call

    def cancel(self) -> None:
        """End the forward pass where it stands and wait until it is gone."""
        if self.ended and not self._waiting:
            return
        again, self._cancelling, self.cancelled = self._cancelling, True, True
        if self._begin.acquire(blocking=False):  # it has not begun, and now will not
            self._job = None
            self._waiting = False
            self.started = self.ended = True
            return
        if sys.is_finalizing():  # no other thread will ever run again
            return
        parked = self._parked
        try:
            while True:
                if not parked:
                    self._interrupt()
                with suppress(RuntimeError):  # a block that is still at work may have woken it just now
                    self._wake.release()
                # A model that swallows the exception (`except:`) is given it again.
                if wait_for(self._done, threading.TIMEOUT_MAX if parked else PATIENCE_SECONDS) or again:
                    return
        except BaseException:  # Ctrl-C, while the model's own `finally` is at work
            self._interrupt()
            raise
        finally:
            self.here = None

    def interrupt(self) -> None:
        """End the forward pass, called by a thread that is not the one that waits for it."""
        self.cancelled = True
        self._interrupt()

    def _interrupt(self) -> None:
        """If the model is at work (the block was interrupted while it waited), raise Cancelled there."""
        if not self._parked:
            self._in_model.interrupt()

    def lose(self) -> None:
        """The process is a fork, and the worker is in the other one."""
        self.lost = self.ended = self.cancelled = True
        self.here, self.wants, self._waiting = None, (), False
        self.error = OutsideTraceError(
            "This trace was open when the process was forked, and its forward pass goes on in the parent alone. "
            "Open a new trace in the child."
        )

    def forget(self) -> None:
        """Drop what the run holds, so that nothing but the user's names keeps a tensor alive."""
        self.result = self.error = self.traceback = self.last = None
        self.collectors, self.replacements = [], []

    def modules(self) -> list[Module]:
        """The modules whose calls the run sees."""
        seen = modules_seen(self.whole)
        for guest in self.guests:
            seen += modules_seen(guest)
        return list(dict.fromkeys(seen)) if self.guests else seen

    def has_passed(self, module: Module, kind: str, call: int, step: int) -> bool:
        """Whether that point can no longer be reached (it may be the one just reached)."""
        if self.arriving and any(slot.is_at(module, kind, call, step) for slot in self.arriving):
            return False
        if self.ended or step != self.step:
            return self.ended or step < self.step
        if call >= self._calls(module):
            return False
        if kind == "input" or (module, call) not in self.stack:
            return True
        return kind != "output" and (module, call, kind) in self._tapped

    # What the worker calls.

    def _work(self) -> tuple[bool, Callable[[], None]]:
        if not self._begin.acquire(blocking=False):
            return True, lambda: None
        assert self._job is not None
        state, call = self._job
        self._job = None
        self._ident = get_ident()
        runs[self._ident] = self
        try:
            self._put_gates()
            self._in_model.begin()
            try:
                if self.cancelled:
                    raise Cancelled
                result = state.call(call)
            finally:
                self._in_model.end()
            if not self.cancelled:
                self.result, self.has_result = result, True
        except BaseException as error:  # noqa: BLE001
            # What is raised after cancelling comes of it: a `finally` that misses a value, say.
            if not self.cancelled:
                self.error = hide_our_frames(error)
                self.traceback = error.__traceback__
        finally:
            self._in_model.end()  # again: a Cancelled may have come just before it
            remove_gates(self._gated)
            del runs[self._ident]
            if self._observer is not None and self.step:
                self._observer.finish(self.root)
            self._observer = None
            self.only_within = bool(self.entered) and not self.step and self.root not in self.entered
            self.entered.clear()
            self.stack.clear()
            self.modes.clear()
            self.ended = True
        return not self._in_model.interrupted, self._tell_ended

    def _tell_ended(self) -> None:
        if self._waiting:
            self._answer(None)
        self._done.release()

    def enter(self, module: Module, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a watched module: inputs first, then its own call, or what is put in its place."""
        slot = self.arrive(module, "input", call, (args, kwargs))
        if slot.skipped:
            return slot.instead
        args, kwargs = slot.value
        del slot
        return type(module)._call_impl(module, *args, **kwargs)

    def arrive(self, module: Module, kind: str, call: int, value: Any, axes: Axes | None = None) -> Slot:
        """The forward pass is at a point of a watched module: let everybody look at it who waits for it."""
        if self.cancelled:
            raise Cancelled
        slot = Slot(module, kind, call, self.step, value, axes)
        if self.replacements:
            self._replace(slot)
        while self.wants:
            for want in self.wants:
                # At its output a call is over, and a tap that has found nothing in it will find nothing.
                here = want.module is module and (want.kind == kind or kind == "output")
                if here and want.call == call and want.step == self.step:
                    break
            else:
                break
            unedited = Unedited(slot) if self._records_gradients and is_recomputed() else None
            if module in self._uncounted or _functorch.peek_interpreter_stack() is not None:
                self._check(want)
            self._hand_over(slot)
            if unedited is not None:
                unedited.check(str(want))
        for collector in self.collectors:
            if module in collector.modules and kind in collector.kinds:
                collector.take(slot)
        if self._taps and not slot.skipped:
            self._enter_taps()
        return slot

    def _check(self, want: Want) -> None:
        """Raise if the value is not that of the point, or is none for the block."""
        if want.module in self._uncounted:
            raise OutOfOrderError(
                f"{want}: the module is called more often than its caller, otherwise than in the pass that was looked at "
                "first, and its first calls have not been counted. Ask for one of them, or its input, before."
            )
        if len(_functorch.get_interpreter_stack() or ()) != self._transforms:
            raise UsageError(
                f"{want} is inside a transform of torch.func (grad, vmap, ...) in the model's own code: its value is "
                "nothing outside of that. Ask for a module around it, or put a hook on it."
            )

    def _replace(self, slot: Slot) -> None:
        self.arriving.append(slot)
        try:
            for replacement in self.replacements:
                if slot.module in replacement.modules and slot.kind in replacement.kinds:
                    unedited = Unedited(slot) if self._records_gradients and is_recomputed() else None
                    replacement.take(slot)
                    if unedited is not None:
                        unedited.check(str(replacement))
        finally:
            self.arriving.pop()

    def end_step(self) -> None:
        """A call of the root is over: what was asked for in this step and has not come will not come."""
        while any(want.step <= self.step for want in self.wants):
            self._hand_over(None)
        self.step += 1
        self.entered.clear()
        self._uncounted.clear()
        self._tapped.clear()

    def _hand_over(self, slot: Slot | None) -> None:
        if self.cancelled:
            raise Cancelled
        self._parked = True
        try:
            self._answer(slot)
            while not wait_for(self._wake, OWNER_SECONDS):
                self.cancelled = self.cancelled or self.owner() is None
                if self.cancelled:
                    break
        finally:
            self._parked = False
        if self.cancelled:
            raise Cancelled

    def _answer(self, slot: Slot | None) -> None:
        self.here, self.wants, self._waiting = slot, (), False
        self._answered.release()

    def _enter_taps(self) -> None:
        """Put on the modes of the taps that are waited for inside the calls in flight.

        A tap asked for while its module is in flight goes on top of whatever modes the model's own
        code has entered since; should that code leave one of them before the module is done, torch
        pops ours instead, and the point comes as not reached.
        """
        for depth, (entered, call) in enumerate(self.stack):
            for module, kind, tap in self._taps:
                if entered is module and not any(mode[:2] == (depth, tap) for mode in self.modes):
                    # Below those of deeper calls, which are left first. (One that is at work is off the stack, and
                    # comes back on top of it.)
                    deeper = [mode for mode in self.modes if mode[0] > depth]
                    on_stack = _get_current_function_mode_stack()
                    above = [_pop_mode() for mode in deeper if any(mode[2] is one for one in on_stack)]
                    mode = tap(module, _Visit(self, module, call, kind))
                    mode.__enter__()
                    for one in reversed(above):
                        _push_mode(one)
                    self.modes.insert(len(self.modes) - len(deeper), (depth, tap, mode))

    def leave_taps(self) -> None:
        """The innermost call is over, or was left by an exception."""
        depth = len(self.stack) - 1
        while self.modes and self.modes[-1][0] == depth:
            self.modes.pop()[2].__exit__(None, None, None)


class _Visit(NamedTuple):
    """Shows the values that a mode finds in one call of a module (see `points.Visit`)."""

    run: Run
    module: Module
    call: int
    kind: str

    def __call__(self, value: Any, kind: str = "", axes: Axes | None = None) -> Slot:
        kind = kind or self.kind
        self.run._tapped.add((self.module, self.call, kind))
        return self.run.arrive(self.module, kind, self.call, value, axes)

    def awaited(self, kind: str) -> bool:
        """Whether anybody waits for that kind. If not, it is passed."""
        run, module = self.run, self.module
        collectors = (*run.replacements, *run.collectors)
        if any(want.module is module and want.kind == kind for want in run.wants) or any(
            module in collector.modules and kind in collector.kinds for collector in collectors
        ):
            return True
        run._tapped.add((module, self.call, kind))
        return False
