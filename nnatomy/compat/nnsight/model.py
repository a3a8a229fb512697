"""`NNsight`: any module under nnsight's names."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.nn import Module

from nnatomy.blocks.capture import EditBlock
from nnatomy.blocks.joining import Joining
from nnatomy.blocks.schedule import Invoke
from nnatomy.compat.nnsight.backward import operations_after
from nnatomy.compat.nnsight.envoy import ROOT, Aliases, Envoy, Naming
from nnatomy.compat.nnsight.errors import ValueInputError
from nnatomy.compat.nnsight.iteration import Iteration
from nnatomy.compat.nnsight.saving import mounted
from nnatomy.compat.nnsight.tracer import EditTracer, as_tracer
from nnatomy.core.frames import frame_of_with, warn
from nnatomy.errors import InputError, a_kind
from nnatomy.tracing import Traceable

_UNSET: Any = object()
#: What nnsight takes and makes no use of, or what makes no difference here.
_IDLE = ("scan", "validate", "blocking", "backend", "strict_remote")


class NNsight(Envoy, Traceable):
    """A module under nnsight's names.

    Args:
        module: any.
        rename: aliases: `{"transformer.h": "layers"}`.
        envoys: a class of envoys for all submodules, or a dict of them by module class or path.
    """

    envoys: Any = None

    def __init__(self, module: Module, *, rename: Aliases | None = None, envoys: Any = _UNSET, **_: Any) -> None:
        self._naming = Naming(rename, type(self).envoys if envoys is _UNSET else envoys)
        super().__init__(module)
        self._name_root()

    def _name_root(self) -> None:
        self.path = ROOT
        if any("output" in one._modules for one in self.module.modules()):
            warn(
                f"In {a_kind(self.module)} some modules have a child called `output`: there `.output` is that child, and "
                "`.nns_output` what the module returns."
            )

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            which = which.removeprefix(f"{ROOT}.") if ROOT not in self.module._modules else which
            if which in ("", ROOT):
                return self
        return super().__getitem__(which)

    @property
    def _model(self) -> Module:
        return self.module

    @property
    def device(self) -> Any:
        """Where its first parameter is."""
        return next((one.device for one in self.module.parameters()), None)

    @property
    def dispatched(self) -> bool:
        """True: a model is loaded with its weights."""
        return True

    def dispatch(self, *_: Any, **__: Any) -> None:
        """Nothing: the model is loaded."""

    # Running.

    def trace(self, *args: Any, remote: Any = False, trace: bool = True, **kwargs: Any) -> Any:
        """`with model.trace(x) as tracer:`; with `trace=False`, what the model returns."""
        _local(remote, type(self).__name__)
        kwargs = _used(kwargs)
        if not trace:
            return self(*args, **kwargs)
        opened = super().trace(*args, **kwargs)
        if not (args or kwargs):
            opened._call = Joining(partial(_called, self.module))
        return as_tracer(opened)

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        """The same over fake tensors."""
        return as_tracer(super().scan(*args, **kwargs))

    def session(self, *_: Any, remote: Any = False, **__: Any) -> Any:
        """A `with` around traces. Values go from one to the next also without it."""
        _local(remote, "session")
        return mounted()

    @property
    def iter(self) -> Any:
        """`tracer.iter` of the trace that is open; in the body of an edit, which is run in every step, of the step at hand."""
        block = self._blocks.current("iter")
        return EditTracer(self) if isinstance(block, Invoke) and block.lasting else Iteration(block)

    def all(self) -> Any:
        """All steps: `tracer.all()`."""
        return self.iter[:]

    # Editing.

    def edit(self, edit: Any = None, *, inplace: bool = False, **_: Any) -> Any:
        """`with model.edit() as edited:`, or `as (tracer, edited)`: a view whose every trace and step makes this edit.

        Args:
            edit: a function, instead of the block.
            inplace: this view itself is to make it, until `clear_edits()`.
        """
        keep = self._keep_edit if inplace else self._with_edit
        return _EditBlock(keep) if edit is None else keep(edit)

    def _keep_edit(self, edit: Any) -> Any:
        self.edits = (*self.edits, edit)
        return self

    def clear_edits(self) -> None:
        """Make none of the edits any more that were made in place."""
        self.edits = ()


class _EditBlock(EditBlock):
    def __enter__(self) -> Any:
        edited = super().__enter__()
        taken_apart = operations_after(frame_of_with())[:1] == ["UNPACK_SEQUENCE"]
        return (EditTracer(edited), edited) if taken_apart else edited


def _called(module: Module, *args: Any, **kwargs: Any) -> Any:
    try:
        return module(*args, **kwargs)
    except TypeError as error:
        if args or kwargs:
            raise
        raise ValueInputError(
            f"Cannot access a value: the trace has no input, so that there is no interleaving with a forward pass ({error}). Give "
            "one, model.trace(x), or blocks with an input each, `with tracer.invoke(x):`."
        ) from None


def _used(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _IDLE}


def _local(remote: Any, what: str) -> None:
    if remote not in (False, None, "local"):
        raise InputError(
            f"{what}: remote={remote!r}: there is no NDIF here. A LanguageModel's traces are sent to a server of nnatomy's own, "
            "one by one: set model.server, or NNATOMY_SERVER, and write model.trace(prompt, remote=True). See docs/remote.md."
        )
