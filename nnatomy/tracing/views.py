"""Views whose modules show the calls inside their forward."""

from __future__ import annotations

from torch.nn import Module

from nnatomy.core import views
from nnatomy.tracing.source import Source


class ModuleView(views.ModuleView):
    """A module of a traced model, with the calls inside its forward."""

    __slots__ = ()

    @property
    def source(self) -> Source:
        """The calls inside the module's forward: `view.source.softmax.input`; printing it lists them."""
        return Source(self)

    def _module_view(self, module: Module, path: str, call: int = 0) -> ModuleView:
        return ModuleView(self._blocks, module, path, call)
