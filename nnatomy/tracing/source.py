"""The calls inside a module's forward: values between modules, read and replaced while the model runs.

Nothing is rewritten: a mode of torch's sees every torch function that the forward, or a helper that it calls, calls,
operators included. Where the call stands in the source gives it its name, so that it has the same one in every call, step and
run: `softmax`, `softmax_1` for the second softmax in that function's text, `attend.softmax` in a helper that the
forward calls as `attend(...)`. Functions of Python's alone are no calls here: what they compute is what the torch
functions in them do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nnatomy.call_sites import call_sites, forward_code
from nnatomy.core import views
from nnatomy.core.points import Collector, Report, Slot
from nnatomy.core.progress import ENTERING
from nnatomy.core.values import Calls, Values

_LISTED = "listed"


class SourceCall(NamedTuple):
    """A torch function called inside a module's forward.

    Attributes:
        name: `module.source[name]` reads and replaces its values.
        function: which torch function.
        file, line, text: where.
        shapes: of the tensors that it returned.
    """

    name: str
    function: str
    file: str
    line: int
    text: str
    shapes: tuple[torch.Size, ...]


class Source(Values):
    """`module.source`: the calls inside the module's forward, by name; `module.source[name]` is one of them.

    Iterating (or printing) lists them. In a trace that lets the module run; outside of one, where the model knows
    an input to run on.

    Example:
        >>> import torch
        >>> from nnatomy import Traceable
        >>> net = Traceable(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Softmax(-1)))
        >>> with net.trace(torch.ones(1, 4)) as tracer:
        ...     scores = net[1].source.softmax.input
        ...     net[1].source.softmax.output = torch.ones(1, 2)
        ...     tracer.result
        tensor([[1., 1.]])
    """

    def __init__(self, view: ModuleView, name: str = "", time: int = 0) -> None:
        self._view = view
        self._name = name
        self._time = time
        self.path = f"{view.path}.source.{name}"

    def __getattr__(self, name: str) -> Source:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Source:
        return Source(self._view, f"{self._name}.{name}" if self._name else name)

    @property
    def calls(self) -> Calls[Source]:
        """The times that this call is made in one call of the module: `source.softmax.calls[1].output`."""
        return Calls(self.path, partial(Source, self._view, self._name))

    def _asking(self, kind: str, name: str) -> Callable[[], Slot]:
        written = f"source.{self._name}.{name}"
        return self._view._asking(_kind(self._name, self._time, kind), written, SourceMode)

    def __str__(self) -> str:
        rows = [(str(call.line), call.name, ", ".join(str(tuple(s)) for s in call.shapes), call.text) for call in self]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)

    def __repr__(self) -> str:
        name = f"{self._view.path or type(self._view.module).__name__}.source"
        return f"<{name}{'.' * bool(self._name)}{self._name}: print it to list its calls>"

    def __iter__(self) -> Iterator[SourceCall]:
        view = self._view
        listing = _Listing(view.module)
        blocks = view._blocks
        example = None if blocks.is_open_here else blocks.example
        with example(blocks) if example else nullcontext():
            block = blocks.current(view.path)
            block.reach(view.module, "input", f"{view.path}.source", view._call)
            with block.run.collecting(listing):
                block.reach(view.module, "output", f"{view.path}.source", view._call)
        under = f"{self._name}." if self._name else ""
        return iter([call for call in listing.calls if f"{call.name}.".startswith(under)])


class ModuleView(views.ModuleView):
    """A module of a traced model, with the calls inside its forward."""

    __slots__ = ()

    @property
    def source(self) -> Source:
        """The calls inside the module's forward: `view.source.softmax.input`; printing it lists them."""
        return Source(self)

    def _module_view(self, module: Module, path: str, call: int = 0) -> ModuleView:
        return ModuleView(self._blocks, module, path, call)


class _Listing(Collector):
    """Every call that is made in the module."""

    def __init__(self, module: Module) -> None:
        self.modules = {module}
        self.kinds = {_LISTED: SourceMode}
        self.calls: list[SourceCall] = []

    def take(self, slot: Slot) -> None:
        self.calls.append(slot.value)


def _kind(name: str, time: int | str, what: str) -> str:
    return f"source {name}[{time}].{what}"


class SourceMode(TorchFunctionMode):
    """Shows every torch function that one call of a module calls to `report`: its arguments, and what it returns."""

    @staticmethod
    def hint(name: str) -> str:
        """What may help where there is no such call."""
        return (
            f" print({name.rpartition('.source.')[0].removeprefix('the ')}.source) lists its calls. (Of a call in a loop, ask before "
            "anything else in the module: once it is at work nobody has counted the rounds.)"
        )

    def __init__(self, module: Module, report: Report) -> None:
        super().__init__()
        self._module = module
        self._report = report
        self._times: Counter[str] = Counter()
        self._forward = forward_code(module)
        innermost, _, stage = report.run.progress.stack[-1]
        self._from_the_start = innermost is module and stage == ENTERING

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_inside = self._report.run.progress.stack[-1][0] is self._module
        sites = call_sites(self._forward) if is_inside and func.__name__ != "__get__" else []
        if not sites:
            return func(*args, **kwargs)
        name = ".".join(site.name for site in sites)
        count = self._times[name]
        self._times[name] += 1
        # If the forward was at work before this mode was put on, the rounds of its loops have not been counted.
        is_counted = self._from_the_start or not any(site.in_loop for site in sites)
        time = count if is_counted else "?"
        args, kwargs = self._report((args, kwargs), _kind(name, time, "input")).value
        result = self._report(func(*args, **kwargs), _kind(name, time, "output")).value
        shapes = tuple(leaf.shape for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        if shapes:
            full = torch.overrides.resolve_name(func) or func.__name__
            self._report(SourceCall(name, full, *sites[-1].place, shapes), _LISTED)
        return result
