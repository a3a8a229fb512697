"""The names of an encoder-decoder's encoder: what it has as a model of its own, `encoder_layers_output[i]`."""

from __future__ import annotations

from typing import Any

from nnatomy.arch_configs import has_decoder
from nnatomy.errors import InputError, ModelError
from nnatomy.names import TABLE
from nnatomy.standardized.accessors import LayerAccessor


def add_encoder(model: Any, validate: Any, allow_failures: bool) -> None:
    """Give `model` (a StandardizedTransformer) the accessors of its encoder, which is checked as a model of its own."""
    why, part = "the model is no encoder-decoder", None
    encoder = model.steps_of.get_encoder() if has_decoder(model.steps_of) else None
    if encoder is not None and not hasattr(encoder, "config"):
        why = f"the encoder, {type(encoder).__name__}, is no Hugging Face model by itself"
    elif encoder is not None:
        try:
            part = type(model)(encoder, validate=validate, allow_failures=allow_failures)
        except (ModelError, InputError) as error:
            why = f"the encoder by itself is refused ({str(error).splitlines()[0]})"
    for row in TABLE:
        if row.of_encoders:
            none = LayerAccessor(row, (), model._blocks, none=why)
            own = f"encoder_{row.name}"
            setattr(model, own, getattr(part, row.name, none).of_part(own, model._blocks))
