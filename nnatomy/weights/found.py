"""Which weights a model has, found when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import LayerIndexError, ModelError, NotInThisModelError, UsageError, counted
from nnatomy.weights.attention import find_attentions, find_cross_attentions
from nnatomy.weights.ends import find_embedding, find_unembedding
from nnatomy.weights.experts import ExpertsMatrix, Roles
from nnatomy.weights.folded import scale_and_shift
from nnatomy.weights.mlp import find_mlps
from nnatomy.weights.names import ROWS, WeightName
from nnatomy.weights.projection import Projection, RefusedError
from nnatomy.whole_number import whole_number

_BY_LAYER: dict[str, Callable[[Any], list[Roles]]] = {
    "attention": find_attentions,
    "cross-attention": find_cross_attentions,
    "mlp": find_mlps,
}


class Found:
    """What is known of the weights of a model. (Made anew when its names are: `StandardizedTransformer.refresh`.)"""

    def __init__(self) -> None:
        self._layers: dict[str, list[Roles]] = {}
        self._ends: dict[str, Projection | Callable[[], Tensor] | str] = {}

    def layers(self, model: Any, group: str) -> list[Roles]:
        """By layer, the projections of that group."""
        model._check_current()
        if group not in self._layers:
            self._layers[group] = _BY_LAYER[group](_unedited(model, group))
        return self._layers[group]

    def tensor(self, model: Any, name: str, layer: int | None = None, folded: bool = False) -> Tensor:
        """A weight. Raises NotInThisModelError where the model has none, with the reason."""
        row = ROWS[name]
        where = f"{name}[{layer}]" if row.by_layer else name
        try:
            found = self._of_layer(model, row, layer) if row.by_layer else self._end(model, row)
            if isinstance(found, str):
                raise RefusedError(found)
            if not isinstance(found, (Projection, ExpertsMatrix)):
                if folded:
                    raise RefusedError("no norm is before it")
                return found()
            return _folded(found, row) if folded else found.bias() if row.is_bias else found.matrix()
        except RefusedError as error:
            raise NotInThisModelError(f"{where}: there is none: {error}.") from None

    def projection(self, model: Any, role: str, layer: int, group: str = "attention") -> Projection:
        """A projection of a layer. Raises NotInThisModelError, with the reason."""
        row = next(row for row in ROWS.values() if (row.group, row.role) == (group, role))
        found = self._of_layer(model, row, layer)
        if isinstance(found, str):
            raise NotInThisModelError(f"{row.name}[{layer}]: there is none: {found}.")
        if isinstance(found, ExpertsMatrix):
            raise NotInThisModelError(f"{row.name}[{layer}]: there is one of each expert.")
        return found

    def _of_layer(self, model: Any, row: WeightName, layer: int | None) -> Projection | ExpertsMatrix | str:
        layers, count = self.layers(model, row.group), model.num_layers
        try:
            number = range(count)[whole_number(layer)]
        except (IndexError, TypeError):
            raise LayerIndexError(
                f"{row.name}[{layer!r}]: the model has {counted(count, 'layer')}, 0 to {count - 1}."
            ) from None
        return layers[number][row.role]

    def _end(self, model: Any, row: WeightName) -> Projection | Callable[[], Tensor] | str:
        model._check_current()
        if row.group not in self._ends:
            find = find_embedding if row.group == "embedding" else find_unembedding
            try:
                self._ends[row.group] = find(_unedited(model, row.group))
            except RefusedError as error:
                self._ends[row.group] = str(error)
            except ModelError as error:
                self._ends[row.group] = str(error).partition(": ")[2].rstrip(".")
        return self._ends[row.group]


def _unedited(model: Any, group: str) -> Any:
    if model._blocks.is_open_here:
        raise UsageError(
            f"The weights of {group} are looked for when they are first asked for, by a pass of the model: ask for them once before "
            "the trace."
        )
    return model.without_edits() if model.edits else model


def _folded(found: Projection | ExpertsMatrix, row: WeightName) -> Tensor:
    if found.norm is None or found.side == "reads":
        raise RefusedError("no norm gives what it reads")
    scale, shift = scale_and_shift(found.norm)
    if not row.is_bias:
        return scale[:, None] * found.matrix()
    if shift is None:
        return found.bias()
    return found.bias() + torch.tensordot(shift, found.matrix(), ([0], [-2]))
