"""The names of an encoder-decoder's encoder: what it has as a model of its own, `encoder_layers_output[i]`."""

from __future__ import annotations

from typing import Any

from nnatomy.arch_configs import has_decoder
from nnatomy.errors import InputError, ModelError
from nnatomy.standardized.accessors import LayerAccessor
from nnatomy.validation.names import INTERNALS, MODULES

#: The names that the encoder's layers have. (What is found by taking additions apart is in traces of the encoder itself.)
NAMES = (*(name for name in MODULES if name != "mixers_output"), *INTERNALS)


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
    for name in NAMES:
        own = f"encoder_{name}"
        if part is None:
            accessor = LayerAccessor(own, (), model._blocks, "output", none=why)
        else:
            accessor = getattr(part, name).of_part(own, model._blocks)
        setattr(model, own, accessor)
