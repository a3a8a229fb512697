"""Products of an attention's weights: what its heads compare, and what they move."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.weights.factored import FactoredMatrix
from nnatomy.whole_number import whole_number
from nnatomy.words import ReadAs


def qk(model: Any, layer: int) -> FactoredMatrix:
    """Of (head, hidden, hidden): `x @ QK @ y` is the score of query `x` and key `y` but for biases, rotary embedding and scale."""
    _check_plain(model, "QK", layer, {"Q": "queries", "K": "keys"})
    query, key = model.W_Q[layer], model.W_K[layer]
    return FactoredMatrix(query, _for_heads(key, len(query)).mT)


def ov(model: Any, layer: int) -> FactoredMatrix:
    """Of (head, hidden, hidden): `x @ OV` is what a head writes where it attends to `x`, but for biases."""
    _check_plain(model, "OV", layer, {"V": "values", "O": "what the heads give"})
    value, out = model.W_V[layer], model.W_O[layer]
    return FactoredMatrix(_for_heads(value, len(out)), out)


def composition_scores(model: Any, earlier: int, later: int, by: ReadAs) -> Float[Tensor, "earlier_head later_head"]:
    """How much of what heads of one layer write is read by heads of a later one (Elhage et al. 2021).

    The Frobenius norm of the product of the two circuits over the product of their norms: 0 to 1.

    Args:
        by: what the later heads read it as: "Q" (queries), "K" (keys) or "V" (values).
    """
    if by not in ("Q", "K", "V"):
        raise InputError(f"by={by!r}: it is 'Q', 'K' or 'V'.")
    places = range(model.num_layers)
    try:
        first, second = places[whole_number(earlier)], places[whole_number(later)]
    except (IndexError, TypeError):
        first = second = -1
    if first >= second:
        raise InputError(
            f"Layers {earlier!r} and {later!r}: the first is before the second, of 0 to {model.num_layers - 1}."
        )
    writes = ov(model, first)
    reads = ov(model, second) if by == "V" else qk(model, second) if by == "Q" else qk(model, second).T
    both = FactoredMatrix(writes.left[:, None], writes.right[:, None]) @ FactoredMatrix(
        reads.left[None], reads.right[None]
    )
    assert isinstance(both, FactoredMatrix)
    return both.norm() / (writes.norm()[:, None] * reads.norm())


def _for_heads(weight: Tensor, heads: int) -> Tensor:
    """By query head: head `h` has the keys and values of key-value head `h // (heads // kv_heads)`."""
    return weight if len(weight) == heads else weight.repeat_interleave(heads // len(weight), 0)


def _check_plain(model: Any, name: str, layer: int, roles: dict[str, str]) -> None:
    for role, what in roles.items():
        if not model._weights.projection(model, role, layer).plain:
            raise NotInThisModelError(
                f"{name}[{layer}]: there is none: between the projection and {what} stands a norm, a gate or clipping, so that no "
                f"one matrix is what the heads compute. FactoredMatrix of W_{' and W_'.join(roles)} is the product without it."
            )
