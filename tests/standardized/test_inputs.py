"""Prompts of every kind, padding, and what is refused."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from architectures import VOCAB, build, shared
from owners import owner
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.standardized.special_tokens import pad_token_id


@pytest.fixture(scope="module")
def demo() -> StandardizedTransformer:
    return StandardizedTransformer("demo:gpt2")


@pytest.fixture(scope="module")
def no_tokenizer() -> StandardizedTransformer:
    return StandardizedTransformer(shared("llama"))


PROMPT = "The capital of France is"


def test_every_kind_of_prompt_gives_the_same_ids(demo: StandardizedTransformer) -> None:
    ids = demo.tokenizer(PROMPT)["input_ids"]
    expected = torch.tensor([ids])
    encoding = demo.tokenizer(PROMPT, return_tensors="pt")
    assert isinstance(encoding, BatchEncoding)
    kinds: list[Any] = [PROMPT, [PROMPT], ids, [ids], torch.tensor(ids), expected, [torch.tensor(ids)]]
    kinds += [
        encoding,
        dict(encoding),
        {"input_ids": ids},
        demo.tokenizer(PROMPT),
        dict(demo.tokenizer([PROMPT])),
    ]
    for prompt in kinds:
        prepared = demo.prepare(prompt)
        assert torch.equal(prepared["input_ids"], expected), prompt
        assert torch.equal(torch.as_tensor(prepared["attention_mask"]), torch.ones_like(expected))
        assert "position_ids" not in prepared
    assert torch.equal(demo.prepare(input_ids=expected)["input_ids"], expected)


def test_a_batch_is_padded_left_with_positions_from_the_mask(demo: StandardizedTransformer) -> None:
    prepared = demo.prepare([[5, 6, 7], [8]])
    pad = demo.tokenizer.pad_token_id
    assert prepared["input_ids"].tolist() == [[5, 6, 7], [pad, pad, 8]]
    assert prepared["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prepared["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_positions_of_the_users_own_are_kept(demo: StandardizedTransformer) -> None:
    positions = torch.tensor([[4, 5, 6], [7, 8, 9]])
    assert torch.equal(demo.prepare([[5, 6, 7], [8]], position_ids=positions)["position_ids"], positions)
    assert demo.prepare([5, 6, 7], position_ids=[4, 5, 6])["position_ids"].tolist() == [[4, 5, 6]]


def test_the_users_own_mask_gives_positions_on_either_side(demo: StandardizedTransformer) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert demo.prepare(ids, attention_mask=mask)["position_ids"].tolist() == [[0, 1, 2], [0, 1, 1]]


def test_a_chat_goes_through_the_template() -> None:
    model = StandardizedTransformer("demo:gpt2")
    chat = [{"role": "user", "content": PROMPT}]
    with pytest.raises(InputError, match="no chat template"):
        model.prepare(chat)
    model.tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    expected = model.tokenizer(f"Q: {PROMPT} A:")["input_ids"]
    assert model.prepare(chat)["input_ids"].tolist() == [expected]
    assert model.prepare([chat, chat])["input_ids"].tolist() == [expected, expected]


def test_embeddings_in_place_of_ids(no_tokenizer: StandardizedTransformer) -> None:
    embeddings = torch.randn(1, 4, 32)
    with torch.no_grad(), no_tokenizer.trace(inputs_embeds=embeddings):
        assert torch.equal(no_tokenizer.layers_input[0], embeddings)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "Prompt 0 is empty: '' has no tokens."),
        (["ok", ""], "Prompt 1 is empty: '' has no tokens."),
        ([], r"The prompt is empty: \[\]."),
        ([[]], r"Prompt 0 is empty: \[\]."),
        (torch.empty(0, dtype=torch.long), r"The prompt is empty: token ids of shape \(0,\)."),
        (None, "There is no prompt: give a string, token ids, or a dict with input_ids."),
        ({"attention_mask": torch.ones(1, 2)}, "There is no prompt"),
        (torch.ones(1, 2), r"Token ids are integers .* got torch.float32 of \(1, 2\)"),
        (torch.ones(1, 2, 3, dtype=torch.long), r"got torch.int64 of \(1, 2, 3\)"),
        ([[1, 10**6]], r"Token id 1000000 is outside of the model's vocabulary of \d+ \(0 to \d+\)"),
        ([1, -1], "Token id -1 is outside of the model's vocabulary"),
        (3.5, "float is no prompt: give a string, a chat"),
        ([True, False], "list is no prompt"),
        ([[1, 2], "x", 3.5], "list is no prompt"),
    ],
)
def test_what_cannot_be_run_is_refused(demo: StandardizedTransformer, prompt: Any, text: str) -> None:
    for trace in (demo.trace, demo.generate):
        with pytest.raises(InputError, match=text), trace(prompt):
            demo.logits  # with no prompt at all, blocks of their own might have come


def test_text_without_a_tokenizer_is_refused(no_tokenizer: StandardizedTransformer) -> None:
    with pytest.raises(InputError, match="The prompt is text, but there is no tokenizer: pass one"):
        no_tokenizer.trace("hello")
    with pytest.raises(InputError, match="only with a tokenizer"):
        no_tokenizer.get_topk_closest_tokens(torch.zeros(32))


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Any) -> None:
    shared("llama").save_pretrained(tmp_path)
    model = StandardizedTransformer(tmp_path)
    with model.trace([3, 4, 5]):
        assert model.logits.shape == (1, 3, VOCAB)
    with pytest.raises(InputError, match=r"none could be loaded from .* Pass one: .*tokenizer=\.\.\."):
        model.trace("hello")


def test_the_users_tokenizer_is_left_as_it_was() -> None:
    tokenizer = AutoTokenizer.from_pretrained(StandardizedTransformer("demo:gpt2").hf_model.name_or_path)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    model = StandardizedTransformer(StandardizedTransformer("demo:gpt2").hf_model, tokenizer)
    prepared = model.prepare(["The capital of France is", "The capital"])
    assert prepared["attention_mask"][1, 0] == 0
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"


def test_the_pad_token_is_in_the_vocabulary() -> None:
    assert pad_token_id(None, build("bloom", pad_token_id=None, eos_token_id=10**6).config, VOCAB) == 0
    assert pad_token_id(None, build("llama", pad_token_id=None).config, VOCAB) == 2


def test_input_ids_and_mask_can_be_read_at_any_time(demo: StandardizedTransformer) -> None:
    with demo.trace([[5, 6, 7], [8]]):
        late: Tensor = demo.layers_output[2]
        assert demo.input_ids.shape == late.shape[:2]
        assert demo.input_size == (2, 3)
        assert demo.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_embeddings_of_a_padded_batch_have_positions(demo: StandardizedTransformer) -> None:
    prompts = ["The capital of France is", "Japan is in"]
    inputs = demo.prepare(prompts)
    embeds = demo.hf_model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        with demo.trace(prompts):
            expected = demo.logits
        with demo.trace(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]):
            logits = demo.logits
    assert torch.allclose(logits[:, -1], expected[:, -1], atol=1e-4)


def test_what_a_tokenizer_gives_without_padding(demo: StandardizedTransformer) -> None:
    prompts = ["The capital of France is", "Japan is in"]
    given = demo.tokenizer(prompts)
    expected = demo.prepare(prompts)
    for one in (given, dict(given)):
        inputs = demo.prepare({name: one[name] for name in ("input_ids", "attention_mask")})
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match="rows of several lengths, and masks tokens"):
        demo.prepare({"input_ids": [[3, 4], [5]], "attention_mask": [[0, 1], [1]]})


def test_which_prompt_is_empty(demo: StandardizedTransformer) -> None:
    with pytest.raises(InputError, match=r"Prompt 1 is empty: \[\]\."):
        demo.trace([[1, 2], []])


def test_what_cannot_be_run_is_said_at_the_users_line(
    demo: StandardizedTransformer, no_tokenizer: StandardizedTransformer
) -> None:
    for ask in (
        lambda: demo.trace(""),
        lambda: demo.generate([3, 10**6]),
        lambda: demo.scan([]),
        lambda: demo(torch.ones(2)),
        lambda: no_tokenizer.prepare(PROMPT),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert 1 <= [owner(file) for file in files].count("us") <= 2


def test_an_error_in_an_edit_is_at_the_edits_line(demo: StandardizedTransformer) -> None:
    def steer_too_wide() -> None:
        demo.steer(0, torch.ones(demo.hidden_size + 1))

    edited = demo.edit(steer_too_wide)
    for run in (lambda: edited(PROMPT), lambda: edited.trace(PROMPT).run()):
        with pytest.raises(InputError, match="The steering vector is of shape") as caught:
            run()
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert "steer_too_wide" in names


def test_another_tokenizer_is_used_at_once(demo: StandardizedTransformer) -> None:
    words = Tokenizer(models.WordLevel({word: i + 3 for i, word in enumerate(PROMPT.split())}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="The")
    theirs, ours = other(PROMPT)["input_ids"], demo.tokenizer(PROMPT)["input_ids"]
    assert theirs != ours
    model = StandardizedTransformer(demo.hf_model, demo.tokenizer)
    edited = model.edit(lambda: model.skip_layer(1))
    other.padding_side, other.pad_token = "right", "is"
    model.tokenizer = other
    assert model.tokenizer is other
    with torch.no_grad(), model.trace(PROMPT):
        assert model.input_ids.tolist() == [theirs]
    padded = model.prepare([[5, 6], [8]])  # on the left: what it says when it is given is nobody's wish
    assert padded["input_ids"].tolist() == [[5, 6], [theirs[-1], 8]]
    model.tokenizer.padding_side = "left"
    model.tokenizer = other
    other.padding_side = "right"
    assert model.prepare([[5, 6], [8]])["input_ids"].tolist() == [[5, 6], [8, theirs[-1]]]
    state = torch.randn(model.hidden_size)
    assert "is" in model.get_topk_closest_tokens(state, k=model.vocab_size)
    # A view made before has its own, and so has the one that all was made of.
    assert edited.tokenizer is demo.tokenizer
    assert edited.prepare(PROMPT)["input_ids"].tolist() == [ours]
    assert model.edit(lambda: None).prepare(PROMPT)["input_ids"].tolist() == [theirs]
    assert model.refresh().prepare(PROMPT)["input_ids"].tolist() == [theirs]
    model.tokenizer = None
    with pytest.raises(InputError, match="The prompt is text, but there is no tokenizer"):
        model.prepare(PROMPT)


def test_what_is_no_tokenizer_is_not_assigned(demo: StandardizedTransformer) -> None:
    before = demo.tokenizer
    with pytest.raises(InputError) as caught:
        demo.tokenizer = "gpt2"
    text = "model.tokenizer = 'gpt2': it is a tokenizer, as AutoTokenizer.from_pretrained(...) gives, or None."
    assert str(caught.value) == text
    assert demo.tokenizer is before


PADDED = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]])


@pytest.fixture
def pads() -> StandardizedTransformer:
    """Its padding is token 0, its beginning 1, its end 2."""
    return StandardizedTransformer(shared("llama"))


def test_padding_without_a_mask_is_warned_of(pads: StandardizedTransformer) -> None:
    text = (
        "Prompts 0 begin or end with token 0, which is that of padding, and no attention_mask says which tokens are: all are "
        "taken for the prompt's own. Give a mask (attention_mask=ids != 0, or torch.ones_like(ids) where they are meant), or a "
        "list of the prompts without padding."
    )
    for given in (
        PADDED,
        PADDED.flip(1),
        {"input_ids": PADDED},
        {"input_ids": PADDED, "attention_mask": None},
    ):
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match="no attention_mask says") as caught,
            pads.trace(given),
        ):
            pass
        assert [str(one.message) for one in caught] == [text]
        assert caught[0].filename == __file__


def test_no_warning_where_nothing_is_amiss(pads: StandardizedTransformer) -> None:
    mask = PADDED != 0
    inner = torch.tensor([[5, 0, 6, 7]])
    prompts: list[Any] = [
        PADDED[1:],
        inner,
        [[5, 6], [7, 8, 9]],
        {"input_ids": PADDED, "attention_mask": mask},
        {"input_ids": PADDED, "attention_mask": torch.ones_like(PADDED)},
        torch.tensor([[1, 5, 6, 2]]),
    ]
    for given in prompts:  # warnings are errors in these tests
        with torch.no_grad(), pads.trace(given):
            pass
    demo = StandardizedTransformer("demo:gpt2")
    for end in {demo.tokenizer.eos_token_id, demo.tokenizer.bos_token_id}:
        demo.prepare(torch.tensor([[end, 5, 6, end]]))


def test_padding_that_is_written_as_the_end_is_not_told_from_it() -> None:
    hf = build("llama")
    hf.config.pad_token_id = hf.config.eos_token_id
    StandardizedTransformer(hf).prepare(torch.tensor([[2, 2, 5, 6]]))


@pytest.mark.parametrize("shape", [(1, 3), (1, 8), (2, 5), (0, 5)])
@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_a_mask_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    """Transformers fills one up with zeros, or cuts it: other positions would be left out than are meant."""
    model = StandardizedTransformer(build("llama"))
    given = torch.tensor([[5, 6, 7, 8, 9]]) if name == "input_ids" else torch.randn(1, 5, 32)
    text = rf"attention_mask has the shape \({shape[0]},.*and what is given is 1 prompt of 5 positions: give one number for each"
    with pytest.raises(InputError, match=text), model.trace({name: given, "attention_mask": torch.ones(shape)}):
        pass


def test_a_mask_in_front_of_a_cache_has_its_positions_too() -> None:
    hf = build("llama")
    model, ids = StandardizedTransformer(hf), torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        cache = hf(ids[:, :3]).past_key_values
        with model.trace(ids[:, 3:], past_key_values=cache, attention_mask=torch.ones(1, 5)):
            logits = model.logits
        torch.testing.assert_close(logits, hf(ids).logits[:, 3:], atol=1e-5, rtol=0)
