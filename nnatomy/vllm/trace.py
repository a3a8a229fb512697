"""A trace of the engine's work: one step, or a generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnatomy.core.run import Run
from nnatomy.core.thread_state import ThreadState
from nnatomy.errors import UsageError
from nnatomy.tracing import Trace
from nnatomy.vllm.engine import Engine, Generation
from nnatomy.vllm.layout import Layout
from nnatomy.vllm.run import EngineRun, Requests


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
        engine: Engine,
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
        run = EngineRun(self._engine.model, self._root.module, call, ThreadState())
        run.generates = self.generates
        run.replace(Requests(run, self._engine.layout, self._whole))
        return run

    def invoke(self, *_: Any, **__: Any) -> Any:
        """The engine takes its prompts as a list. Raises UsageError."""
        raise UsageError(
            "An engine is run on all its prompts at once, with no block for each: give them as a list, model.trace([prompt, other]), "
            "and take rows of what you read."
        )
