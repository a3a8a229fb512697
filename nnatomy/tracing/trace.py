"""A trace that several blocks may share, on a view that may have lasting edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from torch.nn import Module

from nnatomy import core
from nnatomy.blocks.joining import Joining
from nnatomy.blocks.schedule import Barrier, Invoke, Schedule
from nnatomy.core.block import Block
from nnatomy.core.run import Run
from nnatomy.core.views import ModuleView
from nnatomy.errors import NotCalledError, UsageError
from nnatomy.tracing.attach import Attachment
from nnatomy.tracing.save import mount_save
from nnatomy.tracing.steps import Steps


class Trace(core.Trace):
    """A trace whose forward pass several blocks may share: see `invoke`.

    Args:
        joining: how the inputs of several blocks become those of one call, where the trace has none of its own.
    """

    def __init__(
        self,
        root: ModuleView,
        call: Callable[[], Any],
        *,
        early_stop: bool = True,
        joining: Joining | None = None,
    ) -> None:
        super().__init__(root, call, early_stop=early_stop)
        self._joining = joining

    def _block_of(self, run: Run) -> Schedule:
        return Schedule(run, self._root._blocks, self._joining)

    def __enter__(self) -> Trace:
        super().__enter__()
        mount_save()
        for edit in getattr(self._root, "edits", ()):
            if isinstance(edit, Attachment):
                run = self.block.run
                run.replace(edit.for_run())
                run.roots.append(edit.module)
            else:
                Invoke(self._schedule, None, partial(self._edit_every_step, edit), lasting=True)
        return self

    def _edit_every_step(self, edit: Callable[[], Any]) -> None:
        edit()  # in step 0, to which what is called before the model itself belongs (an encoder, in a generation)
        for step in self.iter[:]:
            if step:
                with suppress(NotCalledError):  # an encoder runs in the first step alone
                    edit()

    @property
    def block(self) -> Block:
        """The block that the user's line stands in."""
        return self._schedule.block_here()

    @property
    def _schedule(self) -> Schedule:
        block = super().block
        assert isinstance(block, Schedule)
        return block

    @property
    def iter(self) -> Steps:
        """The steps of a generation: `for step in tracer.iter[:]:`, also `[2:5]`, `[0]`, `[[0, 3]]`.

        In the loop's body, questions mean that step. The loop ends when the model does; what follows
        it runs. Outside of such a loop, questions mean step 0.

        Warns:
            UserWarning: if a step that was named did not come. (The end of a slice may lie beyond the last step.)
        """
        return Steps(self.block)

    def all(self) -> Iterator[int]:
        """All steps of a generation: `tracer.iter[:]`."""
        return self.iter[:]

    def invoke(self, *inputs: Any, **kwargs: Any) -> Invoke:
        """A block with inputs of its own: `with tracer.invoke(prompt): ...`.

        All such blocks of a trace share one forward pass over one batch. Each sees and edits its own rows,
        without padding; one with no inputs, `tracer.invoke()`, those of all. They run when the last one has
        been given. A name that another block binds is waited for. After the trace, what they have bound is
        bound in the user's frame.

        The body is taken from the source. Where there is none, give a function: `tracer.invoke(prompt,
        function)` calls it, with no arguments, as the block; `.value` is what it returned.

        Args:
            *inputs: what `trace` takes; at the end perhaps a function.
            **kwargs: go to the model's forward; the same for all blocks, but for tensors.

        Raises:
            UsageError: if the trace has inputs of its own, or the forward pass has begun.
            CaptureError: if the body cannot be had from the source.
            InputError: if the inputs cannot be run, or (at the end) cannot be joined.
        """
        schedule = self._schedule
        if self._joining is None:
            raise UsageError(
                "This trace has inputs of its own. For blocks with an input each, open it with none: "
                "`with model.trace() as tracer:`."
            )
        function = None
        if inputs and callable(inputs[-1]) and not isinstance(inputs[-1], Module):
            *inputs, function = inputs  # type: ignore[assignment]
        prepared = self._joining.prepare(tuple(inputs), kwargs) if inputs or kwargs else None
        return Invoke(schedule, prepared, function)

    def barrier(self, count: int) -> Barrier:
        """A point for `count` blocks of `invoke`: each that calls it (`barrier()`) goes on when all have."""
        return Barrier(self._schedule, count)
