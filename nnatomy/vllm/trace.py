"""A trace of the engine's work: one step, or a generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnatomy.core.run import Run
from nnatomy.errors import UsageError
from nnatomy.tracing import Trace
from nnatomy.vllm.engine import AnyEngine, Generation
from nnatomy.vllm.layout import Layout


class EngineTrace(Trace):
    """`with model.trace(...)`, `with model.generate(...) as tracer:` on an engine.

    Args:
        engine: on which.
        work: what to run.
        whole: see `Requests`.
    """

    def __init__(
        self,
        root: Any,
        engine: AnyEngine,
        work: Generation,
        whole: Callable[[Layout], None] | None,
        *,
        generates: bool,
        early_stop: bool,
    ) -> None:
        super().__init__(root, work, early_stop=early_stop)
        self._engine, self._whole = engine, whole
        self.generates = generates

    def __enter__(self) -> EngineTrace:
        self._engine.check_free()
        super().__enter__()
        return self

    def _run_of(self, call: Callable[[], Any]) -> Run:
        return self._engine.run_for(call, self.generates, self._whole)

    def _exit(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        well = False
        try:
            super()._exit(kind, error, traceback)
            well = error is None
        finally:
            self._engine.block_is_over(well)

    def invoke(self, *_: Any, **__: Any) -> Any:
        """The engine takes its prompts as a list. Raises UsageError."""
        raise UsageError(
            "An engine is run on all its prompts at once, with no block for each: give them as a list, model.trace([prompt, other]), "
            "and take rows of what you read."
        )
