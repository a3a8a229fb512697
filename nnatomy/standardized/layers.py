"""Views of the layers, with the standard names of their attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.nn import Module

from nnatomy.arch_configs import ArchConfig
from nnatomy.core import ModuleView
from nnatomy.errors import NotInThisModelError


class LayerView(ModuleView):
    """A layer, whose attention and MLP are also reached as `self_attn` and `mlp`."""

    __slots__ = ("_config",)

    def __init__(self, model: ModuleView, layer: Module, path: str, config: ArchConfig) -> None:
        super().__init__(model._blocks, layer, path)
        self._config = config

    def _child(self, name: str) -> ModuleView:
        if name == "self_attn":
            return self[self._config.self_attn] if self._config.self_attn != name else super()._child(name)
        if name == "mlp":
            if self._config.mlp is None:
                absent = self._config.absent.get("mlp", "it has no MLP module")
                raise NotInThisModelError(f"{self.path}.mlp: this layer has none: {absent}.")
            return self[self._config.mlp] if self._config.mlp != name else super()._child(name)
        return super()._child(name)


class Views(Sequence[ModuleView]):
    """One child of every layer."""

    def __init__(self, layers: tuple[LayerView, ...], name: str) -> None:
        self._layers = layers
        self._name = name

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [view[self._name] for view in self._layers[layer]]
        return self._layers[layer][self._name]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[ModuleView]:
        return (view[self._name] for view in self._layers)
