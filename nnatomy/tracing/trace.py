"""A trace that several blocks may share; and the entry that opens it: a view that may have lasting edits and attached modules."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import chain, count
from typing import Any

from torch.nn import Module

from nnatomy import core
from nnatomy.blocks.capture import EditBlock
from nnatomy.blocks.joining import Joining
from nnatomy.blocks.schedule import Barrier, Invoke, Schedule
from nnatomy.core.block import Block
from nnatomy.core.run import Run
from nnatomy.errors import NotCalledError, UsageError
from nnatomy.tracing.attach import Attachment, Point, first_tensor, with_first_tensor
from nnatomy.tracing.source import ModuleView
from nnatomy.tracing.steps import Steps


class Trace(core.Trace):
    """A trace whose forward pass several blocks may share, where its call is a `Joining`: see `invoke`."""

    def _block_of(self, run: Run) -> Schedule:
        return Schedule(run, self._root._blocks)

    def __enter__(self) -> "Trace":
        super().__enter__()
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
        return super().block  # type: ignore[return-value]

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
        if schedule.joining is None:
            raise UsageError(
                "This trace has inputs of its own. For blocks with an input each, open it with none: "
                "`with model.trace() as tracer:`."
            )
        function = None
        if inputs and callable(inputs[-1]) and not isinstance(inputs[-1], Module):
            *inputs, function = inputs  # type: ignore[assignment]
        prepared = schedule.joining.prepare(tuple(inputs), kwargs) if inputs or kwargs else None
        return Invoke(schedule, prepared, function)

    def barrier(self, count: int) -> Barrier:
        """A point for `count` blocks of `invoke`: each that calls it (`barrier()`) goes on when all have."""
        return Barrier(self._schedule, count)


#: A lasting edit of a view.
Edit = Callable[[], Any] | Attachment


class Traceable(ModuleView, core.Traceable):
    """A view of a whole module that can be traced.

    Example:
        >>> import torch
        >>> from nnatomy import Traceable
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> net = Traceable(Sequential(Linear(4, 8), ReLU(), Linear(8, 2)))
        >>> with net.trace(torch.ones(1, 4)) as tracer:
        ...     hidden = net[1].output
        ...     net[2].input = 0 * hidden
        ...     y = tracer.result
        >>> hidden.shape, torch.equal(y[0], net[2].module.bias)
        (torch.Size([1, 8]), True)
    """

    __slots__ = ("edits",)

    #: Which points there are to attach at.
    _points = "give a path and .input or .output, such as 'layers.3.output'"

    def __init__(self, module: Module) -> None:
        super().__init__(module)
        #: The lasting edits, in the order in which they are made.
        self.edits: tuple[Edit, ...] = ()

    def session(self) -> AbstractContextManager[Any]:
        """`with model.session():` groups traces, as in nnsight. Values flow from one trace to the next without it."""
        return nullcontext(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with the lasting edits, if there are any."""
        return self.trace(*args, **kwargs).run() if self.edits else self.module(*args, **kwargs)

    def edit(self, edit: Any = None) -> Any:
        """A view of the same module whose every trace, call and step of a generation makes this edit.

        The original is untouched, and so is the module, which carries nothing when it is not running. Edits
        stack: `edited.edit(another)`. `edited.edits` lists them; `edited.without_edits()` has none.

        Args:
            edit: a function without arguments that reads and assigns as a block does. None for a block:
                `with model.edit() as edited: ...`, whose body is taken from the source (see `Trace.invoke`)
                and has the names of its frame as they are now.

        Raises:
            UsageError: if `edit` cannot be called.
            CaptureError: if the body cannot be had from the source.
        """
        if edit is not None and not callable(edit):
            raise UsageError(f"An edit is a function without arguments; got {edit!r}.")
        return EditBlock(self._with_edit) if edit is None else self._with_edit(edit)

    def _with_edit(self, edit: Edit) -> Any:
        """A view of the same module with one more edit."""
        view = self.without_edits()
        view.edits = (*self.edits, edit)
        return view

    def attach(
        self,
        point: str | ModuleView,
        module: Module,
        *,
        how: str = "replace",
        takes: str | ModuleView | None = None,
        name: str | None = None,
    ) -> Any:
        """A view of the same module whose every trace, call and step of a generation calls `module` at a point.

        The module's inner values are points as all others (`view.sae.encoder.output`), and its parameters can be
        trained through a trace. It is given the dtype and device of its parameters, and sees the whole batch, padding
        included. At its point it acts before the trace's blocks do: what they read there is what it has left.

        Args:
            point: where: a path and `.input` or `.output` (`"encoder.layers.3.output"`), or a view, for its output.
                Where several tensors are there, the first.
            module: what to call: one tensor in, one of the same shape out.
            how: "replace": its output goes on in the place of the value; "error": so does its output plus what it
                misses of the value (the error term of a sparse autoencoder: the value stays what it is, up to
                rounding, until something inside of the module is edited); "add": the value plus its output (an
                adapter); "read": the value (a probe).
            takes: the point whose value it is given, if that is another one before (the input of a linear, for LoRA).
            name: what the new view calls it; from the module's class if None.

        Raises:
            UsageError: for no such point, a name that is taken, or a view with edits, which come after attached modules.
            AssignmentError: in a trace, where what the module returns does not fit.

        Example:
            >>> import torch
            >>> from nnatomy import Traceable
            >>> from torch.nn import Linear, ReLU, Sequential
            >>> net = Traceable(Sequential(Linear(4, 8), ReLU(), Linear(8, 2)))
            >>> spliced = net.attach("1.output", Sequential(Linear(8, 32), ReLU(), Linear(32, 8)), name="sae", how="error")
            >>> with spliced.trace(torch.ones(1, 4)) as tracer:
            ...     features = spliced.sae[1].output
            ...     y = tracer.result
            >>> features.shape, torch.allclose(y, net(torch.ones(1, 4)), atol=1e-5)
            (torch.Size([1, 32]), True)
        """
        if len(self._attached) < len(self.edits):
            raise UsageError(
                "This view has edits, and attached modules act before edits: attach first, model.attach(...).edit(...)."
            )
        where = self._point(point)
        name = self._free_name(name, module)
        attachment = Attachment(name, where, where if takes is None else self._point(takes), module, how)
        return self._with_edit(attachment)

    @property
    def _attached(self) -> dict[str, Attachment]:
        return {edit.name: edit for edit in self.edits if isinstance(edit, Attachment)}

    def _free_name(self, name: str | None, module: Module) -> str:
        taken, base = dir(self), type(module).__name__.lower()
        if name in taken:
            raise UsageError(f"attach(..., name={name!r}): the view has something of that name: give another.")
        return name or next(one for one in chain([base], (f"{base}_{i}" for i in count(1))) if one not in taken)

    def _point(self, point: str | ModuleView) -> Point:
        if isinstance(point, ModuleView):
            point = f"{point.path}.output"
        path, _, kind = point.rpartition(".") if isinstance(point, str) else ("", "", "")
        if kind not in ("input", "output"):
            raise UsageError(f"{point!r} is no point: {self._points}.")
        module = self[path].module if path else self.module
        return Point(point, module, kind, first_tensor, with_first_tensor)

    def _child(self, name: str) -> ModuleView:
        attached = self._attached.get(name) if self.edits else None
        return super()._child(name) if attached is None else self._module_view(attached.module, name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._attached]

    def without_edits(self) -> Any:
        """A view of the same module without lasting edits."""
        view = copy.copy(self)
        view.edits = ()
        return view

    def trace(self, *args: Any, early_stop: bool = True, **kwargs: Any) -> Trace:
        """Trace `module(*args, **kwargs)`: `with net.trace(x) as tracer: ...`.

        Without any, for several blocks with inputs of their own: see `Trace.invoke`.

        Args:
            early_stop: cancel the forward pass when the block ends; with False it runs to its end.
        """
        call = partial(self.module, *args, **kwargs) if args or kwargs else Joining(self.module)
        return self._new_trace(call, early_stop)

    def _new_trace(self, call: Callable[[], Any], early_stop: bool) -> Trace:
        return Trace(self, call, early_stop=early_stop)
