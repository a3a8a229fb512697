"""Text and tokens of a model's own: what a prompt is made into, and back; how probable an answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.standardized.inputs import is_batch
from nnatomy.standardized.positions import ids_of, is_one, mask_of
from nnatomy.standardized.running import Running
from nnatomy.standardized.text import refuse_unknown, token_texts, written_ids
from nnatomy.whole_number import count_of, whole_number

#: So many of the most probable tokens are kept, at least.
_KEPT = 10


class PromptTexts(Running):
    """A model whose prompts are text."""

    def to_tokens(self, prompts: Any, *, prepend_bos: bool | None = None) -> Int[Tensor, "batch seq"]:
        """The token ids that a trace of these prompts would read, where none is padded.

        Args:
            prompts: as in `trace`.
            prepend_bos: whether each text begins with the tokenizer's token for that (BOS). None: as the tokenizer does it by
                itself, and so a trace (GPT-2's puts none, Llama's one). `trace`, `generate` and `run_with_cache` take it, too.

        Returns:
            A row for each prompt, on the model's device.

        Raises:
            InputError: for prompts of several lengths (padded ids would not say what is padding); for no tokenizer, or no BOS.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> model = StandardizedTransformer("demo:gpt2")
            >>> model.to_tokens("Japan is in").shape, model.to_string(model.to_tokens("Japan is in")[0])
            (torch.Size([1, 3]), 'Japan is in')
        """
        lists = self._own_ids(prompts, prepend_bos)
        if len(lengths := {len(one) for one in lists}) > 1:
            raise InputError(
                f"The prompts are of {', '.join(map(str, sorted(lengths)))} tokens, and padded ids alone would not say "
                "which are padding: give the prompts themselves to trace, run_with_cache and methods, or take "
                "model.prepare(prompts), which has input_ids and the attention_mask."
            )
        return torch.tensor(lists, device=self.device)

    @overload
    def to_str_tokens(self, prompts: str, *, prepend_bos: bool | None = None) -> list[str]: ...

    @overload
    def to_str_tokens(self, prompts: Any, *, prepend_bos: bool | None = None) -> list[str] | list[list[str]]: ...

    def to_str_tokens(self, prompts: Any, *, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """The text of each token that a trace of these prompts reads, BOS and the like among them, without padding.

        Args:
            prompts, prepend_bos: as in `to_tokens`; ids too.

        Returns:
            A list of texts; of several prompts, or a 2-D tensor, a list of such lists.

        Raises:
            InputError: for no prompt; if there is no tokenizer.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> StandardizedTransformer("demo:gpt2").to_str_tokens("Japan is in")
            ['Japan', ' is', ' in']
        """
        self._need_tokenizer()
        texts = [token_texts(self, ids) for ids in self._own_ids(prompts, prepend_bos)]
        return texts if is_batch(prompts) else texts[0]

    def _own_ids(self, prompts: Any, prepend_bos: bool | None) -> list[list[int]]:
        """The ids of each prompt, however it is given, without padding."""
        if not isinstance(prompts, (Tensor, Mapping)):
            return self._prompts.token_lists(prompts, texts={"prepend_bos": prepend_bos})
        inputs = self.prepare(prompts, prepend_bos=prepend_bos)
        if (ids := ids_of(inputs, of_encoder=True)) is None:
            raise InputError(f"There are no tokens among the inputs, which are {', '.join(inputs)}.")
        return [row[own != 0].tolist() for row, own in zip(ids, mask_of(inputs, of_encoder=True), strict=True)]

    @overload
    def to_string(self, tokens: int | Sequence[int]) -> str: ...

    @overload
    def to_string(self, tokens: Sequence[Any] | Tensor) -> str | list[str]: ...

    def to_string(self, tokens: int | Sequence[Any] | Int[Tensor, "*rows"]) -> str | list[str]:
        """The text of tokens, as it is, special tokens too.

        Args:
            tokens: an id; ids, as a list or (seq); several of these, or (batch, seq), for a list of texts.

        Raises:
            InputError: if there is no tokenizer.
        """
        self._need_tokenizer()
        rows: Any = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if isinstance(rows, (str, bytes)) or not (is_one(rows) or isinstance(rows, Sequence)):
            raise InputError(f"to_string({rows!r}): give ids of tokens; to_tokens(text) makes them of a text.")
        if not is_one(rows) and not all(map(is_one, rows)):
            texts = [self.to_string(one) for one in rows]
            if wrong := [one for one in texts if not isinstance(one, str)]:
                raise InputError(
                    f"to_string: give ids of (seq) or (batch, seq), and not a list of {len(wrong)} such lists."
                )
            return [str(one) for one in texts]
        try:
            ids = [whole_number(one) for one in ([rows] if is_one(rows) else rows)]
        except TypeError:
            raise InputError(
                f"to_string({rows!r}): give ids of tokens; to_tokens(text) makes them of a text."
            ) from None
        if ids and min(ids) < 0:
            raise InputError(f"to_string({rows!r}): ids of tokens are 0 or more.")
        if ids and max(ids) >= self.vocab_size:
            raise InputError(
                f"to_string: {max(ids)} is no id of a token of the model, which has {self.vocab_size} of them."
            )
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def test_prompt(self, prompt: str, answer: str, *, top: int = 5, prepend_bos: bool | None = None) -> Any:
        """Print the prompt's tokens, and how probable each token of the answer is behind it: a table. And return it.

        Args:
            answer: as it would be written behind the prompt: a word in a text begins with a space. Of several tokens each is asked
                for behind those before it. Of an encoder-decoder it is what the decoder writes.
            top: of how many of the most probable tokens there are names.
            prepend_bos: as in `to_tokens`.

        Returns:
            A `nnatomy.methods.prompt_test.PromptTest`, whose text is the table: `effect`, the probability of each token of the
            answer, `ranks`, `top`, `to_dataframe`, `save`, `plot`.

        Raises:
            InputError: if either is no text, or their last and first token are one in the text; if there is no tokenizer, or it does
                not know the answer.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> found = StandardizedTransformer("demo:gpt2").test_prompt("The capital of France is", " Paris", top=2)
            5 tokens: 'The' ' capital' ' of' ' France' ' is'
            answer    rank  probability  most probable
            ' Paris'  1     99.4%        ' Paris' 99.4%, ' Bratislava' 0.1%
            >>> found.top(1)[0][0], round(float(found.effect[0]), 3)
            (' Paris', 0.994)
        """
        from nnatomy.methods.prompt_test import PromptTest

        self._need_tokenizer()
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
            raise InputError(f"prompt={prompt!r}, answer={answer!r}: both are text.")
        if not count_of(top):
            raise InputError(f"top={top!r}: it is a whole number, 1 or more.")
        options: dict[str, Any] = {"prepend_bos": prepend_bos}
        (read,) = self._prompts.token_lists(prompt, texts=options)
        given: dict[str, Any] = {"input_ids": [read]}
        if (start := self._prompts.decoder_start) is None:
            (whole,) = self._prompts.token_lists(prompt + answer, texts=options)
            wanted = whole[len(read) :]
            if whole[: len(read)] != read or not wanted:
                raise InputError(
                    f"In {prompt + answer!r} the tokens of the prompt are not those of {prompt!r}: they merge, or the tokenizer "
                    "ends each text with a token of its own. Leave no space at the end of the prompt; begin the answer with it."
                )
            given = {"input_ids": [whole[:-1]]}
        else:
            wanted = written_ids(self.tokenizer, answer)
            given["decoder_input_ids"] = [[start, *wanted[:-1]]]
        refuse_unknown(self.tokenizer, wanted, answer, "The answer")
        model: Any = self
        with torch.no_grad(), model.trace(**given):
            probs = model.logits[0, -len(wanted) :].float().softmax(-1)
            own = probs.gather(1, torch.tensor(wanted, device=probs.device)[:, None])
            best = probs.topk(min(max(top, _KEPT), probs.shape[-1]))
            ranks = (probs > own).sum(-1) + 1
        named = token_texts(self, best.indices.flatten().tolist())
        each, rows = best.indices.shape[1], range(len(wanted))
        found = PromptTest(
            tuple(token_texts(self, wanted)),
            own[:, 0].cpu(),
            ranks.cpu(),
            tuple(tuple(named[each * i : each * (i + 1)]) for i in rows),
            best.values.cpu(),
            tuple(token_texts(self, read)),
            min(top, each),
            (prompt,),
        )
        print(found)  # noqa: T201
        return found
