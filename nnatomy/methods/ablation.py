"""Ablating a direction: what the model does when nothing in its residual stream lies along it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.arguments import method
from nnatomy.methods.points import accessor_of, has, streams_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import is_finite

#: In the order of a forward pass.
_POINTS = (
    *("layers_input", "mixers_contribution", "cross_attentions_contribution"),
    *("mlps_contribution", "layers_output"),
)


@method
def ablate_direction(
    model: StandardizedTransformer,
    direction: Float[Tensor, " hidden"],
    *,
    layers: int | Sequence[int] | None = None,
    points: str | Sequence[str] | None = None,
) -> None:
    """Take what lies along a direction out of the residual stream, at every position.

    Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction" (arXiv 2406.11717, equation 4):
    x - r (r . x), where r is the direction at length 1. Call it in a block, or in a function for `model.edit`.

    Args:
        direction: of any length.
        layers: one or several; all if None.
        points: standard names of (batch, seq, hidden), in the order in which a layer has them. (Of an encoder-decoder those of
            its encoder, too: encoder_layers_output.) If None: what goes into a layer, what its token mixers, cross-attention and
            MLP add (on layers that have these names) and what comes out, so that no part of the layer reads or writes it.

    Raises:
        InputError: if the direction is not as wide as the stream, or is zero.
        LayerIndexError, NotInThisModelError: for a point that the model does not have.

    Example:
        >>> import torch
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import ablate_direction
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> direction = torch.randn(model.hidden_size)
        >>> with model.edit(lambda: ablate_direction(model, direction)).trace("The capital of France is"):
        ...     hidden = model.layers_output[5]
        >>> bool((hidden @ direction).abs().max() < 1e-3)
        True
    """
    direction = torch.as_tensor(direction)
    if direction.shape != (model.hidden_size,):
        raise InputError(
            f"The direction is of shape {tuple(direction.shape)}, the model's residual stream of width {model.hidden_size}."
        )
    if not is_finite(direction):
        raise InputError("The direction has entries that are NaN or infinite.")
    if not bool(direction.any()):
        raise InputError("The direction is zero.")
    unit = direction.detach().cpu().double()
    unit = unit / unit.norm()
    layers = [layers] if isinstance(layers, int) else layers
    points = [points] if isinstance(points, str) else points
    accessors = [accessor_of(model, name) for name in (_POINTS if points is None else points)]
    for of_encoder in (True, False):  # which runs before the decoder
        part = [accessor for accessor in accessors if accessor.of_encoder == of_encoder]
        if not part:
            continue
        every = range(len(part[0]))
        if layers is not None:
            first, _ = streams_of(model, part[0])
            for layer in layers:
                first.module(layer)  # raises where there is none
        for layer in every if layers is None else sorted(every[layer] for layer in layers):
            for accessor in part:
                if points is None and not has(accessor, layer):
                    continue
                value = accessor[layer]
                if value.shape[-1:] != direction.shape or value.ndim != 3:
                    raise InputError(
                        f"{accessor.name}[{layer}] is of {tuple(value.shape)}, and no point of (batch, seq, {model.hidden_size})."
                    )
                dtype = torch.promote_types(value.dtype, torch.float32)
                along, wide = unit.to(value.device, dtype), value.to(dtype)
                accessor[layer] = (wide - (wide @ along)[..., None] * along).to(value.dtype)
