"""Prompts with a place into which a hidden state is put."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.methods.arguments import several, whole
from nnatomy.standardized.positions import is_one, numbers

_WORDS = ("king", "1135", "hello")
_TASK = "Which word comes next in this text? Answer with that word and nothing else."


@dataclass
class TargetPrompt:
    """A prompt, and the position whose hidden state is replaced.

    Attributes:
        prompt: the text, or anything else that `model.trace` takes for one prompt.
        index_to_patch: counted in the prompt: 0 is its first token, -1 its last.
    """

    prompt: Any
    index_to_patch: int


@dataclass
class TargetPromptBatch:
    """Several target prompts, each with its position.

    Example:
        >>> from nnatomy.methods import TargetPrompt, TargetPromptBatch
        >>> batch = TargetPromptBatch.from_target_prompts([TargetPrompt("Hello", -1), TargetPrompt("World", 0)])
        >>> len(batch), batch.index_to_patch, batch[1].prompt
        (2, tensor([-1,  0]), 'World')
    """

    prompts: list[Any]
    index_to_patch: Int[Tensor, " prompt"]

    @classmethod
    def from_target_prompts(cls, prompts_: Sequence[TargetPrompt]) -> TargetPromptBatch:
        """Of these. Raises InputError for anything else, or none."""
        several("target prompts", prompts_)
        prompts_ = list(prompts_)
        for i, one in enumerate(prompts_):
            if not isinstance(one, TargetPrompt):
                raise InputError(f"target prompts[{i}] is {one!r:.60}: give TargetPrompt(prompt, index_to_patch).")
            whole()(f"target prompts[{i}].index_to_patch", one.index_to_patch)
        if not prompts_:
            raise InputError("There are no target prompts: give at least one.")
        return cls([one.prompt for one in prompts_], torch.tensor([int(one.index_to_patch) for one in prompts_]))

    @classmethod
    def from_target_prompt(cls, prompt: TargetPrompt, batch_size: int) -> TargetPromptBatch:
        """Of one, `batch_size` times."""
        return cls.from_target_prompts([prompt] * batch_size)

    @classmethod
    def from_prompts(
        cls, prompts: str | list[Any], index_to_patch: int | list[int] | Int[Tensor, " prompt"]
    ) -> TargetPromptBatch:
        """Of prompts, and one position for all or one each.

        Raises:
            InputError: if there are not as many positions as prompts.
        """
        several("prompts", prompts)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = numbers("index_to_patch", index_to_patch)
        index = torch.tensor(given * len(prompts) if is_one(index_to_patch) else given)
        if index.shape != (len(prompts),):
            raise InputError(
                f"index_to_patch has {index.numel()} positions for {counted(len(prompts), 'prompt')}: give one for all, or one each."
            )
        return cls(prompts, index)

    @staticmethod
    def auto(
        target_prompt: str | TargetPrompt | Sequence[TargetPrompt] | TargetPromptBatch, batch_size: int
    ) -> TargetPromptBatch:
        """Of whatever is given: one prompt is taken `batch_size` times, a text at its last token."""
        if isinstance(target_prompt, str):
            target_prompt = TargetPrompt(target_prompt, -1)
        if isinstance(target_prompt, TargetPrompt):
            return TargetPromptBatch.from_target_prompt(target_prompt, batch_size)
        if isinstance(target_prompt, TargetPromptBatch):
            return target_prompt
        return TargetPromptBatch.from_target_prompts(target_prompt)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, idx: int) -> TargetPrompt:
        return TargetPrompt(self.prompts[idx], int(self.index_to_patch[idx]))

    def __iter__(self) -> Iterator[TargetPrompt]:
        return (self[i] for i in range(len(self)))


def repeat_prompt(
    words: Sequence[str] | None = None,
    rel: str = " ",
    sep: str = "\n",
    placeholder: str = "?",
    index_to_patch: int = -1,
) -> TargetPrompt:
    """A prompt of words that are each said twice, and then a placeholder: what is put there is said again.

    The token identity prompt of Ghandeharioun et al. (2024), "Patchscopes", section 4.1.

    Args:
        words: what is repeated.
        rel: between a word and itself.
        sep: between words.
        placeholder: the last token, which is replaced.

    Example:
        >>> from nnatomy.methods import repeat_prompt
        >>> repeat_prompt(["cat", "dog"], rel="->", sep="; ").prompt
        'cat->cat; dog->dog; ?'

    Raises:
        InputError: for no words, or words that are one text.
    """
    if isinstance(words, str) or (words is not None and not words):
        raise InputError(f"words={words!r}: give several, in a list.")
    pairs = [f"{word}{rel}{word}" for word in _WORDS] if words is None else [f"{w}{rel}{w}" for w in words]
    return TargetPrompt(sep.join([*pairs, placeholder]), index_to_patch)


def it_repeat_prompt(
    tokenizer: Any,
    words: Sequence[str] | None = None,
    rel: str = " ",
    sep: str = "\n",
    placeholder: str = "?",
    complete_prompt: bool = True,
    add_user_instr: bool = True,
    use_system_prompt: bool = True,
) -> TargetPrompt:
    """`repeat_prompt` as a chat, for models tuned to follow instructions.

    Args:
        tokenizer: one with a chat template, or a model that has one.
        complete_prompt: the assistant's answer has begun with the whole prompt, so that the placeholder is the last token.
        add_user_instr: the task stands in a user's message of its own; else in the system prompt, if there is one.
        use_system_prompt: the chat begins with one.

    Raises:
        InputError: if there is no chat template.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("The tokenizer has no chat template: take repeat_prompt(), or set tokenizer.chat_template.")
    text = repeat_prompt(words, rel, sep, placeholder).prompt
    system = "You are a helpful assistant." if add_user_instr else _TASK
    chat = [{"role": "system", "content": system}] if use_system_prompt else []
    if add_user_instr:
        chat += [{"role": "user", "content": _TASK}, {"role": "assistant", "content": "Ok."}]
    asked = text if add_user_instr or use_system_prompt else f"{_TASK}\n{text}"
    chat.append({"role": "user", "content": asked})
    if complete_prompt:
        chat.append({"role": "assistant", "content": text})
    rendered = tokenizer.apply_chat_template(
        chat,
        tokenize=False,
        continue_final_message=complete_prompt,
        add_generation_prompt=not complete_prompt,
    )
    first = tokenizer("")["input_ids"][:1]  # what the tokenizer will put before it, the template need not
    if first and first[0] == tokenizer.bos_token_id:
        rendered = rendered.removeprefix(tokenizer.bos_token)
    return TargetPrompt(rendered, -1)
