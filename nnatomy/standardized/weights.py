"""The weights of a model, under standard names."""

from __future__ import annotations

from typing import Any, NoReturn, overload

from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import AssignmentError, LayerIndexError
from nnatomy.standardized.parts import Parts
from nnatomy.weights import ROWS, FactoredMatrix, Found, WeightAccessor, composition_scores, ov, qk
from nnatomy.whole_number import whole_number
from nnatomy.words import ReadAs


class _ByLayer:
    """`model.W_Q`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self.__doc__ = name, ROWS[name].doc

    @overload
    def __get__(self, model: None, owner: Any) -> _ByLayer: ...

    @overload
    def __get__(self, model: Parts, owner: Any) -> WeightAccessor: ...

    def __get__(self, model: Any, owner: Any) -> Any:
        return self if model is None else WeightAccessor(model, ROWS[self._name])

    def __set__(self, model: Any, value: Any) -> NoReturn:
        raise AssignmentError(
            f"{self._name} is a weight of the model: change its entries, model.{self._name}[i].copy_(new) under torch.no_grad(), "
            "where it is a view, or those of the module's own parameter."
        )


class Weights(Parts):
    """A model's weights: `W_Q[i]` of a layer, `W_E` of the model. `nnatomy.weights.names` says what each promises.

    Each is proved by value, on a short prompt, when one of its kind is first asked for, and has the parameter's values of the moment.
    """

    _weights: Found

    W_Q = _ByLayer()
    W_K = _ByLayer()
    W_V = _ByLayer()
    W_O = _ByLayer()
    b_Q = _ByLayer()  # noqa: N815
    b_K = _ByLayer()  # noqa: N815
    b_V = _ByLayer()  # noqa: N815
    b_O = _ByLayer()  # noqa: N815
    W_cross_Q = _ByLayer()
    W_cross_K = _ByLayer()
    W_cross_V = _ByLayer()
    W_cross_O = _ByLayer()
    b_cross_Q = _ByLayer()  # noqa: N815
    b_cross_K = _ByLayer()  # noqa: N815
    b_cross_V = _ByLayer()  # noqa: N815
    b_cross_O = _ByLayer()  # noqa: N815
    W_in = _ByLayer()
    W_gate = _ByLayer()
    W_out = _ByLayer()
    b_in = _ByLayer()
    b_gate = _ByLayer()
    b_out = _ByLayer()

    @property
    def W_E(self) -> Float[Tensor, "vocab hidden"]:  # noqa: N802
        """`W_E[input_ids]` is `token_embeddings`."""
        return self._weights.tensor(self, "W_E")

    @property
    def W_U(self) -> Float[Tensor, "hidden vocab"]:  # noqa: N802
        """What the final norm gives, `@ W_U + b_U`, is the logits before caps and scales."""
        return self._weights.tensor(self, "W_U")

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:  # noqa: N802
        """See `W_U`; zeros where there is none."""
        return self._weights.tensor(self, "b_U")

    def folded_unembedding(self) -> tuple[Float[Tensor, "hidden vocab"], Float[Tensor, " vocab"]]:
        """`W_U` and `b_U` with the scale and shift of the final norm in them: new tensors; the parameters stay."""
        return self._weights.tensor(self, "W_U", folded=True), self._weights.tensor(self, "b_U", folded=True)

    def QK(self, layer: int) -> FactoredMatrix:  # noqa: N802
        """Of (head, hidden, hidden), not formed: `x @ QK @ y` is the score of query `x` and key `y`, but for biases,
        rotary embedding and scale.

        Raises:
            NotInThisModelError: where the layer has no such weights, or norms stand behind them (as in Qwen3).
        """
        return qk(self, layer)

    def OV(self, layer: int) -> FactoredMatrix:  # noqa: N802
        """Of (head, hidden, hidden), not formed: `x @ OV` is what a head writes where it attends to `x`, but for biases.

        Raises:
            NotInThisModelError: where the layer has no such weights, or a gate or norm stands behind them.
        """
        return ov(self, layer)

    def composition_scores(self, earlier: int, later: int, by: ReadAs) -> Float[Tensor, "earlier_head later_head"]:
        """How much heads of a later layer read of what those of an earlier one write (Elhage et al. 2021), 0 to 1.

        Args:
            by: as what they read it: "Q" (queries), "K" (keys) or "V" (values).
        """
        return composition_scores(self, earlier, later, by)

    def kv_head(self, head: int) -> int:
        """Which head of keys and values a query head has; several may share one."""
        try:
            found = whole_number(head)
        except TypeError:
            found = -1
        if not 0 <= found < self.num_heads:
            raise LayerIndexError(
                f"kv_head({head!r}): the model has {self.num_heads} heads, 0 to {self.num_heads - 1}."
            )
        return found // (self.num_heads // self.num_kv_heads)
