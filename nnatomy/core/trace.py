"""A trace: the context manager whose body looks into one call of the model; and the entry that opens it."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch.nn import Module

from nnatomy.core.block import Block
from nnatomy.core.cache import Cache
from nnatomy.core.frames import hide_our_frames
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.run import NO_RESULT, Run
from nnatomy.core.scan import on_fake_tensors
from nnatomy.core.thread_state import ThreadState
from nnatomy.core.views import ModuleView
from nnatomy.errors import NotReachedError, OutsideTraceError, UsageError


class _Exit:
    """`Trace.__exit__`, of which every `with` statement has an object of its own.

    Python asks for it before `__enter__`, and only the statement holds it: so it is gone when the statement has been left,
    even if Ctrl-C came before the first line of `__exit__`. (The trace itself may be kept by the user's names.)
    """

    def __get__(self, trace: "Trace | None", _: "type[Trace]") -> Callable[..., None]:
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

    def __init__(self, root: ModuleView, call: Callable[[], Any], *, early_stop: bool = True) -> None:
        self._root = root
        self._call: Callable[[], Any] | None = call
        self._early_stop = early_stop
        self._block: Block | None = None
        self._with: ref[Any] | None = None
        self._result: Any = NO_RESULT

    def __enter__(self) -> "Trace":
        if self._call is None:
            raise UsageError("This trace has been used already: open a new one with .trace(...).")
        run = self._run_of(self._call)
        run.run_to_end = not self._early_stop
        self._block = block = self._block_of(run)
        self._call = None
        self._root._blocks.add(block)
        # The forward pass ends when the `with` has been left, also where nobody could cancel it.
        of_no_with = self._with is None or self._with() is None  # an ExitStack's, or called by hand
        run.owner = ref(block) if of_no_with else self._with
        return self

    def _run_of(self, call: Callable[[], Any]) -> Run:
        """The run of that call."""
        module = self._root.module
        return Run(getattr(self._root, "steps_of", module), module, call, ThreadState())

    def _block_of(self, run: Run) -> Block:
        """The block that is to look into that run."""
        return Block(run)

    __exit__ = _Exit()

    def _exit(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        block = self.block
        try:
            if error is None:
                block.complete()
        except BaseException as its_error:  # noqa: BLE001
            raise hide_our_frames(its_error)  # noqa: B904
        finally:
            try:
                block.dismiss()
            finally:
                self._root._blocks.remove(block)
                self._block = None
                self._result = block.run.result
                block.forget()

    @property
    def block(self) -> Block:
        """This trace's block."""
        if self._block is None:
            state = "has not been entered" if self._call else "is over"
            raise OutsideTraceError(f"This trace {state}: ask inside `with model.trace(...) as tracer:`.")
        return self._block

    def run(self) -> Any:
        """Run the call with no block, and return its result."""
        with self:
            return self.result

    @property
    def result(self) -> Any:
        """What the traced call returned.

        In the block, asking for it runs the forward pass to its end; in a block of `invoke`, it is that
        block's rows. After the block it is there if the forward pass has run to its end (`early_stop=False`,
        a cache was opened, or the block asked for it).
        """
        if self._block is None and self._call is None:
            if self._result is NO_RESULT:
                raise NotReachedError(
                    "The forward pass was stopped when the block ended, so there is no result. Ask for "
                    "tracer.result inside the block, or trace with early_stop=False."
                )
            return self._result
        block = self.block
        block.reach_end()
        if block.run.result is NO_RESULT:
            raise NotReachedError("The forward pass was stopped, so there is no result.")
        return block.own(block.run.result)

    def stop(self) -> None:
        """Cancel the forward pass here; the block goes on, and can ask for nothing more."""
        self.block.run.cancel()

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
        block, paths = self.block, self._root.paths(modules)
        kinds = dict.fromkeys(["input"] * include_inputs + ["output"] * include_output)
        cache = Cache(self._root.module, paths, kinds, block.peek, device, dtype, clone)
        block.run.collect(cache)
        block.run.run_to_end = True
        return cache


class Traceable(ModuleView):
    """A view of a whole module that can be traced.

    `nnatomy.Traceable` is this with several blocks on one pass, lasting edits, attached modules and sources.

    Example:
        >>> import torch
        >>> from nnatomy.core import Traceable
        >>> net = Traceable(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()))
        >>> with net.trace(torch.tensor([-1.0, 2.0])):
        ...     print(net[0].output)
        tensor([0., 2.])
    """

    __slots__ = ("steps_of",)

    def __init__(self, module: Module) -> None:
        super().__init__(OpenBlocks(), module, "")
        #: The module whose calls are the steps: the whole, or one that it wraps.
        self.steps_of = module

    def trace(self, *args: Any, early_stop: bool = True, **kwargs: Any) -> Trace:
        """Trace `module(*args, **kwargs)`: `with net.trace(x) as tracer: ...`.

        Args:
            early_stop: cancel the forward pass when the block ends; with False it runs to its end.
        """
        return self._new_trace(lambda: self.module(*args, **kwargs), early_stop)

    def trace_call(self, function: Callable[..., Any], *args: Any, early_stop: bool = True, **kwargs: Any) -> Trace:
        """Trace `function(*args, **kwargs)`, which calls the module, once or (generating) many times."""
        return self._new_trace(lambda: function(*args, **kwargs), early_stop)

    def scan(self, *args: Any, early_stop: bool = True, **kwargs: Any) -> Any:
        """A trace over fake tensors: shapes and dtypes without computing, and without weights if the
        module is on the meta device. Values read in the block are `FakeTensor`s."""
        return self._new_trace(on_fake_tensors(self.module, args, kwargs), early_stop)

    def _new_trace(self, call: Callable[[], Any], early_stop: bool) -> Trace:
        return Trace(self, call, early_stop=early_stop)
