"""Traces as nnsight's scripts use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nnatomy import tracing
from nnatomy.blocks.schedule import Invoke
from nnatomy.compat.nnsight.cache import Cache, Collected
from nnatomy.compat.nnsight.envoy import NO_NEXT
from nnatomy.compat.nnsight.errors import as_value_error
from nnatomy.compat.nnsight.iteration import Iteration
from nnatomy.compat.nnsight.saving import mount, unmount
from nnatomy.compat.nnsight.source import FromTheStart
from nnatomy.errors import UsageError
from nnatomy.standardized.prompt_trace import PromptTrace
from nnatomy.tracing.steps import _indices


class Stopped(BaseException):
    """Leaves a block behind `tracer.stop()`."""


class Tracer(tracing.Trace):
    """A trace in which everything has `.save()`, and `tracer.stop()` leaves the block."""

    #: Whether its steps are those of a generation.
    _steps = False
    #: What tells of a generation's tokens as they come.
    streamer: Any = None

    def __enter__(self) -> Tracer:
        mount()
        try:
            super().__enter__()
        except BaseException:
            unmount()
            raise
        if self.streamer is not None:
            self.block.run.roots.append(self.streamer)
        naming: Any = self._root._naming
        if naming.with_operations:
            self.block.run.collect(FromTheStart(naming.with_operations, naming.tap))
        return self

    def _exit(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> Any:
        stopped = isinstance(error, Stopped)
        try:
            if stopped:
                kind = error = traceback = None
            super()._exit(kind, error, traceback)
        finally:
            unmount()
        return stopped

    @property
    def iter(self) -> Any:
        """The steps: `for step in tracer.iter[:]:`, or `with tracer.iter[0:3]:`."""
        return Iteration(self.block, None if self._steps else self._root._naming.calls)

    def all(self) -> Any:
        """All steps."""
        return self.iter[:]

    def next(self, *_: Any) -> Any:
        """Raises UsageError."""
        raise UsageError(NO_NEXT)

    def stop(self) -> None:
        """Cancel the forward pass, and leave the block here."""
        super().stop()
        raise Stopped

    def invoke(self, *inputs: Any, **kwargs: Any) -> Invoke:
        with as_value_error(UsageError):
            block = super().invoke(*inputs, **kwargs)
        if block.function is None:
            block.__class__ = Invoker
            block.given = self._root, inputs, kwargs  # type: ignore[attr-defined]
        return block

    def cache(  # type: ignore[override]
        self,
        modules: Iterable[Any] | None = None,
        device: Any = "cpu",
        dtype: Any = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
    ) -> Any:
        """Collect the values of modules, from here to the pass's end, as copies.

        Returns:
            `cache["model.transformer.h.0"].output`, or `cache.model.transformer.h[0].output`.
        """
        block, root = self.block, self._root
        kinds = dict.fromkeys(["input"] * include_inputs + ["output"] * include_output)
        collected = Collected(root.module, root.paths(modules), kinds, block.peek, device, dtype, clone=True)
        collected.detach = detach
        block.run.collect(collected)
        block.run.run_to_end = True
        return Cache(collected, root)


class PromptTracer(Tracer, PromptTrace):
    """The same, of prompts."""

    @property
    def _steps(self) -> bool:  # type: ignore[override]
        return self._generating


class Invoker(Invoke):
    """A block of `invoke` that `tracer.stop()` leaves."""

    given: Any

    def __enter__(self) -> Any:
        super().__enter__()
        function: Callable[[], Any] | None = self.function
        assert function is not None

        def until_stopped() -> Any:
            try:
                return function()
            except Stopped:
                return None

        self.function = until_stopped
        return _Given(*self.given)


class _Given:
    """What `tracer.invoke(...) as invoker` gives."""

    def __init__(self, root: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = root, args, kwargs

    @property
    def inputs(self) -> Any:
        """The arguments that the prompts of the block give to the model: (args, kwargs)."""
        root, args, kwargs = self._given
        return ((), root.prepare(*args, **kwargs)) if hasattr(root, "prepare") else (args, kwargs)


def as_tracer(trace: tracing.Trace) -> Any:
    """The same trace, as one of this room."""
    trace.__class__ = PromptTracer if isinstance(trace, PromptTrace) else Tracer
    return trace


class EditTracer:
    """What an edit's body is told of its trace. It is run in every step, so that a loop over steps is run in the one at hand."""

    def __init__(self, root: Any) -> None:
        self._root = root

    @property
    def iter(self) -> EditTracer:
        """`for step in tracer.iter[...]:` runs its body where the step at hand is one of these."""
        return self

    def all(self) -> Any:
        """All steps."""
        return self[:]

    def __getitem__(self, which: Any) -> Any:
        step = self._root._blocks.current("tracer.iter").step
        if isinstance(which, slice):
            start, stop, stride = which.start or 0, which.stop, which.step or 1
            meant = step >= start and (stop is None or step < stop) and not (step - start) % stride
        else:
            meant = step in _indices(which)
        return iter([step] if meant else [])

    def stop(self) -> None:
        """Raises UsageError."""
        raise UsageError("tracer.stop() in an edit: it would end every trace of the edited model.")
