"""A matrix with the scale of the norm before it in it; the model's own parameters stay as they are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from nnatomy.standardized.offloaded import value_of
from nnatomy.validation.near import is_near
from nnatomy.weights.projection import RefusedError


def scale_and_shift(norm: Module) -> tuple[Tensor, Tensor | None]:
    """What a norm multiplies by, and what it adds behind that: told from what it gives for a vector of one size and its opposite."""
    own = {name: value_of(norm, name) for name, _ in norm.named_parameters()}
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None:
        raise RefusedError(f"the norm before it ({type(norm).__name__}) has no scale")
    vector = weight.detach().new_full(weight.shape, 64.0)
    vector[1::2] = -64
    gave, opposite = (norm(one[None, None])[0, 0].detach() for one in (vector, -vector))
    measured, added = (gave - opposite) / 2 * vector.sign(), (gave + opposite) / 2
    scale = next((one for one in (weight, 1 + weight) if is_near(one.detach().to(measured), measured)), None)
    shifted = bias.detach() if bias is not None else added * 0
    if scale is None or float((added - shifted).abs().max()) > 0.01 * float(measured.abs().max()):
        raise RefusedError(
            f"what the norm before it ({type(norm).__name__}) multiplies by is neither its weight nor 1 + weight"
        )
    return scale, bias
