"""The tokens of prompts, each by itself: one sequence, or two where an encoder reads the one and a decoder the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.methods.prompts import plain
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import mask_of

#: What says which tokens there are.
_OF_TOKENS = frozenset(("input_ids", "attention_mask", "position_ids", "decoder_input_ids", "decoder_attention_mask"))


@dataclass(frozen=True)
class Tokens:
    """A prompt's token ids, without padding.

    Attributes:
        ids: of an encoder-decoder, what the encoder reads.
        decoder: what the decoder reads; None where there is none.
        of_encoder: whether positions are those of the encoder.
        beside: what the model reads beside tokens: an image's pixels, and which positions are its.
    """

    ids: list[int]
    decoder: list[int] | None = None
    of_encoder: bool = False
    beside: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def read(self) -> list[int]:
        """Those that positions are counted in."""
        return self.ids if self.decoder is None or self.of_encoder else self.decoder

    @property
    def key(self) -> list[int]:
        """Other numbers for other tokens, or other images."""
        images = [fingerprint(one) for one in self.beside.values()]
        return [*self.ids, *([] if self.decoder is None else [-1, *self.decoder]), *images]


def fingerprint(tensor: Tensor) -> int:
    """A number that tells a tensor's values from others, in any dtype."""
    return hash(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def tokens_of(model: StandardizedTransformer, prompts: Any, of_encoder: bool = False) -> list[Tokens] | None:
    """Those of each prompt, as `model.trace` takes them; None for embeddings. Raises InputError."""
    inputs = model.prepare(plain(prompts))
    ids, decoder = inputs.get("input_ids"), inputs.get("decoder_input_ids")
    if ids is None:
        return None
    mask = mask_of(inputs, of_encoder=True)
    own = _without_padding(ids, mask)
    others = [None] * len(own) if decoder is None else _without_padding(decoder, mask_of(inputs))
    beside = _beside(inputs, mask)
    both = zip(own, others, beside, strict=True)
    return [Tokens(one, other, of_encoder, more) for one, other, more in both]


def _beside(inputs: dict[str, Any], mask: Tensor) -> list[dict[str, Any]]:
    """Of each prompt, what the model reads beside tokens, without padding. Raises InputError if nobody can tell whose it is."""
    others = {name: one for name, one in inputs.items() if isinstance(one, Tensor) and name not in _OF_TOKENS}
    if len(mask) > 1 and (unclear := [name for name, one in others.items() if len(one) != len(mask)]):
        raise InputError(
            f"{', '.join(unclear)} is of {len(mask)} prompts together, and nobody can tell which part is whose: give one prompt."
        )
    each: list[dict[str, Any]] = [{} for _ in mask]
    for name, value in others.items():
        by_position = value.shape[:2] == mask.shape
        for i, own in enumerate(each):
            part = value if len(mask) == 1 else value[i : i + 1]
            own[name] = part[:, mask[i] != 0] if by_position else part
    return each


def _without_padding(ids: Any, masks: Any) -> list[Any]:
    return [row[mask != 0].tolist() for row, mask in zip(ids, masks, strict=True)]


def arguments_of(prompts: Sequence[Tokens]) -> dict[str, Any]:
    """What `model.prepare` takes for these prompts."""
    arguments: dict[str, Any] = {"input_ids": [one.ids for one in prompts]}
    if prompts[0].decoder is not None:
        arguments["decoder_input_ids"] = [one.decoder for one in prompts]
    seq = max(len(one.ids) for one in prompts)
    for name in prompts[0].beside:
        parts = [one.beside[name] for one in prompts]
        if all(part.shape[:2] == (1, len(one.ids)) for part, one in zip(parts, prompts, strict=True)):
            parts = [F.pad(part, (seq - part.shape[1], 0)) if part.ndim == 2 else part for part in parts]
        arguments[name] = torch.cat(parts)
    return arguments


def refuse_encoder_decoder(model: StandardizedTransformer, why: str) -> None:
    """Raise NotInThisModelError for an encoder-decoder.

    Args:
        why: with a place for the model's class.
    """
    if model._prompts.decoder_start is not None:
        raise NotInThisModelError(why.format(type(model.steps_of).__name__))
