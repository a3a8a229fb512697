"""The steps of a generation, to loop over in a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from nnatomy.core.block import Block
from nnatomy.core.frames import warn
from nnatomy.errors import UsageError


class Steps:
    """`tracer.iter`: see there."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __getitem__(self, which: slice | int | Iterable[int]) -> Iterator[int]:
        block, begun = self._block, False
        outer = block.step
        try:
            for step in _indices(which):
                if not block.reach_step(step, begun):
                    if not block.run.cancelled and not (
                        isinstance(which, slice) and (begun or not which.start)
                    ):
                        _warn_never_came(which, step, block)
                    return
                block.step, begun = step, True
                yield step
        finally:
            block.step = outer

    def __iter__(self) -> Iterator[int]:
        return self[:]


def _warn_never_came(which: Any, step: int, block: Block) -> None:
    """Warn that a step that was named has not come. (The end of a slice may lie beyond the last one.)"""
    if isinstance(which, slice):
        text = ":".join("" if part is None else str(part) for part in (which.start, which.stop))
    else:
        text = str(which)
    count = block.run.progress.step
    warn(
        f"tracer.iter[{text}]: step {step} did not come, so the loop's body did not run for it: the generation ended "
        f"after {count} step{'s' * (count != 1)} (0 to {count - 1})."
    )


def _indices(which: slice | int | Iterable[int]) -> Iterable[int]:
    if not isinstance(which, slice):
        steps: list[Any] = (
            [which] if isinstance(which, int) or not isinstance(which, Iterable) else list(which)
        )
        if not all(isinstance(step, int) and step >= 0 for step in steps) or steps != sorted(set(steps)):
            raise UsageError(f"tracer.iter[{which!r}]: steps are counted from 0, each once, in rising order.")
        return steps
    start, stop, stride = which.start or 0, which.stop, which.step or 1
    if start < 0 or stride < 1 or (stop is not None and stop < 0):
        raise UsageError(
            f"tracer.iter[{which.start}:{which.stop}:{which.step}]: how many steps there will be is not "
            "known beforehand, so steps count from 0 upwards."
        )
    return range(start, 2**62 if stop is None else stop, stride)
