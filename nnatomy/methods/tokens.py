"""The tokens of prompts, each by itself: one sequence, or two where an encoder reads the one and a decoder the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnatomy.errors import NotInThisModelError
from nnatomy.methods.prompts import plain
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import mask_of


@dataclass(frozen=True)
class Tokens:
    """A prompt's token ids, without padding.

    Attributes:
        ids: of an encoder-decoder, what the encoder reads.
        decoder: what the decoder reads; None where there is none.
        of_encoder: whether positions are those of the encoder.
    """

    ids: list[int]
    decoder: list[int] | None = None
    of_encoder: bool = False

    @property
    def read(self) -> list[int]:
        """Those that positions are counted in."""
        return self.ids if self.decoder is None or self.of_encoder else self.decoder

    @property
    def key(self) -> list[int]:
        """Other numbers for other tokens."""
        return self.ids if self.decoder is None else [*self.ids, -1, *self.decoder]


def tokens_of(model: StandardizedTransformer, prompts: Any, of_encoder: bool = False) -> list[Tokens] | None:
    """Those of each prompt, as `model.trace` takes them; None for embeddings. Raises InputError."""
    inputs = model.prepare(plain(prompts))
    ids, decoder = inputs.get("input_ids"), inputs.get("decoder_input_ids")
    if ids is None:
        return None
    own = _without_padding(ids, mask_of(inputs, of_encoder=True))
    others = [None] * len(own) if decoder is None else _without_padding(decoder, mask_of(inputs))
    return [Tokens(one, other, of_encoder) for one, other in zip(own, others, strict=True)]


def _without_padding(ids: Any, masks: Any) -> list[Any]:
    return [row[mask != 0].tolist() for row, mask in zip(ids, masks, strict=True)]


def arguments_of(prompts: Sequence[Tokens]) -> dict[str, Any]:
    """What `model.prepare` takes for these prompts."""
    arguments: dict[str, Any] = {"input_ids": [one.ids for one in prompts]}
    if prompts[0].decoder is not None:
        arguments["decoder_input_ids"] = [one.decoder for one in prompts]
    return arguments


def refuse_encoder_decoder(model: StandardizedTransformer, why: str) -> None:
    """Raise NotInThisModelError for an encoder-decoder.

    Args:
        why: with a place for the model's class.
    """
    if model._prompts.decoder_start is not None:
        raise NotInThisModelError(why.format(type(model.steps_of).__name__))
