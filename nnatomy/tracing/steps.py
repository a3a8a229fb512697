"""The steps of a generation, to loop over in a block."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from nnatomy.core.block import Block
from nnatomy.core.frames import user_line, warn
from nnatomy.core.points import Question
from nnatomy.core.progress import Place
from nnatomy.errors import NotReachedError, OutOfOrderError, UsageError
from nnatomy.whole_number import whole_number


class Steps:
    """`tracer.iter`: see there."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __getitem__(self, which: slice | int | Iterable[int]) -> Iterator[int]:
        block, begun = self._block, False
        outer = block.step
        try:
            for step in _indices(which):
                if not self._reach(step, begun):
                    # The end of a slice may lie beyond the last step, and its beginning too if that is 0.
                    named = not isinstance(which, slice) or (which.start and not begun)
                    if named and not block.run.cancelled:
                        _warn_never_came(which, step, block.run.progress.step)
                    return
                block.step, begun = step, True
                yield step
        finally:
            block.step = outer

    def __iter__(self) -> Iterator[int]:
        return self[:]

    def _reach(self, step: int, begun: bool) -> bool:
        """Let the forward pass run until `step` begins. False if it ends before.

        Args:
            begun: whether the loop that asks has had a step already.
        """
        block, run = self._block, self._block.run
        now = run.progress.step
        question = Question(run.root, "input", 0, step, None, f"step {step}")
        has_begun = step == now and run.progress.calls.get(run.root)
        if step >= now and not has_begun:
            block.go_on(question)
        if run.error is not None:
            raise run.error
        if step < now:
            if begun and run.ended:
                return False
            raise OutOfOrderError(
                f"Step {step} was asked for at {user_line()}, but the model is already in step {now}. "
                f"Begin with that one: `for step in tracer.iter[{now}:]:`."
            )
        if has_begun:
            return True
        if run.ended and run.progress.calls and not (run.progress.step or run.cancelled):
            raise NotReachedError(
                f"There are no steps: {type(run.root).__name__} itself is not called in this generation, but a module within "
                "it. Generate with that one."
            )
        return run.place(question) is Place.HERE


def _warn_never_came(which: Any, step: int, count: int) -> None:
    text = f"{which.start or ''}:{which.stop or ''}" if isinstance(which, slice) else which
    warn(
        f"tracer.iter[{text}]: step {step} did not come, so the loop's body did not run for it: the generation ended "
        f"after {count} step{'s' * (count != 1)} (0 to {count - 1})."
    )


def _indices(which: slice | int | Iterable[int]) -> Iterable[int]:
    if isinstance(which, slice):
        start, stop, stride = which.start or 0, which.stop, which.step or 1
        if start < 0 or stride < 1 or (stop is not None and stop < 0):
            raise UsageError(
                f"tracer.iter[{which.start}:{which.stop}:{which.step}]: how many steps there will be is not "
                "known beforehand, so steps count from 0 upwards."
            )
        return range(start, 2**62 if stop is None else stop, stride)
    with suppress(TypeError):
        every: Any = which if isinstance(which, Iterable) and getattr(which, "ndim", 1) > 0 else [which]
        steps = [*map(whole_number, every)]
        if steps == sorted({step for step in steps if step >= 0}):
            return steps
    raise UsageError(f"tracer.iter[{which!r}]: steps are counted from 0, each once, in rising order.")
