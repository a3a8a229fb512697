"""Which names and layers are meant, and where what is kept of them goes."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch

from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.asked_for import check_cuda
from nnatomy.standardized.elsewhere import said_of

#: One layer, several, or a slice of them; all that have such a value if None.
Layers = int | Sequence[int] | slice | None


def accessors_of(model: Any) -> dict[str, LayerAccessor]:
    """All standard names of layers."""
    return {name: one for name, one in vars(model).items() if isinstance(one, LayerAccessor)}


def accessor_of(model: Any, point: str) -> LayerAccessor:
    """The accessor of that name. Raises InputError if there is none."""
    accessors = accessors_of(model)
    if not isinstance(point, str) or point not in accessors:
        near = get_close_matches(point, accessors, n=1) if isinstance(point, str) else []
        hint = f" Did you mean {near[0]}?" if near else said_of(point) if isinstance(point, str) else ""
        raise InputError(f"{point!r} is no standard name of layers: give one of {', '.join(accessors)}.{hint}")
    return accessors[point]


def has(accessor: LayerAccessor, layer: int) -> bool:
    """Whether there is such a thing on that layer."""
    try:
        accessor.module(layer)
    except NotInThisModelError:
        return False
    return True


def layers_with(accessor: LayerAccessor) -> list[int]:
    """The layers that have such a value."""
    return [layer for layer in range(len(accessor)) if has(accessor, layer)]


def layers_of(accessor: LayerAccessor, layers: Layers) -> list[int]:
    """Those layers, counted from the first; all that have such a value if None. Raises the accessor's errors."""
    if layers is None:
        chosen = layers_with(accessor)
        for layer in chosen or [0]:
            accessor.module(layer)  # raises, with the reason, where no layer has one
        return chosen
    if isinstance(layers, slice):
        layers = range(len(accessor))[layers]
    chosen = [layers] if isinstance(layers, int) else [*layers]
    if not chosen:
        raise InputError("layers: give at least one.")
    for layer in chosen:
        accessor.module(layer)
    return [layer % len(accessor) for layer in chosen]


def check_kept_as(dtype: Any, device: Any) -> None:
    """Raise InputError unless values can be kept as that dtype, on that device."""
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise InputError(f"dtype={dtype!r}: give a torch.dtype, such as torch.float32.")
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(
            f"dtype={dtype}: values would lose their fractions. Give one of floating point, such as torch.float16."
        )
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    check_cuda("device", device)
