"""A trace: the context manager whose body looks into one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch.nn import Module

from nnatomy.core.attach import Attachment
from nnatomy.core.block import Block
from nnatomy.core.blocks.ensemble import Ensemble
from nnatomy.core.blocks.invoke import Barrier, Invoke
from nnatomy.core.blocks.joining import Joining
from nnatomy.core.cache import Cache
from nnatomy.core.compat import mount_save
from nnatomy.core.run import Run
from nnatomy.core.threads.worker import ThreadState
from nnatomy.core.views import ModuleView
from nnatomy.errors import NotReachedError, OutsideTraceError, UsageError


class _Exit:
    """`Trace.__exit__`, of which every `with` statement has an object of its own.

    Python asks for it before `__enter__`, and only the statement holds it: so it is gone when the statement has been left,
    even if Ctrl-C came before the first line of `__exit__`. (The trace itself may be kept by the user's names.)
    """

    def __get__(self, trace: Trace | None, _: type[Trace]) -> Callable[..., None]:
        if trace is None:
            return Trace._exit
        of_this_with = trace._exit
        trace._with = ref(of_this_with)
        return of_this_with


class Trace:
    """`with net.trace(x) as tracer:` — the body reads and edits the values of one call of the model.

    The call runs in a worker thread and stands still whenever the body is at work. It starts with the
    body's first question and is cancelled when the body ends, unless `early_stop=False`, or a cache
    has been opened; what the body has asked for stays in the body's own variables.
    """

    def __init__(
        self,
        root: ModuleView,
        call: Callable[[], Any],
        *,
        early_stop: bool = True,
        joining: Joining | None = None,
    ) -> None:
        self._root = root
        self._joining = joining
        self._ensemble: Ensemble | None = None
        self._call: Callable[[], Any] | None = call
        self._early_stop = early_stop
        self._block: Block | None = None
        self._with: ref[Any] | None = None
        self._thread = 0
        self._result: Any = None
        self._has_result = False

    def __enter__(self) -> Trace:
        if self._call is None:
            raise UsageError("This trace has been used already: open a new one with .trace(...).")
        mount_save()
        module = self._root.module
        run = Run(getattr(self._root, "steps_of", module), module, self._call, ThreadState())
        self._block = Block(run)
        run.owner = self._owner()
        self._call = None
        self._thread = self._root._blocks.add(self._block)
        for edit in getattr(self._root, "edits", ()):
            if isinstance(edit, Attachment):
                run.replacements.append(edit.for_run())
                run.guests.append(edit.module)
            else:
                Invoke(self._blocks_of_one_pass(), None, partial(self._edit_every_step, edit), lasting=True)
        return self

    def _owner(self) -> ref[Any]:
        of_no_with = self._with is None or self._with() is None  # an ExitStack's, or called by hand
        return ref(self._block) if of_no_with else self._with  # type: ignore[return-value]

    def _edit_every_step(self, edit: Callable[[], Any]) -> None:
        for _ in self.iter[:]:
            edit()

    __exit__ = _Exit()

    def _exit(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        block, ensemble = self._block, self._ensemble
        assert block is not None
        run = block.run
        try:
            if error is None and ensemble is not None:
                ensemble.end()
            if error is None and (not self._early_stop or run.run_to_end) and not run.ended:
                block.reach_end()
        finally:
            try:
                if ensemble is None:
                    run.cancel()
                else:
                    ensemble.dismiss()
                    ensemble.forget()
            finally:
                self._root._blocks.remove(block, self._thread)
                self._block = self._ensemble = None
                self._result, self._has_result = run.result, run.has_result
                run.forget()

    @property
    def block(self) -> Block:
        """The block that the user's line stands in."""
        if self._ensemble is not None:
            return self._ensemble.member_here()
        if self._block is None:
            state = "has not been entered" if self._call else "is over"
            raise OutsideTraceError(f"This trace {state}: ask inside `with model.trace(...) as tracer:`.")
        return self._block

    def run(self) -> Any:
        """Run the call with no block, and return its result."""
        with self:
            result = self.result
        return result

    @property
    def result(self) -> Any:
        """What the traced call returned.

        In the block, asking for it runs the forward pass to its end; in a block of `invoke`, it is that
        block's rows. After the block it is there if the forward pass has run to its end (`early_stop=False`,
        or the block asked for it).
        """
        if self._block is None and self._call is None:
            if not self._has_result:
                raise NotReachedError(
                    "The forward pass was stopped when the block ended, so there is no result. Ask for "
                    "tracer.result inside the block, or trace with early_stop=False."
                )
            return self._result
        block = self.block
        block.reach_end()
        if not block.run.has_result:
            raise NotReachedError("The forward pass was stopped, so there is no result.")
        return block.own(block.run.result)

    @property
    def iter(self) -> Steps:
        """The steps of a generation: `for step in tracer.iter[:]:`, also `[2:5]`, `[0]`, `[[0, 3]]`.

        In the loop's body, questions mean that step. The loop ends when the model does; what follows
        it runs. Outside of such a loop, questions mean step 0.
        """
        return Steps(self.block)

    def all(self) -> Iterator[int]:
        """All steps of a generation: `tracer.iter[:]`."""
        return self.iter[:]

    def stop(self) -> None:
        """Cancel the forward pass here; the block goes on, and can ask for nothing more."""
        self.block.run.cancel()

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
        if self._joining is None or self._block is None:
            self.block  # noqa: B018  raises if the trace is not open
            raise UsageError(
                "This trace has inputs of its own. For blocks with an input each, open it with none: "
                "`with model.trace() as tracer:`."
            )
        ensemble = self._blocks_of_one_pass()
        function = None
        if inputs and callable(inputs[-1]) and not isinstance(inputs[-1], torch.nn.Module):
            *inputs, function = inputs  # type: ignore[assignment]
        prepared = self._joining.prepare(tuple(inputs), kwargs) if inputs or kwargs else None
        return Invoke(ensemble, prepared, function)

    def barrier(self, count: int) -> Barrier:
        """A point for `count` blocks of `invoke`: each that calls it (`barrier()`) goes on when all have."""
        self.block  # noqa: B018  raises if the trace is not open
        return Barrier(self._blocks_of_one_pass(), count)

    def _blocks_of_one_pass(self) -> Ensemble:
        if self._ensemble is None:
            assert self._block is not None
            self._ensemble = Ensemble(self._block.run, self._root._blocks, self._joining)
            self._root._blocks.replace(self._block, self._ensemble.caller, self._thread)
            self._block = self._ensemble.caller
            self._block.run.owner = self._owner()
        return self._ensemble

    def cache(
        self,
        modules: Iterable[ModuleView | Module | str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        clone: bool = False,
        include_output: bool = True,
        include_inputs: bool = False,
    ) -> Cache:
        """Collect the outputs of many modules while the forward pass runs, from here to its end.

        Nothing stops for it: use it where the block has nothing to decide. The forward pass then runs
        to its end when the block ends. Over a generation the cache keeps every step.

        Args:
            modules: views, modules or paths; all submodules by default.
            device: move tensors there.
            dtype: convert floating-point tensors to this.
            clone: copy, where neither of the two has copied.
            include_output: collect what the modules return.
            include_inputs: collect (args, kwargs).
        """
        paths = self._root.paths(modules)
        kinds = ["input"] * include_inputs + ["output"] * include_output
        block = self.block
        view = None if self._ensemble is None else block.peek
        aliases = partial(_all_paths, self._root.module)
        cache = Cache(paths, kinds, device=device, dtype=dtype, clone=clone, view=view, aliases=aliases)
        run = block.run
        run.collectors.append(cache)
        run.run_to_end = True
        run.watch()
        return cache


def _all_paths(root: Module) -> dict[str, Module]:
    return dict(root.named_modules(remove_duplicate=False))


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
                    return
                block.step, begun = step, True
                yield step
        finally:
            block.step = outer

    def __iter__(self) -> Iterator[int]:
        return self[:]


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
