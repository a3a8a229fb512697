"""The entry: any `torch.nn.Module`, with its calls open to look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import Module

from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.scan import on_fake_tensors
from nnatomy.core.trace import Trace
from nnatomy.core.views import ModuleView


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
