"""Text to tokens and back: what the tokenizer makes of it, with or without a beginning, and what a trace reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import torch
from architectures import VOCAB, shared
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nnatomy import StandardizedTransformer
from nnatomy.compat.transformer_lens import HookedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import (
    Prompt,
    direct_logit_attribution,
    get_first_tokens,
    lens_statistics,
    logit_difference,
    probability,
)
from nnatomy.methods.result import Result

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
IDS = {word: i for i, word in enumerate(WORDS)}
TYPES = ("gpt2", "llama", "gemma2", "mixtral", "gpt_neox")
PROMPT, ANSWER = "w10 w11 w12", " w20 w21"


def tokenizer(begins: bool = False, ends: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    """A word is a token; each text begins, or ends, with one of its own."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins or ends:
        around = f"{'<s> ' * begins}$A{' </s>' * ends}"
        backend.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", **special
    )


def wrapped(model_type: str, **options: Any) -> StandardizedTransformer:
    return StandardizedTransformer(shared(model_type), tokenizer(**options), validate=False)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_the_beginning_is_said(model_type: str, begins: bool, prepend_bos: bool | None) -> None:
    model = wrapped(model_type, begins=begins)
    has = begins if prepend_bos is None else prepend_bos
    expected = [1] * has + [10, 11, 12]
    assert model.to_tokens(PROMPT, prepend_bos=prepend_bos).tolist() == [expected]
    assert model.to_str_tokens(PROMPT, prepend_bos=prepend_bos) == ["<s>"] * has + ["w10", "w11", "w12"]
    assert model.prepare(PROMPT, prepend_bos=prepend_bos)["input_ids"].tolist() == [expected]
    with torch.no_grad():
        logits = model.hf_model(torch.tensor([expected])).logits
        with model.trace(PROMPT, prepend_bos=prepend_bos):
            traced = model.logits
        assert torch.equal(traced, logits)
        assert torch.equal(model.run_with_cache(PROMPT, "layers_output", prepend_bos=prepend_bos)[0], logits)
        assert torch.equal(model(PROMPT, prepend_bos=prepend_bos).logits, logits)
        with model.trace() as tracer:
            with tracer.invoke(PROMPT, prepend_bos=prepend_bos):
                block = model.logits
        assert torch.equal(block, logits)
    written = model.generate_text(PROMPT, prepend_bos=prepend_bos, max_new_tokens=2, do_sample=False)
    out = model.hf_model.generate(torch.tensor([expected]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert written == model.tokenizer.decode(out[0, len(expected) :], skip_special_tokens=True)


def test_what_is_written_itself_is_not_taken_away() -> None:
    model = wrapped("llama", begins=False)
    assert model.to_tokens("<s> w10", prepend_bos=False).tolist() == [[1, 10]]
    assert model.to_tokens("<s> w10", prepend_bos=True).tolist() == [[1, 10]]
    begun = wrapped("llama", begins=True, ends=True)
    assert begun.to_tokens("w10", prepend_bos=False).tolist() == [[10, 2]]
    with pytest.warns(UserWarning, match="begins with '<s>'"):
        assert begun.to_tokens("<s> w10").tolist() == [[1, 1, 10, 2]]
    assert begun.to_tokens("<s> w10", prepend_bos=False).tolist() == [[1, 10, 2]]


def test_there_and_back() -> None:
    model = wrapped("gpt2")
    assert model.to_tokens([PROMPT, "w5 w6 w7"]).tolist() == [[10, 11, 12], [5, 6, 7]]
    assert model.to_str_tokens([PROMPT, "w5"]) == [["w10", "w11", "w12"], ["w5"]]
    assert model.to_str_tokens([10, 11]) == ["w10", "w11"]
    assert model.to_str_tokens(torch.tensor([[10, 11]])) == [["w10", "w11"]]
    assert model.to_string([10, 11]) == model.to_string(torch.tensor([10, 11])) == "w10 w11"
    assert model.to_string(torch.tensor([[10, 11], [1, 12]])) == ["w10 w11", "<s> w12"]
    assert model.to_string(10) == model.to_string(torch.tensor(10)) == "w10"
    assert model.to_string([[10], [11, 12]]) == ["w10", "w11 w12"]
    demo = StandardizedTransformer("demo:gpt2", validate=False)
    text = "The capital of France is Paris. Japan"
    assert demo.to_string(demo.to_tokens(text)[0]) == "".join(demo.to_str_tokens(text)) == text


def test_what_cannot_be_had_is_refused() -> None:
    model = wrapped("gpt2")
    with pytest.raises(
        InputError, match=r"The prompts are of 1, 3 tokens, and padded ids alone would not say which are padding"
    ):
        model.to_tokens([PROMPT, "w5"])
    with pytest.raises(InputError, match=r"prepend_bos: for texts, and there is none among the prompts\."):
        model.to_tokens([10, 11], prepend_bos=True)
    with pytest.raises(InputError, match=r"prepend_bos: for texts and chats, and the prompts are token ids\."):
        model.trace(torch.tensor([10, 11]), prepend_bos=False)
    with pytest.raises(InputError, match=r"prepend_bos=True: the tokenizer has no token for the beginning of a text"):
        wrapped("gpt2", bos=False).to_tokens(PROMPT, prepend_bos=True)
    with pytest.raises(InputError, match="Did you mean prepend_bos"):
        model.trace(PROMPT, prepend_boss=True)
    alone = StandardizedTransformer(shared("gpt2"), validate=False)
    for ask in (lambda: alone.to_string([1]), lambda: alone.to_str_tokens([1]), lambda: alone.test_prompt("a", "b")):
        with pytest.raises(InputError, match="Text needs a tokenizer"):
            ask()


def rows(table: str) -> list[list[str]]:
    first, head, *lines = table.splitlines()
    assert re.split(r" {2,}", head) == ["answer", "rank", "probability", "most probable"]
    return [[first], *(re.split(r" {2,}", line) for line in lines)]


def expected_rows(logits: Any, answer: list[int]) -> list[list[str]]:
    """By the logits at the positions before each token of the answer."""
    found = []
    for row, token in zip(logits.float().softmax(-1), answer, strict=True):
        order = row.argsort(descending=True).tolist()
        names = [*WORDS, *[""] * len(order)]  # ids beyond the tokenizer's
        best = ", ".join(f"{names[i]!r} {row[i]:.1%}" for i in order[:5])
        found.append([f"'w{token}'", str(order.index(token) + 1), f"{row[token]:.1%}", best])
    return found


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_an_answer_is_asked_for_token_by_token(model_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped(model_type, begins=True)
    model.test_prompt(PROMPT, ANSWER)
    (first,), *found = rows(capsys.readouterr().out)
    assert first == "4 tokens: '<s>' 'w10' 'w11' 'w12'"
    logits = model.hf_model(torch.tensor([[1, 10, 11, 12, 20]])).logits[0, 3:]
    assert found == expected_rows(logits, [20, 21])
    model.test_prompt(PROMPT, ANSWER, prepend_bos=False)
    (first,), *found = rows(capsys.readouterr().out)
    assert first == "3 tokens: 'w10' 'w11' 'w12'"
    assert found == expected_rows(model.hf_model(torch.tensor([[10, 11, 12, 20]])).logits[0, 2:], [20, 21])


@torch.no_grad()
def test_what_is_printed_is_returned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = wrapped("llama", begins=True)
    found = model.test_prompt(PROMPT, ANSWER, top=2)
    assert repr(found) + "\n" == capsys.readouterr().out
    probs = model.hf_model(torch.tensor([[1, 10, 11, 12, 20]])).logits[0, 3:].softmax(-1)
    assert torch.equal(found.effect, probs[[0, 1], [20, 21]])
    table = found.to_dataframe()
    assert table["answer"].tolist() == ["w20", "w21"]
    assert table["rank"].tolist() == [int((row > row[i]).sum()) + 1 for row, i in zip(probs, (20, 21), strict=True)]
    assert table["effect"].tolist() == [float(probs[0, 20]), float(probs[1, 21])]
    for place, row in enumerate(probs):
        order = sorted(range(len(row)), key=lambda i: -float(row[i]))[:10]
        names = [*WORDS, *[""] * len(row)]
        assert found.top(answer=place) == [(names[i], float(row[i])) for i in order]
    assert list(found.plot().data[0].x) == found.effect.tolist()
    found.save(tmp_path / "found")
    assert repr(Result.load(tmp_path / "found")) == repr(found)
    with pytest.raises(InputError, match=r"k=11: the 10 most probable tokens are kept: test_prompt\(\.\.\., top=11\)"):
        found.top(11)
    with pytest.raises(InputError, match=r"answer=2: the answer has 2 tokens, 0 to 1\."):
        found.top(answer=2)
    assert len(model.test_prompt(PROMPT, ANSWER, top=12).top(12)) == 12


@torch.no_grad()
def test_an_answer_of_an_encoder_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    hf: Any = encoder_decoders.build("T5ForConditionalGeneration")
    hf.generation_config.decoder_start_token_id = 7
    model = StandardizedTransformer(hf, tokenizer(ends=True, bos=False), validate=False)
    assert model.vocab_size > 21
    model.test_prompt(PROMPT, ANSWER)
    (first,), *found = rows(capsys.readouterr().out)
    assert first == "4 tokens: 'w10' 'w11' 'w12' '</s>'"
    given = {"input_ids": torch.tensor([[10, 11, 12, 2]]), "decoder_input_ids": torch.tensor([[7, 20]])}
    assert found == expected_rows(hf(**given).logits[0], [20, 21])


def test_an_answer_that_is_no_text_behind_the_prompt() -> None:
    model = wrapped("gpt2")
    with pytest.raises(InputError, match=r"In 'w10 w1' the tokens of the prompt are not those of 'w10 w': they merge"):
        model.test_prompt("w10 w", "1")
    with pytest.raises(InputError, match=r"the tokenizer ends each text with a token of its own"):
        wrapped("gpt2", ends=True).test_prompt(PROMPT, ANSWER)
    with pytest.raises(InputError, match=r"prompt='w10', answer='': both are text\."):
        model.test_prompt("w10", "")


#: What is asked for a word's probability, of a model and its tokenizer.
ASKED: dict[str, Any] = {
    "a metric": lambda model, word: logit_difference("w20", word, model),
    "attribution": lambda model, word: direct_logit_attribution(model, PROMPT, answer=word),
    "a target": lambda model, word: lens_statistics(model, [PROMPT], targets=[word]),
    "a prompt": lambda model, word: Prompt.from_strings(PROMPT, word, model),
    "the test of a prompt": lambda model, word: model.test_prompt(PROMPT, f" {word}"),
    "TransformerLens's": lambda model, word: HookedTransformer(model).to_single_token(word),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_word_that_the_tokenizer_does_not_know_is_no_answer(asked: str) -> None:
    """Its id is that of any other such word, whose probability would be given."""
    model = wrapped("gpt2")
    assert model.tokenizer("zebra")["input_ids"] == [IDS["<unk>"]] == model.tokenizer("<unk>")["input_ids"]
    with pytest.raises(InputError, match=r"'( )?zebra'(: the tokenizer does not know it| has no token of its own)"):
        ASKED[asked](model, "zebra")
    ASKED[asked](model, "w21")
    ASKED[asked](model, "<unk>")  # which is written out, and means that token


@pytest.mark.parametrize("asked", ASKED)
def test_a_tokenizer_that_says_only_within_what_is_unknown_to_it(asked: str) -> None:
    """As one made from a `tokenizers.Tokenizer` without more; the token is that of its model."""
    model = wrapped("gpt2")
    model.tokenizer.unk_token = None
    assert model.tokenizer.unk_token_id is None
    assert model.tokenizer("zebra")["input_ids"] == [IDS["<unk>"]]
    with pytest.raises(InputError, match=r"'( )?zebra'(: the tokenizer does not know it| has no token of its own)"):
        ASKED[asked](model, "zebra")
    ASKED[asked](model, "w21")
    ASKED[asked](model, "<unk>")


def test_a_space_before_what_is_unknown_is_no_word() -> None:
    """SentencePiece's model writes an unknown word as a space and its token for the unknown."""
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("\u2581cat", -1.0), ("cat", -1.5)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    model = wrapped("gpt2")
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert model.tokenizer("dog")["input_ids"] == [1, 0]
    with pytest.raises(InputError, match="The word 'dog' has no token of its own"):
        get_first_tokens("dog", model)
    assert get_first_tokens("cat", model) == [3, 2]


def test_a_token_that_also_stands_for_the_unknown_can_be_asked_for() -> None:
    """GPT-2's tokenizer has one token for the end of a text and for what it does not know."""
    gpt2 = wrapped("gpt2")
    gpt2.tokenizer.unk_token = "</s>"
    assert probability("</s>", gpt2).data()[0][0][0] == IDS["</s>"]


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_tokens_of_whatever_a_trace_takes(model_type: str) -> None:
    """Tensors of ids and a tokenizer's dict, too: each prompt's own, without padding."""
    model = wrapped("gpt2")
    if model_type == "t5":
        model = StandardizedTransformer(
            encoder_decoders.build("T5ForConditionalGeneration"), tokenizer(bos=False), validate=False
        )
    ids, longer = [10, 11], [12, 13, 14]
    words, more = ["w10", "w11"], ["w12", "w13", "w14"]
    for given in (torch.tensor(ids), torch.tensor([ids]), {"input_ids": [ids]}, model.prepare([ids])):
        assert torch.equal(model.to_tokens(given), torch.tensor([ids]))
    assert model.to_str_tokens(torch.tensor(ids)) == words
    assert model.to_str_tokens(torch.tensor([ids])) == [words]
    assert model.to_str_tokens(model.prepare([ids, longer])) == [words, more]
    with pytest.raises(InputError, match="The prompts are of 2, 3 tokens"):
        model.to_tokens(model.prepare([ids, longer]))


def test_text_of_several_ids() -> None:
    model = wrapped("gpt2")
    assert model.to_string([torch.tensor([10, 11]), [12]]) == ["w10 w11", "w12"]
    assert model.to_string([torch.tensor(10), torch.tensor(11)]) == "w10 w11"
