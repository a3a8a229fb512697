"""Chats: from messages to the tokens that the tokenizer's template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnatomy.core.frames import warn
from nnatomy.errors import InputError

#: Arguments of a trace that are the template's.
TEMPLATE_OPTIONS = ("continue_final_message", "add_generation_prompt")


def is_chat(prompt: Any) -> bool:
    """Whether it is messages with a role each."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def chat_ids(
    tokenizer: Any,
    chat: Sequence[Mapping[str, Any]],
    continue_final_message: bool | None = None,
    add_generation_prompt: bool | None = None,
) -> list[int]:
    """The tokens of a chat.

    Args:
        continue_final_message: whether what follows goes on with the last message, which has no end then. By default if that is
            the assistant's, and nothing else is said.
        add_generation_prompt: whether the assistant's answer begins behind the chat. By default if nothing is gone on with.

    Raises:
        InputError: if the tokenizer has no template, or both are asked for.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "The prompt is a chat, but the tokenizer has no chat template: give it as a string, or "
            "set model.tokenizer.chat_template."
        )
    if continue_final_message is None:
        continue_final_message = add_generation_prompt is None and chat[-1]["role"] == "assistant"
        add_generation_prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    if continue_final_message and add_generation_prompt:
        raise InputError(
            "continue_final_message goes on with the chat's last message, add_generation_prompt begins another one: take one."
        )
    ids = tokenizer.apply_chat_template(
        chat,
        add_generation_prompt=bool(add_generation_prompt),
        continue_final_message=continue_final_message,
        return_dict=False,
    )
    return list(ids)


def warn_of_two_beginnings(tokenizer: Any, text: str, ids: Sequence[int], prompt: int) -> None:
    """A chat rendered to a string begins as the tokenizer begins each text."""
    bos, token = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "bos_token", None)
    if bos is not None and token and [*ids[:2]] == [bos, bos] and text.startswith(token):
        warn(
            f"Prompt {prompt} begins with {token!r}, and the tokenizer puts another before it, which the model has not been "
            f"trained on: give the text without it (text.removeprefix({token!r})), the chat itself, or token ids."
        )
