"""Which block a line of the user's stands in."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from threading import get_ident
from typing import Any
from weakref import ref

from nnatomy.core.block import Block
from nnatomy.core.frames import frame_of_with, user_frames
from nnatomy.errors import OutsideTraceError

#: The blocks that have been opened in this context, newest first. (A task of asyncio begins with a copy of the context of the task
#: that made it, and so with its blocks.)
_opened_here: ContextVar[tuple[ref[Block], ...]] = ContextVar("opened_here", default=())


class OpenBlocks:
    """The blocks that are open on one model, by thread."""

    def __init__(self) -> None:
        self._by_thread: dict[int, list[ref[Block]]] = {}
        #: A trace of the model on some input, where one is known, for questions about the model that need a run.
        self.example: Callable[..., AbstractContextManager[Any]] | None = None

    def add(self, block: Block) -> None:
        """Open a block whose `with` is being entered, or whose body runs, in this thread."""
        block.frame, block.thread = frame_of_with(), get_ident()
        self._by_thread.setdefault(block.thread, []).append(ref(block))
        before = (other for other in _opened_here.get() if (outer := other()) and outer.frame is not None)
        _opened_here.set((ref(block), *before))

    def remove(self, block: Block) -> None:
        block.frame = None
        blocks = self._by_thread.get(block.thread, [])
        blocks[:] = [other for other in blocks if other() not in (block, None)]
        if not blocks:
            self._by_thread.pop(block.thread, None)

    @property
    def is_open_here(self) -> bool:
        """Whether this thread has opened one."""
        return any(block() is not None for block in self._by_thread.get(get_ident(), ()))

    def current(self, name: str) -> Block:
        """The block that the user's line stands in.

        In one thread several can be open: one in the other (the inner one is meant), in suspended generators (then
        the one is meant whose frame the line runs in), or in several tasks of asyncio, or those that made them.
        """
        opened_here = self._by_thread.get(get_ident(), ())
        blocks = [block for other in opened_here if (block := other()) is not None]
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
