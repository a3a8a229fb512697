"""Prompts with the answers whose probability is followed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm as _tqdm

from nnatomy.errors import InputError
from nnatomy.methods.arguments import method, several
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import mask_of
from nnatomy.standardized.text import is_unknown, written_ids
from nnatomy.standardized.text import token_texts as token_texts

#: What a word is put behind, to see its tokens in the middle of a text. A tokenizer that puts a space before every text puts
#: it before these. If nothing of them merges with the word, the word's tokens are what they would be alone.
_BEFORE = (".", "🍐")


@dataclass
class Prompt:
    """A prompt, and groups of tokens that may come next.

    Attributes:
        prompt: the text.
        target_tokens: by the name of each target, the ids of the tokens that count for it.
        target_strings: what they were made from.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import Prompt, logit_lens
        >>> model = StandardizedTransformer("demo:llama")
        >>> prompt = Prompt.from_strings("The capital of France is", {"right": "Paris", "wrong": ["Rome", "Oslo"]}, model)
        >>> prompt.has_no_collisions()
        True
        >>> probs = prompt.run(model, logit_lens)
        >>> probs["right"].shape, bool(probs["right"][0, -1] > 0.9)
        (torch.Size([1, 8]), True)
    """

    prompt: str
    target_tokens: dict[str, list[int]]
    target_strings: dict[str, str | list[str]] | None = None

    @classmethod
    def from_strings(
        cls,
        prompt: str,
        target_strings: Mapping[str, str | list[str]] | list[str] | str,
        tokenizer: Any,
    ) -> Prompt:
        """A prompt whose targets are the first tokens of words.

        Args:
            target_strings: by the name of each target, its word or words; or words alone, for one target named "target".
            tokenizer: a tokenizer, or a model that has one.

        Raises:
            InputError: see `get_first_tokens`.
        """
        if not target_strings:
            raise InputError("There are no targets: give words, or a dict of words by the name of each target.")
        named = dict(target_strings) if isinstance(target_strings, Mapping) else {"target": target_strings}
        tokens = {target: get_first_tokens(words, tokenizer) for target, words in named.items()}
        return cls(prompt, tokens, named)

    def has_no_collisions(self, ignore_targets: str | list[str] | None = None) -> bool:
        """Whether no token counts for two targets. (`ignore_targets` are left out.)"""
        ignored = [ignore_targets] if isinstance(ignore_targets, str) else ignore_targets or []
        kept = [set(tokens) for target, tokens in self.target_tokens.items() if target not in ignored]
        return sum(map(len, kept)) == len(set().union(*kept))

    def get_target_probs(
        self, probs: Float[Tensor, "prompt layer vocab"], layer: int | None = None
    ) -> dict[str, Float[Tensor, ...]]:
        """The probability of each target, summed over its tokens.

        Returns:
            By the name of each target (prompt, layer), on the CPU; (prompt) if `layer` is given.
        """
        if not isinstance(probs, Tensor) or probs.ndim != 3:
            got = tuple(probs.shape) if isinstance(probs, Tensor) else type(probs).__name__
            raise InputError(f"Probabilities are of (prompt, layer, vocab), as logit_lens gives them; got {got}.")
        for target, tokens in self.target_tokens.items():
            if wrong := [token for token in tokens if not 0 <= token < probs.shape[2]]:
                raise InputError(
                    f"Target {target!r} has token {wrong[0]}, outside of a vocabulary of {probs.shape[2]}."
                )
        where = slice(None) if layer is None else layer
        return {target: probs[:, where, tokens].sum(-1).cpu() for target, tokens in self.target_tokens.items()}

    @torch.no_grad()
    def run(
        self, nn_model: StandardizedTransformer, get_probs: Callable[..., Any]
    ) -> dict[str, Float[Tensor, "1 layer"]]:
        """The targets' probabilities from `get_probs(model, prompt)`, which gives (prompt, layer, vocab): `logit_lens`, ..."""
        return self.get_target_probs(get_probs(nn_model, self.prompt))


def get_first_tokens(
    words: str | Iterable[str], llm_or_tokenizer: Any, use_hacky_implementation: bool = False
) -> list[int]:
    """The tokens that each word can begin with in a text: the first of "word" and the first of " word".

    They are taken in the middle of a text, so that it does not matter whether the tokenizer puts a space before each text. Where
    it makes no difference between the two spellings (WordPiece, whole words) there is one token. A token that is the space alone
    says nothing of the word and is left out. A word given with a space before it has that spelling alone.

    Args:
        llm_or_tokenizer: a tokenizer, or a model that has one.
        use_hacky_implementation: the spelling without a space alone. (What nnterp calls so.)

    Returns:
        Token ids, each once, in the order of the words.

    Raises:
        InputError: if there are no words, one has no token or an unknown one, or there is no tokenizer.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import get_first_tokens
        >>> model = StandardizedTransformer("demo:gpt2")
        >>> model.tokenizer.convert_ids_to_tokens(get_first_tokens("Paris", model))
        ['Paris', 'ĠParis']
    """
    tokenizer = getattr(llm_or_tokenizer, "tokenizer", llm_or_tokenizer)
    if tokenizer is None:
        raise InputError("Words have tokens only with a tokenizer: StandardizedTransformer(model, tokenizer).")
    several("words", words)
    words = [words] if isinstance(words, str) else list(words)
    if wrong := [word for word in words if not isinstance(word, str)]:
        raise InputError(f"words: {wrong[0]!r} is no text.")
    if not words:
        raise InputError("There are no words to take the first tokens of.")
    tokens: list[int] = []
    for word in words:
        one_spelling = use_hacky_implementation or word.startswith(" ")
        spellings = [word] if one_spelling else [word, f" {word}"]
        space = None if one_spelling else _first_token(tokenizer, " ")
        found = [_first_token(tokenizer, spelling) for spelling in spellings]
        if not one_spelling:  # a space alone says nothing of the word
            found = [token for token in found if token != space]
        known = [token for token in found if token is not None and not is_unknown(tokenizer, token, word)]
        if not word.strip(" ") or not known:
            raise InputError(
                f"The word {word!r} has no token of its own in this tokenizer: choose another, or give the ids yourself: "
                "Prompt(prompt, target_tokens={...})."
            )
        tokens += known
    return list(dict.fromkeys(tokens))


def _first_token(tokenizer: Any, text: str) -> int | None:
    """The first token of `text` in the middle of a text."""
    for before in _BEFORE:
        start, whole = written_ids(tokenizer, before), written_ids(tokenizer, before + text)
        if start and len(whole) > len(start) and whole[: len(start)] == start:
            return whole[len(start)]
    return next(iter(written_ids(tokenizer, text)), None)


@method
@torch.no_grad()
def run_prompts(
    nn_model: StandardizedTransformer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 32,
    get_probs_func: Callable[..., Any] | None = None,
    func_kwargs: dict[str, Any] | None = None,
    tqdm: Callable[..., Any] | None = _tqdm,
) -> dict[str, Float[Tensor, "prompt layer"]]:
    """The targets' probabilities of many prompts, in batches.

    Args:
        prompts: all with targets of the same names.
        get_probs_func: gives (prompt, layer, vocab) for `get_probs_func(model, texts, **func_kwargs)`: `logit_lens`, ... By
            default the model's own prediction, as one layer.
        tqdm: shows the progress; None for none.

    Returns:
        By the name of each target, its probability, summed over its tokens, on the CPU.

    Raises:
        InputError: if the targets' names differ.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import Prompt, run_prompts
        >>> model = StandardizedTransformer("demo:llama")
        >>> facts = {"France": "Paris", "Japan": "Tokyo"}
        >>> prompts = [Prompt.from_strings(f"The capital of {one} is", two, model) for one, two in facts.items()]
        >>> (run_prompts(model, prompts, tqdm=None)["target"] > 0.9).tolist()
        [[True], [True]]
    """
    if isinstance(prompts, (Prompt, str)) or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise InputError(
            f"prompts={prompts!r:.60}: give a list of Prompts, [Prompt.from_strings(text, targets, model), ...]."
        )
    if not prompts:
        return {}
    names = prompts[0].target_tokens.keys()
    for i, prompt in enumerate(prompts):
        if prompt.target_tokens.keys() != names:
            raise InputError(
                f"All prompts need targets of the same names: prompt 0 has {', '.join(names)}; prompt {i} has "
                f"{', '.join(prompt.target_tokens)}."
            )
    get_probs = get_probs_func or next_token_probs_unsqueeze
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    starts = range(0, len(prompts), batch_size)
    for start in starts if tqdm is None else tqdm(starts, desc="Running prompts"):
        batch = prompts[start : start + batch_size]
        probs = get_probs(nn_model, [prompt.prompt for prompt in batch], **(func_kwargs or {}))
        for i, prompt in enumerate(batch):
            for name, one in prompt.get_target_probs(probs[i : i + 1]).items():
                found[name].append(one)
    return {name: torch.cat(each) for name, each in found.items()}


@method
@torch.no_grad()
def compute_next_token_probs(nn_model: StandardizedTransformer, prompt: Any) -> Float[Tensor, "prompt vocab"]:
    """The model's next-token probabilities after each prompt, on the CPU."""
    inputs = nn_model.prepare(plain(prompt))
    mask = inputs.get("attention_mask")
    at_end = isinstance(mask, Tensor) and bool(mask[..., -1].all())
    # Only where nothing else is read: some models shorten their last layers with it (Gemma 4).
    if at_end and "logits_to_keep" in inspect.signature(nn_model.steps_of.forward).parameters:
        inputs["logits_to_keep"] = 1
    with nn_model.trace(**inputs, use_cache=False):
        probs = nn_model.next_token_probs
    return probs.cpu()


@method
def next_token_probs_unsqueeze(
    nn_model: StandardizedTransformer, prompt: Any, **_: Any
) -> Float[Tensor, "prompt 1 vocab"]:
    """`compute_next_token_probs` as one layer."""
    return compute_next_token_probs(nn_model, prompt).unsqueeze(1)


def plain(prompts: Any) -> Any:
    """What `model.trace` takes, where some of it may be a `Prompt`."""
    if isinstance(prompts, Prompt):
        return prompts.prompt
    if isinstance(prompts, (list, tuple)):
        return [plain(prompt) if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    return prompts


def prepared(model: StandardizedTransformer, prompts: Any, **kwargs: Any) -> dict[str, Any]:
    """What `model.prepare` gives, padded on the left, whatever side the prompts or the tokenizer have it on.

    Raises:
        InputError: as `model.prepare`; and where nothing says which tokens are padding, or padding on the left would show.
    """
    inputs = model.prepare(plain(prompts), padding_side="left", **kwargs)
    mask = mask_of(inputs)
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return inputs
    if inputs.get("decoder_input_ids") is not None:
        raise InputError("The decoder's prompts are padded on the right: give decoder_input_ids of one length.")
    model._prompts.check_lengths(mask.sum(1).tolist())
    order = (mask != 0).long().argsort(stable=True, dim=1)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        return value.gather(1, order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand(value.shape))

    inputs = {name: moved(value) for name, value in inputs.items()}
    return {**inputs, **model._prompts.positions(inputs)}
