"""Which tokens stand for padding and for a decoder's beginning."""

from __future__ import annotations

from typing import Any


def pad_token_id(tokenizer: Any, config: Any, vocab_size: int | None) -> int:
    """What to pad with. Padding is masked, so any token will do where none is named for it."""
    candidates = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    text_config = _text(config)
    candidates += [getattr(text_config, "pad_token_id", None), getattr(text_config, "eos_token_id", None), 0]
    for candidate in candidates:
        if isinstance(candidate, int) and 0 <= candidate < (vocab_size or 0):
            return candidate
    return 0


def padding_token_id(tokenizer: Any, config: Any) -> int | None:
    """The token that stands for padding alone: none where padding is written as the end, or nobody says it."""
    told = [one for one in (tokenizer, _text(config)) if one is not None]
    padding = next((one for each in told if (one := getattr(each, "pad_token_id", None)) is not None), None)
    others: list[Any] = []
    for each in told:
        for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
            other = getattr(each, name, None)
            others += other if isinstance(other, (list, tuple)) else [other]
    return padding if isinstance(padding, int) and padding not in others else None


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_start(model: Any) -> int:
    """The token with which the decoder of an encoder-decoder begins."""
    for config in (
        getattr(model, "generation_config", None),
        model.config,
        model.config.get_text_config(decoder=True),
    ):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(token := getattr(config, name, None), int):
                return token
    return 0
