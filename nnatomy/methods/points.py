"""The standard names of layers, as points that methods patch, read and attribute to: which there are, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.names import row_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import LayerAccessor


class Axes(NamedTuple):
    """The axes of an accessor's value: of positions (queries' positions, where there are two), and of heads."""

    seq: int
    head: int | None


def axes_of(point: str) -> Axes:
    """The axes of that accessor's values."""
    row = row_of(point)
    assert row.seq is not None
    return Axes(row.seq, row.head)


def attends_to_encoder(point: str) -> bool:
    """Whether its values have an axis of what an encoder reads, beside that of what the decoder reads."""
    row = row_of(point)
    return row.part == "cross_attentions" and "key" in row.axes


def accessor_of(model: StandardizedTransformer, point: str) -> LayerAccessor:
    """The accessor of that name. Raises InputError if there is none."""
    accessor = vars(model).get(point) if isinstance(point, str) else None
    if not isinstance(accessor, LayerAccessor):
        names = ", ".join(name for name, one in vars(model).items() if isinstance(one, LayerAccessor))
        raise InputError(f"{point!r} is no standard name of layers: give one of {names}.")
    return accessor


def streams_of(model: StandardizedTransformer, accessor: LayerAccessor) -> tuple[LayerAccessor, LayerAccessor]:
    """`layers_input` and `layers_output` of the layers that have the accessor's values: the model's, or its encoder's."""
    part = "encoder_" * accessor.of_encoder
    return getattr(model, f"{part}layers_input"), getattr(model, f"{part}layers_output")


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


def layers_of(accessor: LayerAccessor, layers: int | Sequence[int] | None) -> list[int]:
    """Those layers, counted from the first; all that have such a value if None. Raises the accessor's errors."""
    if layers is None:
        chosen = layers_with(accessor)
        for layer in chosen or [0]:
            accessor.module(layer)  # raises, with the reason, where no layer has one
        return chosen
    chosen = [layers] if isinstance(layers, int) else [*layers]
    if not chosen:
        raise InputError("layers: give at least one.")
    for layer in chosen:
        accessor.module(layer)
    return [layer % len(accessor) for layer in chosen]


def refuse_crossing(model: StandardizedTransformer, what: str) -> None:
    """Raises NotInThisModelError for a decoder whose layers attend to an encoder: not all of its paths are known to `what`."""
    if layers_with(model.cross_attentions_contribution):
        raise NotInThisModelError(
            f"{what} takes a layer apart into token mixer and MLP, and layers of {type(model.hf_model).__name__} have a "
            "cross-attention, too: cross_attentions_contribution."
        )
