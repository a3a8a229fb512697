"""A block: the user's side of a run. It asks for points; the forward pass comes to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from types import FrameType
from typing import Any
from weakref import ref

from torch.nn import Module

from nnatomy.core.frames import frame_of_with, is_ours, line_of, user_frames, user_line
from nnatomy.core.points import Slot, Tap, Want
from nnatomy.core.run import Run
from nnatomy.errors import NotReachedError, OutOfOrderError, OutsideTraceError


class Block:
    """The `with` body of one trace.

    Attributes:
        step: which step (see `points`) the block's questions mean.
        frame: the frame of its `with`.
        alone: whether no other block shares its run.
    """

    alone = True

    frame: FrameType | None = None

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = 0

    @property
    def here(self) -> Slot | None:
        """The slot that the forward pass stands at for this block, if it does."""
        return self.run.here

    def reach(self, module: Module, kind: str, name: str, call: int = 0, tap: Tap | None = None) -> Slot:
        """Let the forward pass run until it is at that point.

        Raises:
            OutOfOrderError: if it is past it.
            NotReachedError: if it ended, or left that step, without coming there.
            Exception: what the model raised on the way, as it was raised.
        """
        run, step = self.run, self.step
        here = run.here
        if here is not None and here.module is module and here.is_at(module, kind, call, step):
            return here if self.alone else self.view(here)
        want = Want(module, kind, call, step, tap, name)
        if run.started:
            if run.has_passed(module, kind, call, step):
                if run.error is not None:
                    raise run.error.with_traceback(run.traceback)
                raise self._out_of_order(want)
            if not run.sees(module):
                raise self._unseen(want)
        if self.alone:
            run.wait((want,))
        else:
            self.wait(want)
        here = run.here
        if here is None or here.kind != kind or not (self.alone or here.is_at(module, kind, call, step)):
            if run.error is not None:
                raise run.error.with_traceback(run.traceback)
            others = here is not None and not here.is_at(module, here.kind, call, step)
            raise self._out_of_order(want) if others else self._not_reached(want)
        frame = sys._getframe(2)  # one is the accessor's
        while is_ours(frame) and frame.f_back is not None:
            frame = frame.f_back
        run.last = (want, frame.f_code, frame.f_lasti)  # its line is looked up when it is needed
        return here if self.alone else self.view(here)

    def wait(self, want: Want | None) -> None:
        """Let the forward pass run until it is at that point, cannot come to it, or (also with None) ends."""
        if want is None and not self.run.started:
            self.run.open_to_questions = False
        self.run.wait(() if want is None else (want,))

    def view(self, slot: Slot) -> Slot:
        """A slot as this block sees and edits it."""
        return slot

    def own(self, result: Any) -> Any:
        """The traced call's result as this block sees it."""
        return result

    def peek(self, slot: Slot) -> Slot:
        """A slot as this block sees it while the forward pass goes on."""
        return slot

    def reach_step(self, step: int, begun: bool) -> bool:
        """Let the forward pass run until `step` begins. False if it ends before.

        Args:
            begun: whether the loop over steps that asks has had one already.
        """
        run = self.run
        if run.error is not None:
            raise run.error.with_traceback(run.traceback)
        if step < run.step:
            if begun and run.ended:
                return False
            raise OutOfOrderError(
                f"Step {step} was asked for at {user_line()}, but the model is already in step {run.step}. "
                f"Begin with that one: `for step in tracer.iter[{run.step}:]:`."
            )
        if step == run.step and run.entered.get(run.root):  # it has begun
            return True
        if not run.ended:
            self.wait(Want(run.root, "input", 0, step, None, f"step {step}"))
            if run.error is not None:
                raise run.error.with_traceback(run.traceback)
        if run.has_result and run.only_within:
            raise NotReachedError(
                f"There are no steps: {type(run.root).__name__} itself is not called in this generation, but a module within "
                "it. Generate with that one."
            )
        return run.here is not None and (run.here.module, run.here.step) == (run.root, step)

    def reach_end(self) -> None:
        """Let the forward pass run to its end."""
        run = self.run
        if not run.ended:
            self.wait(None)
        if run.error is not None:
            raise run.error.with_traceback(run.traceback)

    def _out_of_order(self, want: Want) -> OutOfOrderError:
        last, line = "the start", "the trace's first line"
        if self.run.last is not None:
            last, line = str(self.run.last[0]), line_of(*self.run.last[1:])
        if self.run.cancelled:
            return OutOfOrderError(
                f"{want} was asked for at {user_line()}, after the forward pass had been stopped (it stood at "
                f"{last}, asked for at {line})."
            )
        steps = ""
        if self.run.step > self.step:
            steps = (
                f" The model is in step {self.run.step} and this question means step {self.step}: to ask in "
                "another step, do so inside `for step in tracer.iter[...]:`."
            )
        uncounted = "" if self.run.counts(want.module) else " (or past where it would be, had it been called)"
        return OutOfOrderError(
            f"{want} was asked for at {user_line()}, but the forward pass is already past it{uncounted}: it stands "
            f"behind {last}, asked for at {line}. Ask for values in the order the model computes them: move "
            f"this line above {line}.{steps}"
        )

    def _unseen(self, want: Want) -> NotReachedError:
        return NotReachedError(
            f"{want} cannot be reached: the module is not among those of the traced model, or it is compiled "
            "(torch.compile), so that Python does not see its calls. Trace the model it belongs to, without "
            "compiling it."
        )

    def _not_reached(self, want: Want) -> NotReachedError:
        if want.module not in self.run.modules() or want.module._compiled_call_impl is not None:
            return self._unseen(want)
        if self.here is not None:
            return NotReachedError(f"{want} was asked for, but the module has run without computing one.")
        end = f"step {want.step}" if not self.run.ended or self.run.step > want.step else "the forward pass"
        return NotReachedError(
            f"{want} was asked for at {user_line()}, but {end} ended without coming to it: with these inputs "
            "the model does not call that module (or not that often, or not that many steps), or calls it in "
            "compiled code (torch.compile), where Python does not see it."
        )


#: The blocks that have been opened in this context (a task of asyncio has that of the one that made it), newest first.
_opened_here: ContextVar[tuple[ref[Block], ...]] = ContextVar("opened_here", default=())


class OpenBlocks:
    """The blocks that are open on one model, by thread."""

    def __init__(self) -> None:
        self._by_thread: dict[int, list[ref[Block]]] = {}
        #: A trace of the model on some input, for questions about the model that need a run.
        self.example: Callable[[OpenBlocks], Any] | None = None

    def add(self, block: Block) -> int:
        """Open a block whose `with` is being entered; returns the thread, for `remove`."""
        block.frame = frame_of_with()
        thread = get_ident()
        self._by_thread.setdefault(thread, []).append(ref(block))
        before = (other for other in _opened_here.get() if (outer := other()) and outer.frame is not None)
        _opened_here.set((ref(block), *before))
        return thread

    def replace(self, block: Block, other: Block, thread: int) -> None:
        """`other` is open in the place of `block`."""
        other.frame = block.frame
        blocks = self._by_thread[thread]
        blocks[[entry() for entry in blocks].index(block)] = ref(other)
        _opened_here.set(tuple(ref(other) if one() is block else one for one in _opened_here.get()))

    def remove(self, block: Block, thread: int) -> None:
        block.frame = None
        blocks = self._by_thread.get(thread, [])
        blocks[:] = [other for other in blocks if other() not in (block, None)]
        if not blocks:
            self._by_thread.pop(thread, None)

    @property
    def is_open_here(self) -> bool:
        """Whether this thread has opened one."""
        return get_ident() in self._by_thread

    def current(self, name: str) -> Block:
        """The block that the user's line stands in.

        In one thread several can be open: one in the other (the inner one is meant), in suspended generators (then
        the one is meant whose frame the line runs in), or in several tasks of asyncio, or those that made them.
        """
        refs = self._by_thread.get(get_ident(), ())
        if len(refs) == 1 and (block := refs[0]()) is not None:
            return block
        blocks = [block for other in refs if (block := other()) is not None]
        if not blocks:
            raise OutsideTraceError(
                f"{name or 'the model'}: values exist only while the model runs. Ask for them inside "
                "`with model.trace(...):`, in the thread that opened it."
            )
        if len(blocks) > 1:
            for frame in user_frames():
                for block in reversed(blocks):
                    if block.frame is frame:
                        return block
            for opened in _opened_here.get():
                if (block := opened()) in blocks:
                    return block
        return blocks[-1]

    @contextmanager
    def looking_at(self, name: str) -> Iterator[Block]:
        """The block that the user's line stands in; outside of one, that of a trace of the example."""
        if self.example is None or self.is_open_here:
            yield self.current(name)
        else:
            with self.example(self) as tracer:
                yield tracer.block
