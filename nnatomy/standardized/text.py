"""Text: the tokens of one, and the text of each token."""

from __future__ import annotations

from typing import Any

from nnatomy.errors import InputError


def text_ids(tokenizer: Any, text: str, prepend_bos: bool | None = None) -> list[int]:
    """The tokens of a text, with what the tokenizer puts around it.

    Args:
        prepend_bos: whether the token of the beginning (BOS) stands before it; None: as the tokenizer has it.

    Raises:
        InputError: if there is no such token to put there.
    """
    ids = list(tokenizer(text)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    if prepend_bos is None:
        return ids
    if prepend_bos not in (True, False):
        raise InputError(
            f"prepend_bos={prepend_bos!r}: it is True, False, or None for what the tokenizer does by itself."
        )
    if prepend_bos:
        if bos is None:
            raise InputError("prepend_bos=True: the tokenizer has no token for the beginning of a text (bos_token).")
        return ids if ids[:1] == [bos] else [bos, *ids]
    written = written_ids(tokenizer, text)
    return ids[max(0, _leading(bos, ids) - _leading(bos, written)) :]


def written_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as it stands within another one: nothing is put around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def unknown_token(tokenizer: Any) -> tuple[int, str] | None:
    """The token that stands for what the tokenizer does not know, and its text: as it says itself, or else its model in Rust."""
    if (token := getattr(tokenizer, "unk_token_id", None)) is not None:
        return token, str(tokenizer.unk_token)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    text = getattr(model, "unk_token", None)
    if model is None or not text:
        return None
    token = model.token_to_id(text)
    return None if token is None else (token, text)


def is_unknown(tokenizer: Any, token: int, text: str) -> bool:
    """Whether `token` stands for what the tokenizer does not know, so that it says nothing of `text`, which it was made from.

    Some tokenizers have one token for that and for another use (GPT-2's ends a text); a text that spells it out means it.
    """
    unknown = unknown_token(tokenizer)
    return unknown is not None and token == unknown[0] and unknown[1] not in text


def known_ids(tokenizer: Any, text: str, what: str) -> list[int]:
    """`written_ids` of a text whose probability is asked for.

    Raises:
        InputError: if the tokenizer does not know some of it: the number would be that of its token for the unknown.
    """
    ids = written_ids(tokenizer, text)
    refuse_unknown(tokenizer, ids, text, what)
    return ids


def refuse_unknown(tokenizer: Any, ids: Any, text: str, what: str) -> None:
    """As `known_ids`, of tokens that were made from that text."""
    unknown = unknown_token(tokenizer)
    if unknown is not None and any(is_unknown(tokenizer, token, text) for token in ids):
        raise InputError(
            f"{what} {text!r}: the tokenizer does not know it, or a part of it, and writes {unknown[1]!r} (token "
            f"{unknown[0]}) for it, as for any other such text. Choose a text that it knows."
        )


def _leading(token: int | None, ids: list[int]) -> int:
    """How many tokens at the beginning are that one."""
    return next((i for i, one in enumerate(ids) if one != token), len(ids))


def token_texts(model: Any, ids: Any) -> list[str]:
    """Each token's text as it stands in the prompt; its number where there is no tokenizer."""
    ids = [int(token) for token in ids]
    if model.tokenizer is None:
        return [str(token) for token in ids]
    return [model.tokenizer.decode([token]) for token in ids]
