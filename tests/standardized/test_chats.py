"""Chats: what the template makes of them, which messages are gone on with, and how a rendered one begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} ;{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BOS = "<|endoftext|>"
QUESTION: list[Any] = [{"role": "user", "content": "The capital of France"}]
STARTED: list[Any] = [*QUESTION, {"role": "assistant", "content": "is Paris. Japan"}]
OTHER: list[Any] = [*STARTED, {"role": "user", "content": "is in"}]


@pytest.fixture
def model() -> StandardizedTransformer:
    """Whose tokenizer begins each text with a token, as Llama's."""
    model = StandardizedTransformer("demo:llama", validate=False)
    tokenizer = model.tokenizer
    tokenizer.chat_template = TEMPLATE
    begin = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert tokenizer("Japan")["input_ids"][0] == tokenizer.bos_token_id
    return model


def text(model: StandardizedTransformer, chat: Any, **kwargs: Any) -> str:
    (ids,) = model.prepare(chat, **kwargs)["input_ids"].tolist()
    return str(model.tokenizer.decode(ids))


ASKED = f"{BOS}[user] The capital of France ;"
ENDED = f"{ASKED}[assistant] is Paris. Japan ;"


@pytest.mark.parametrize(
    ("chat", "kwargs", "expected"),
    [
        (QUESTION, {}, f"{ASKED}[assistant]"),
        (STARTED, {}, f"{ASKED}[assistant] is Paris. Japan"),  # the assistant is at it already
        (OTHER, {}, f"{ENDED}[user] is in ;[assistant]"),
        (QUESTION, {"add_generation_prompt": False}, ASKED),
        (STARTED, {"add_generation_prompt": False}, ENDED),
        (STARTED, {"add_generation_prompt": True}, f"{ENDED}[assistant]"),
        (STARTED, {"continue_final_message": True}, f"{ASKED}[assistant] is Paris. Japan"),
        (STARTED, {"continue_final_message": False}, ENDED),
        (QUESTION, {"continue_final_message": True}, ASKED.removesuffix(" ;")),
        (
            STARTED,
            {"continue_final_message": True, "add_generation_prompt": False},
            f"{ASKED}[assistant] is Paris. Japan",
        ),
    ],
)
def test_which_message_is_gone_on_with(
    model: StandardizedTransformer, chat: Any, kwargs: dict[str, Any], expected: str
) -> None:
    def strip(tokens: str) -> str:
        return tokens.replace(" ", "")

    assert strip(text(model, chat, **kwargs)) == strip(expected)
    # As the tokenizer's own, with both said.
    with model.trace(chat, **kwargs):
        ids = model.input_ids
    own = {
        "add_generation_prompt": "[assistant]" == expected[-11:],
        "continue_final_message": expected[-1] not in ";]",
    }
    assert ids[0].tolist() == model.tokenizer.apply_chat_template(chat, return_dict=False, **own)


def test_they_go_to_the_template_and_not_to_the_model(model: StandardizedTransformer) -> None:
    expected = model.prepare(STARTED, add_generation_prompt=False)["input_ids"]
    both = [STARTED, STARTED]
    with model.trace(both, add_generation_prompt=False):
        assert torch.equal(model.input_ids, expected.expand(2, -1))
    tokens = model.generate(STARTED, add_generation_prompt=False, max_new_tokens=1).run()
    assert torch.equal(tokens[:, :-1], expected)
    with model.trace(add_generation_prompt=False) as tracer:
        block = tracer.invoke(STARTED, lambda: model.input_ids)
        other = tracer.invoke(QUESTION, lambda: model.input_ids)
    assert torch.equal(block.value, expected)
    assert torch.equal(other.value, model.prepare(QUESTION, add_generation_prompt=False)["input_ids"])
    with model.trace() as tracer:
        block = tracer.invoke(STARTED, lambda: model.input_ids, add_generation_prompt=False)
    assert torch.equal(block.value, expected)


def test_what_cannot_be_both(model: StandardizedTransformer) -> None:
    with pytest.raises(
        InputError,
        match="goes on with the chat's last message, add_generation_prompt begins another one: take",
    ):
        model.trace(STARTED, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InputError, match="continue_final_message: for chats, and there is none among the prompts"):
        model.trace("Japan is in", continue_final_message=True)


def test_a_rendered_chat_with_two_beginnings_is_warned_of(model: StandardizedTransformer) -> None:
    rendered = model.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    expected = (
        r"Prompt 1 begins with '<\|endoftext\|>', and the tokenizer puts another before it, which the model has not been trained "
        r"on: give the text without it \(text\.removeprefix\('<\|endoftext\|>'\)\), the chat itself, or token ids\."
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        ids = model.prepare(["Japan is in", rendered])["input_ids"]
    assert caught[0].filename == __file__
    bos = model.tokenizer.bos_token_id
    assert ids[1, :2].tolist() == [bos, bos]
    for right in (
        rendered.removeprefix(BOS),
        QUESTION,
        model.tokenizer(rendered, add_special_tokens=False)["input_ids"],
    ):
        assert torch.equal(model.prepare(right)["input_ids"], ids[1:, 1:])
    with pytest.warns(UserWarning, match="Prompt 0 begins"), model.trace() as tracer:
        tracer.invoke(rendered, lambda: model.logits)


def test_a_chat_past_the_context_is_refused_before_it_runs() -> None:
    model = StandardizedTransformer("demo:gpt2", validate=False)
    model.tokenizer.chat_template = TEMPLATE
    limit = model.hf_model.config.n_positions
    chat: list[Any] = [{"role": "user", "content": "The capital of France is Paris. " * 12}]
    room = limit - len(model.prepare(chat)["input_ids"][0]) + 1
    assert 1 < room < 60
    for run in (model.generate_text, lambda chat, **how: model.generate(chat, **how).run()):
        run(chat, max_new_tokens=room, min_new_tokens=room, do_sample=False)
        with pytest.raises(InputError, match=rf"there is room for {room} new ones, max_new_tokens={room}"):
            run(chat, max_new_tokens=room + 1, min_new_tokens=room + 1, do_sample=False)
    with pytest.raises(
        InputError, match=rf"^The prompt is of \d+ tokens, and .* has no positions for more than {limit}"
    ):
        model.generate_text([{**chat[0], "content": chat[0]["content"] * 3}], max_new_tokens=1)
