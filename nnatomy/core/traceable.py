"""The entry: any `torch.nn.Module`, with its calls open to look into."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

from torch.nn import Module

from nnatomy.core.block import Block, user_frames
from nnatomy.core.scan import on_fake_tensors
from nnatomy.core.trace import Trace
from nnatomy.core.views import ModuleView
from nnatomy.errors import NoSuchModuleError, OutsideTraceError


class Traceable(ModuleView):
    """A view of a whole module that can be traced.

    Example:
        >>> import torch
        >>> from nnatomy.core import Traceable
        >>> net = Traceable(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        >>> with net.trace(torch.ones(1, 4)) as tracer:
        ...     hidden = net[1].output
        ...     net[2].input = 0 * hidden
        ...     y = tracer.result
        >>> hidden.shape, torch.equal(y[0], net[2].module.bias)
        (torch.Size([1, 8]), True)
    """

    __slots__ = ("__dict__", "_traces")

    def __init__(self, module: Module) -> None:
        super().__init__(None, module, "")
        #: The traces that are open, by the thread of their blocks, the innermost last.
        self._traces: dict[int, list[Trace]] = {}

    def trace(self, *args: Any, early_stop: bool = True, **kwargs: Any) -> Trace:
        """Trace `module(*args, **kwargs)`: `with net.trace(x) as tracer: ...`.

        Args:
            early_stop: cancel the forward pass when the block ends; with False it runs to its end.
        """
        return Trace(self, lambda: self.module(*args, **kwargs), early_stop=early_stop)

    def trace_call(
        self, function: Callable[..., Any], *args: Any, early_stop: bool = True, **kwargs: Any
    ) -> Trace:
        """Trace `function(*args, **kwargs)`, which calls the module, once or (generating) many times."""
        return Trace(self, lambda: function(*args, **kwargs), early_stop=early_stop)

    def scan(self, *args: Any, early_stop: bool = True, **kwargs: Any) -> Trace:
        """A trace over fake tensors: shapes and dtypes without computing, and without weights if the
        module is on the meta device. Values read in the block are `FakeTensor`s."""
        return Trace(self, on_fake_tensors(self.module, args, kwargs), early_stop=early_stop)

    def paths(self, modules: Iterable[ModuleView | Module | str] | None = None) -> dict[Module, str]:
        """The modules that views, modules or paths name (all submodules by default), with their paths."""
        if modules is None:
            return {module: path for path, module in self.module.named_modules()}
        paths = {}
        for given in modules:
            if isinstance(given, Module):
                path = next((path for path, module in self.module.named_modules() if module is given), None)
                if path is None:
                    raise NoSuchModuleError(
                        f"{type(given).__name__} is not a submodule of {type(self.module).__name__}."
                    )
                paths[given] = path
            else:
                view = given if isinstance(given, ModuleView) else self[given]
                paths[view.module] = view._path
        return paths

    def open_block(self, name: str) -> Block:
        """The block of the trace that the user's line stands in.

        In one thread several can be open: one in the other's block (the inner one is meant), or in
        suspended generators (then the one is meant whose frame the line runs in).
        """
        traces = self._traces.get(get_ident())
        if not traces:
            raise OutsideTraceError(
                f"{name or 'the model'}: values exist only while the model runs. Ask for them inside "
                "`with model.trace(...):`, in the thread that opened it."
            )
        if len(traces) > 1:
            for frame in user_frames():
                for trace in reversed(traces):
                    if trace._frame is frame:
                        return trace.block
        return traces[-1].block

    def _block(self) -> Block:
        return self.open_block(self._path)

    def _child(self, name: str) -> ModuleView:
        view = super()._child(name)
        view._root = self
        return view

    def _opened(self, trace: Trace) -> None:
        self._traces.setdefault(trace._thread, []).append(trace)

    def _closed(self, trace: Trace) -> None:
        traces = self._traces[trace._thread]
        traces.remove(trace)
        if not traces:
            del self._traces[trace._thread]
