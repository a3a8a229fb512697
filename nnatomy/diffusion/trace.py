"""A trace of a pipeline's call, and the loop over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from nnatomy.core.points import Collector, Slot
from nnatomy.core.run import Run
from nnatomy.diffusion.halves import Given
from nnatomy.diffusion.stage import Stage
from nnatomy.errors import InputError, NotReachedError, UsageError
from nnatomy.tracing import Trace
from nnatomy.tracing.steps import Steps


class DiffusionTrace(Trace):
    """`with model.generate(...) as tracer:`."""

    def __init__(self, root: Any, stage: Stage, kwargs: dict[str, Any], images: int, *, early_stop: bool) -> None:
        super().__init__(root, lambda: stage(kwargs), early_stop=early_stop)
        self._stage = stage
        self._images = images

    def _run_of(self, call: Any) -> Run:
        run = super()._run_of(call)
        root: Any = self._root
        given = Given(self._images, self._stage, root.streams)
        run.collect(given)
        run.replace(_OneCall(root.denoiser, given))
        return run

    @property
    def iter(self) -> Steps:
        """The steps of the denoising: `for step in tracer.iter[:]:`, also `[2:5]`, `[0]`, `[[0, 3]]`.

        Raises:
            NotReachedError: if a step that was named does not come. (The end of a slice may lie beyond the last step.)
        """
        return DiffusionSteps(self.block, self._stage)

    def invoke(self, *_: Any, **__: Any) -> Any:
        """A pipeline takes its prompts as a list. Raises UsageError."""
        raise UsageError(
            "A pipeline is run on all its prompts at once, with no block for each: give them as a list, "
            "model.generate([prompt, other], ...), and take rows of what you read."
        )


class DiffusionSteps(Steps):
    """`tracer.iter`: see there."""

    def __init__(self, block: Any, stage: Stage) -> None:
        super().__init__(block)
        self._stage = stage
        self._named: Any = None

    def __getitem__(self, which: slice | int | Iterable[int]) -> Iterator[int]:
        self._named = None if isinstance(which, slice) and not which.start else which
        return super().__getitem__(which)

    def _reach(self, step: int, begun: bool) -> bool:
        if super()._reach(step, begun):
            return True
        if self._named is not None and not (begun and isinstance(self._named, slice)) and not self._block.run.cancelled:
            total = self._stage.total or 0
            raise NotReachedError(
                f"tracer.iter: step {step} was asked for, and this generation has {total} step{'s' * (total != 1)} (0 to "
                f"{total - 1}): ask for one of these, or generate with a larger num_inference_steps."
            )
        return False


class _OneCall(Collector):
    """Refuses what was read of a step as a whole where the denoiser is then called for another half of guidance."""

    def __init__(self, denoiser: Any, given: Given) -> None:
        self.modules = {denoiser}
        self.kinds = {"input": None}
        self._given = given

    def take(self, slot: Slot) -> None:
        if slot.call and self._given.whole:
            raise InputError(
                f"{self._given.whole} was asked for, and this run calls its denoiser once for each half of guidance: write "
                "which is meant, model.conditional or model.unconditional."
            )
