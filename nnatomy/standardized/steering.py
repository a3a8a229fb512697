"""What `steer` is given: a vector and layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.names import OF_LAYERS
from nnatomy.standardized.positions import is_finite
from nnatomy.whole_number import whole_number


def checked_vector(steering_vector: Any, factor: Any, hidden_size: int) -> Tensor:
    """The vector as a tensor. Raises InputError unless it and the factor are finite numbers, as wide as the stream."""
    try:
        vector = torch.as_tensor(steering_vector)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The steering vector is {type(steering_vector).__name__}, and no tensor: {error}. Give one of "
            f"({hidden_size}), such as layers_output[i][0, -1] of a trace; SteeringVector of nnatomy.methods makes one."
        ) from None
    if vector.is_complex():
        raise InputError("The steering vector is of complex numbers: give one of real ones.")
    if not isinstance(factor, (int, float, Tensor)):
        raise InputError(f"factor={factor!r}: it is a number.")
    if not is_finite(vector):
        raise InputError("The steering vector has entries that are NaN or infinite.")
    if vector.shape[-1:] != (hidden_size,):
        raise InputError(
            f"The steering vector is of shape {tuple(vector.shape)}, the model's residual stream of width "
            f"{hidden_size}: give one of (..., {hidden_size})."
        )
    return vector


def checked_layers(layers: Any) -> list[int]:
    """The layers to steer. Raises InputError for what are none."""
    each = [layers] if isinstance(layers, SupportsIndex) else layers
    if isinstance(each, str) or not isinstance(each, Iterable):
        elsewhere = ""
        if isinstance(layers, str) and layers in OF_LAYERS:
            elsewhere = f" At another name add it in the trace, model.{layers}[3] = model.{layers}[3] + vector."
        raise InputError(
            f"layers={layers!r}: steer adds a vector to the output of layers, by their numbers: steer(3, vector), steer([3, 5], "
            f"vector).{elsewhere}"
        )
    numbers = [*each]
    if not numbers:
        raise InputError("layers: give at least one to steer.")
    found = []
    for one in numbers:
        try:
            found.append(whole_number(one))
        except TypeError:
            raise InputError(f"layers={layers!r}: {one!r} is no number of a layer.") from None
    return found
