"""Prompts and their targets, with every family of tokenizers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architectures import TYPES, prompt_ids, shared
from zoo.build import ids as zoo_ids
from zoo.build import shared as zoo_shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import (
    Prompt,
    compute_next_token_probs,
    get_first_tokens,
    get_token_activations,
    logit_lens,
    next_token_probs_unsqueeze,
    run_prompts,
)

from .tokenizers_of_each_kind import KINDS

tokenizer_of = functools.cache(lambda kind: KINDS[kind]())
SPACE = {"byte": "Ġ", "meta": "▁", "old ": "▁", "unig": "▁"}
WITH_SPACES = [kind for kind in KINDS if kind[:4] in SPACE]
demo = functools.cache(lambda: StandardizedTransformer("demo:llama"))


def pieces(kind: str, *args: Any) -> list[str]:
    tokenizer = tokenizer_of(kind)
    return tokenizer.convert_ids_to_tokens(get_first_tokens(args[0], tokenizer, *args[1:]))


@pytest.mark.parametrize("kind", WITH_SPACES)
def test_a_word_has_two_spellings(kind: str) -> None:
    space = SPACE[kind[:4]]
    assert pieces(kind, "Paris") == ["Paris", f"{space}Paris"]
    assert pieces(kind, ["Paris", "Rome"]) == ["Paris", f"{space}Paris", "Rome", f"{space}Rome"]
    assert pieces(kind, " Paris") == [f"{space}Paris"]
    assert pieces(kind, "Paris", True) == ["Paris"]
    assert pieces(kind, ["Paris", " Paris"]) == ["Paris", f"{space}Paris"]


@pytest.mark.parametrize("kind", WITH_SPACES)
def test_they_are_what_follows_in_a_text(kind: str) -> None:
    """Independent of how the words are taken apart: whole sentences."""
    tokenizer = tokenizer_of(kind)
    bare, spaced = get_first_tokens("Paris", tokenizer)
    for text, token in [("The capital of France is Paris", spaced), ("France7Paris", bare)]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"][-1] == token


@pytest.mark.parametrize("kind", ["word piece", "word level"])
def test_where_spaces_do_not_count_there_is_one(kind: str) -> None:
    assert pieces(kind, "Paris") == ["Paris"]
    assert pieces(kind, " Paris") == ["Paris"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_alone_is_no_first_token(kind: str) -> None:
    """Nothing merges with this bracket's space in most of them: the space would count for every word."""
    found = pieces(kind, "(")
    assert "(" in found
    assert not {"Ġ", "▁"} & set(found)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[:4] not in ("byte", "old ")])
def test_an_unknown_word_is_an_error(kind: str) -> None:
    with pytest.raises(InputError) as error:
        get_first_tokens(["Paris", "Ж"], tokenizer_of(kind))
    assert str(error.value) == (
        "The word 'Ж' has no token of its own in this tokenizer: choose another, or give the ids yourself: "
        "Prompt(prompt, target_tokens={...})."
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["", " ", "   "])
def test_nothing_is_no_word(kind: str, word: str) -> None:
    with pytest.raises(InputError, match=r"has no token of its own"):
        get_first_tokens(word, tokenizer_of(kind))


def test_no_words_and_no_tokenizer_are_errors() -> None:
    with pytest.raises(InputError, match=r"There are no words"):
        get_first_tokens([], tokenizer_of("word level"))
    model = StandardizedTransformer(shared("llama"))
    with pytest.raises(InputError, match=r"StandardizedTransformer\(model, tokenizer\)"):
        get_first_tokens("Paris", model)


def test_targets_are_made_from_words_dicts_and_lists() -> None:
    tokenizer = tokenizer_of("byte-level")
    paris, rome = (get_first_tokens(word, tokenizer) for word in ("Paris", "Rome"))
    assert Prompt.from_strings("x", "Paris", tokenizer) == Prompt("x", {"target": paris}, {"target": "Paris"})
    assert Prompt.from_strings("x", ["Paris", "Rome"], tokenizer).target_tokens == {"target": paris + rome}
    prompt = Prompt.from_strings("x", {"a": "Paris", "b": ["Rome", "Paris"]}, tokenizer)
    assert prompt.target_tokens == {"a": paris, "b": rome + paris}
    assert prompt.target_strings == {"a": "Paris", "b": ["Rome", "Paris"]}


def test_collisions() -> None:
    prompt = Prompt("x", {"a": [1, 2], "b": [2, 3], "c": [4, 4]})
    assert not prompt.has_no_collisions()
    assert prompt.has_no_collisions("a")
    assert prompt.has_no_collisions(["b"])
    assert not prompt.has_no_collisions(["c"])
    assert Prompt("x", {}).has_no_collisions()


def test_target_probs_are_sums_over_tokens() -> None:
    probs = torch.rand(2, 3, 7)
    prompt = Prompt("x", {"a": [1, 2], "b": [6]})
    found = prompt.get_target_probs(probs)
    assert torch.equal(found["a"], probs[..., 1] + probs[..., 2])
    assert torch.equal(found["b"], probs[..., 6])
    assert torch.equal(prompt.get_target_probs(probs, layer=-1)["a"], found["a"][:, -1])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("get_probs", [None, logit_lens])
def test_run_prompts_finds_what_each_prompt_alone_does(batch_size: int, get_probs: Any) -> None:
    model = demo()
    facts = {
        "The capital of France is": "Paris",
        "Japan is in": "Asia",
        "The language of Italy is": "Italian",
    }
    wrong = ["Berlin", "Africa"]
    prompts = [Prompt.from_strings(text, {"right": word, "wrong": wrong}, model) for text, word in facts.items()]
    found = run_prompts(model, prompts, batch_size=batch_size, get_probs_func=get_probs, tqdm=None)
    assert found.keys() == {"right", "wrong"}
    assert (found["right"][:, -1] > 0.9).all()
    assert (found["wrong"][:, -1] < 0.05).all()
    for i, prompt in enumerate(prompts):
        alone = prompt.run(model, get_probs or next_token_probs_unsqueeze)
        for name in alone:
            assert found[name].shape == (3, 1 if get_probs is None else model.num_layers)
            torch.testing.assert_close(found[name][i], alone[name][0], rtol=1e-4, atol=1e-6)


def test_run_prompts_passes_arguments_on_and_shows_progress() -> None:
    shown = []

    def bar(batches: Any, desc: str) -> Any:
        shown.append((list(batches), desc))
        return batches

    def constant(model: Any, texts: list[str], value: float) -> torch.Tensor:
        return torch.full((len(texts), 1, 5), value)

    prompts = [Prompt("x", {"a": [1, 2]})] * 3
    found = run_prompts(demo(), prompts, batch_size=2, get_probs_func=constant, func_kwargs={"value": 0.25}, tqdm=bar)
    assert found["a"].tolist() == [[0.5]] * 3
    assert shown == [([0, 2], "Running prompts")]
    assert run_prompts(demo(), []) == {}


def test_targets_of_different_names_are_an_error() -> None:
    with pytest.raises(InputError, match=r"prompt 0 has a; prompt 1 has b, c\."):
        run_prompts(demo(), [Prompt("x", {"a": [1]}), Prompt("y", {"b": [1], "c": [2]})])


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "cohere", "bloom", "gpt_oss", "gemma4_text", "lfm2"])
def test_next_token_probs_are_the_models_own(model_type: str) -> None:
    hf, ids = (shared(model_type), prompt_ids()) if model_type in TYPES else (zoo_shared(model_type), None)
    ids = zoo_ids(hf) if ids is None else ids
    model = StandardizedTransformer(hf)
    with torch.no_grad():
        expected = hf(ids).logits[:, -1].softmax(-1)
    torch.testing.assert_close(compute_next_token_probs(model, ids), expected)
    torch.testing.assert_close(next_token_probs_unsqueeze(model, ids), expected[:, None])


def test_prompts_that_a_tokenizer_has_padded_on_the_right() -> None:
    model, prompts = demo(), ["The capital of France is", "Japan is in"]
    lists = model.tokenizer(prompts)["input_ids"]
    wide = max(map(len, lists))
    right = {
        "input_ids": torch.tensor([one + [0] * (wide - len(one)) for one in lists]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (wide - len(one)) for one in lists]),
    }
    assert torch.allclose(compute_next_token_probs(model, right), compute_next_token_probs(model, prompts))
    for idx in (None, 0, -2):
        mine, expected = (get_token_activations(model, one, idx=idx) for one in (right, prompts))
        assert torch.allclose(mine, expected, atol=1e-5)
