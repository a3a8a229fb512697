"""A weight of every layer: `model.W_Q[i]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, overload

from torch import Tensor

from nnatomy.errors import AssignmentError, LayerIndexError, NotInThisModelError, UsageError
from nnatomy.weights.names import WeightName as WeightName
from nnatomy.whole_number import whole_number


class WeightAccessor:
    """`model.W_Q[i]` is that weight of layer `i`, which may be negative; of a slice, a list.

    It is a view of the model's parameter where its entries lie regularly, and a copy otherwise; gradients come to the parameter
    in both. `nnatomy.weights.names` says what each is.

    Raises:
        LayerIndexError: for a layer that the model does not have.
        NotInThisModelError: where the layer has none; the text says why.
        ModelChangedError: if the model is no longer what its names were found on.
    """

    def __init__(self, model: Any, row: WeightName) -> None:
        self._model, self.row = model, row

    def __len__(self) -> int:
        return int(self._model.num_layers)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, layer: SupportsIndex) -> Tensor: ...

    @overload
    def __getitem__(self, layer: slice) -> list[Tensor]: ...

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        try:
            layer = whole_number(layer)
        except TypeError:
            raise LayerIndexError(
                f"{self.row.name}[{layer!r}]: layers are counted, 0 to {len(self) - 1}, or sliced."
            ) from None
        return self._model._weights.tensor(self._model, self.row.name, layer)

    if not TYPE_CHECKING:  # to type checkers there is nothing of the kind

        def __call__(self, *layers: Any) -> NoReturn:
            """Raise UsageError: a layer stands in square brackets."""
            name = self.row.name
            raise UsageError(
                f"{name}(...): a layer stands in square brackets, {name}[{', '.join(map(str, layers)) or 0}]."
            )

        def __setitem__(self, layer: Any, value: Any) -> NoReturn:
            """Raise AssignmentError: a weight is changed where it is."""
            name = self.row.name
            raise AssignmentError(
                f"{name}[{layer!r}] is a weight of the model: change its entries, with torch.no_grad(): "
                f"model.{name}[{layer!r}].copy_(new), where it is a view, or those of the module's own parameter."
            )

    def folded(self, layer: int) -> Tensor:
        """The same with the scale (a bias: with the shift) of the norm before it in it: a new tensor; the parameters stay.

        What it reads is then what the norm makes of its input before it multiplies and adds.
        """
        return self._model._weights.tensor(self._model, self.row.name, layer, folded=True)

    def refusals(self) -> dict[str, tuple[int, ...]]:
        """Why there is none, and on which layers."""
        reasons: dict[str, tuple[int, ...]] = {}
        for i in range(len(self)):
            try:
                self[i]
            except NotInThisModelError as error:
                why = str(error).partition(": there is none: ")[2].rstrip(".")
                reasons[why] = (*reasons.get(why, ()), i)
        return reasons

    def __repr__(self) -> str:
        return f"<{self.row.name}[layer]: ({self.row.shape.replace(' ', ', ')}). {self.row.doc.replace('`', '')}>"
