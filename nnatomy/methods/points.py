"""The standard names of layers, as points that methods patch, read and attribute to: which there are, and where."""

from __future__ import annotations

from typing import NamedTuple

from nnatomy.errors import NotInThisModelError
from nnatomy.names import row_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.standardized.choice import accessor_of as accessor_of
from nnatomy.standardized.choice import has as has
from nnatomy.standardized.choice import layers_of as layers_of
from nnatomy.standardized.choice import layers_with as layers_with


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


def streams_of(model: StandardizedTransformer, accessor: LayerAccessor) -> tuple[LayerAccessor, LayerAccessor]:
    """`layers_input` and `layers_output` of the layers that have the accessor's values: the model's, or its encoder's."""
    part = "encoder_" * accessor.of_encoder
    return getattr(model, f"{part}layers_input"), getattr(model, f"{part}layers_output")


def refuse_crossing(model: StandardizedTransformer, what: str) -> None:
    """Raises NotInThisModelError for a decoder whose layers attend to an encoder: not all of its paths are known to `what`."""
    if layers_with(model.cross_attentions_contribution):
        raise NotInThisModelError(
            f"{what} takes a layer apart into token mixer and MLP, and layers of {type(model.hf_model).__name__} have a "
            "cross-attention, too: cross_attentions_contribution."
        )
