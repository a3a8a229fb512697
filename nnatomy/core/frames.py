"""Frames: whose code is at work in a thread, and at which line."""

import sys
import warnings
from collections.abc import Iterator
from itertools import dropwhile
from types import FrameType, TracebackType
from typing import NamedTuple

#: The packages whose frames are of no use to anybody who reads a traceback.
_TRACING = ("nnatomy.core.", "nnatomy.blocks.", "nnatomy.tracing.")


def frames() -> Iterator[FrameType]:
    """The frames of this thread from the caller's outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    """The name of the module whose code a frame runs."""
    return frame.f_globals.get("__name__", "")


def is_ours(frame: FrameType) -> bool:
    """Whether a frame is this library's, or one of the run-time checks around it."""
    return _module(frame).startswith(("nnatomy.", "jaxtyping.")) or frame.f_code.co_filename.startswith("<@beartype")


def user_frames() -> Iterator[FrameType]:
    """The frames of this thread from the innermost one that is not this library's outwards."""
    return dropwhile(is_ours, frames())


def warn(text: str) -> None:
    """Warn of what will run, but is not likely to be meant, at the innermost line that is not ours nor torch's."""
    frame = next(one for one in frames() if not (is_ours(one) or _module(one).startswith("torch.")))
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)


class Line(NamedTuple):
    """A line of code. Its text is made where an error says it, as each read notes its line and few are said."""

    file: str
    number: int

    def __str__(self) -> str:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        cell = getattr(getattr(shell, "compile", None), "_filename_map", {}).get(self.file)
        return f"{self.file}:{self.number}" if cell is None else f"cell [{cell}], line {self.number}"


def user_line() -> Line:
    """The file (in a notebook the cell) and line of the innermost frame that is not this library's."""
    frame = next(user_frames())
    return Line(frame.f_code.co_filename, frame.f_lineno)


def frame_of_with() -> FrameType:
    """The frame whose `with` enters a trace, also by way of `contextlib` or another `__enter__`."""
    outwards = user_frames()
    this = next(outwards)
    for outer in outwards:
        # Where contextlib is the outer one, `this` is a generator that it makes enter.
        if _module(outer) != "contextlib" and this.f_code.co_name not in ("__enter__", "enter_context"):
            break
        this = outer
    return this


def hide_our_frames(error: BaseException) -> BaseException:
    """Take the frames of the tracing rooms, which stand between every two modules, out of its traceback."""
    chain: list[BaseException | None] = [error]
    for one in chain:  # and of the errors it came of
        if one is not None:
            one.__traceback__ = _without_our_frames(one.__traceback__)
            chain += [other for other in (one.__cause__, one.__context__) if other not in chain]
    return error


def _without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    kept = []
    while traceback is not None:
        if not _module(traceback.tb_frame).startswith(_TRACING):
            kept.append(traceback)
        traceback = traceback.tb_next
    for this, following in zip(kept, [*kept[1:], None], strict=False):
        this.tb_next = following
    return kept[0] if kept else None  # None: raised by ourselves, in a thread of ours
