"""Views of the layers, with the standard names of their attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

from torch.nn import Module

from nnatomy.arch_configs import Anatomy
from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.errors import LayerIndexError, NotInThisModelError, counted
from nnatomy.standardized.pickling import NotPickled
from nnatomy.tracing import ModuleView
from nnatomy.whole_number import whole_number


class LayerView(NotPickled, ModuleView):
    """A layer, whose attention and MLP are also reached as `self_attn` and `mlp`."""

    __slots__ = ("_absent", "_parts", "_paths")

    def __init__(
        self, blocks: OpenBlocks, layer: Module, paths: dict[Module, str], anatomy: Anatomy, index: int
    ) -> None:
        super().__init__(blocks, layer, paths[layer])
        self._paths = paths
        self._parts = {"self_attn": anatomy.attentions[index], "mlp": anatomy.mlps[index]}
        self._absent = {"self_attn": anatomy.absent["attention"][index], "mlp": anatomy.absent["mlp"][index]}

    def _child(self, name: str) -> ModuleView:
        own = name in self.module._modules  # what the model itself calls so
        if name not in self._parts or (own and self._parts[name] is None):
            return super()._child(name)
        return self.part(name)

    def part(self, name: str) -> ModuleView:
        """`self_attn` or `mlp`. Raises NotInThisModelError if the layer has none."""
        part = self._parts[name]
        if part is None:
            raise NotInThisModelError(f"{self.path}.{name}: this layer has none: {self._absent[name]}.")
        inner = (path for path, module in self.module.named_modules(prefix=self.path) if module is part)
        return ModuleView(self._blocks, part, next(inner, self._paths[part]))


class LayerViews(tuple[LayerView, ...]):
    """All layers, by their numbers."""

    __slots__ = ()

    def __getitem__(self, layer: Any) -> Any:
        """Raises LayerIndexError for a layer that there is not."""
        return super().__getitem__(
            layer if isinstance(layer, slice) else _number(layer, f"layers[{layer!r}]", len(self))
        )


class Views(NotPickled):
    """One child of every layer."""

    def __init__(self, layers: tuple[LayerView, ...], name: str) -> None:
        self._layers = layers
        self._name = name

    @overload
    def __getitem__(self, layer: int) -> ModuleView: ...

    @overload
    def __getitem__(self, layer: slice) -> list[ModuleView]: ...

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [view.part(self._name) for view in self._layers[layer]]
        return self._layers[_number(layer, f"{self._name} of layer {layer!r}", len(self))].part(self._name)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[ModuleView]:
        return (view.part(self._name) for view in self._layers)


def _number(layer: Any, what: str, count: int) -> int:
    """The number of a layer of so many. Raises LayerIndexError."""
    try:
        if -count <= (found := whole_number(layer)) < count:
            return found
    except TypeError:
        raise LayerIndexError(f"{what}: layers are counted, 0 to {count - 1}, or sliced.") from None
    raise LayerIndexError(f"{what}: the model has {counted(count, 'layer')}, 0 to {count - 1}.")
