"""A position is a prompt's own, on whichever side its batch is padded: held against hooks on each prompt alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import encoder_decoders
import peft
import pytest
import torch
from architectures import PLACES, build, prompt_ids
from reference import edited
from torch import Tensor

from nnatomy import ArchConfig, StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import SteeringVector, get_token_activations

LENGTHS = (7, 4, 5)
VECTOR = torch.linspace(-2, 2, 32)
TYPES = ("gpt2", "llama", "gemma2", "bloom", "opt", "mixtral")
SIDES = ("left", "right", "none")
#: Of three prompts, of 7, 4 and 5 tokens.
POSITIONS: tuple[Any, ...] = (
    0,
    -1,
    2,
    -3,
    [0, -1],
    (1, 3),
    torch.tensor([0, 2]),
    slice(1, 3),
    slice(-2, None),
    slice(None, 2),
)


@functools.cache
def loaded(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(build(model_type))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompts(side: str) -> list[list[int]]:
    lengths = (5, 5, 5) if side == "none" else LENGTHS
    return [prompt_ids(1, length, seed=length + i)[0].tolist() for i, length in enumerate(lengths)]


def padded(each: list[list[int]], side: str) -> dict[str, Tensor]:
    """As a tokenizer gives them; padded with a token that is in the vocabulary."""
    longest = max(map(len, each))
    rows, mask = [], []
    for ids in each:
        filling, none = [5] * (longest - len(ids)), [0] * (longest - len(ids))
        rows.append(filling + ids if side == "left" else ids + filling)
        mask.append(none + [1] * len(ids) if side == "left" else [1] * len(ids) + none)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def logits_alone(model: StandardizedTransformer, path: str, ids: list[int], positions: Any) -> Tensor:
    """The logits at all positions of one prompt, with the vector added by a hook."""
    hf = model.hf_model

    def add(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, list(positions) if isinstance(positions, tuple) else positions] += 3 * VECTOR
        return hidden

    layer = hf.get_submodule(path)[1]
    return edited(lambda: hf(input_ids=torch.tensor([ids])).logits, layer, "output", add)[0]


def steered_alone(model: StandardizedTransformer, path: str, ids: list[int], positions: Any) -> Tensor:
    """The next token's probabilities."""
    return logits_alone(model, path, ids, positions)[-1].softmax(-1)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_steered_is_each_prompts_own(model_type: str, side: str) -> None:
    model, each = loaded(model_type), prompts(side)
    vector = SteeringVector({1: VECTOR}, "layers_output", model_type, "given")
    for positions in POSITIONS:
        expected = [logits_alone(model, PLACES[model_type][0], ids, positions) for ids in each]
        for ask in (
            lambda: model.steer(1, VECTOR, 3.0, token_positions=positions),  # noqa: B023
            lambda: vector.apply(model, 3.0, positions=positions),  # noqa: B023
        ):
            given = padded(each, side)
            with model.trace(given):
                ask()
                logits, next_token = model.logits, model.next_token_probs
            for i, alone in enumerate(expected):
                torch.testing.assert_close(logits[i][given["attention_mask"][i].bool()], alone, atol=2e-3, rtol=1e-3)
                assert close(next_token[i], alone[-1].softmax(-1)), positions
    for ids in each:  # and there is something to see
        plain = model.hf_model(input_ids=torch.tensor([ids])).logits[0]
        assert not torch.allclose(logits_alone(model, PLACES[model_type][0], ids, 0), plain, atol=0.1)


@pytest.mark.parametrize("side", SIDES)
def test_some_prompts_at_some_positions(side: str) -> None:
    """With `batch_index` both are taken in pairs, where both are several."""
    model, each = loaded("llama"), prompts(side)
    plain = [model.hf_model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in each]
    cases: list[tuple[Any, Any, dict[int, Any]]] = [
        (1, 0, {1: 0}),
        (1, [0, -1], {1: [0, -1]}),
        ([0, 2], [3, -2], {0: 3, 2: -2}),
        (-1, 4, {2: 4}),  # the second prompt may have no such position
        ([0, 2], 4, {0: 4, 2: 4}),
        (torch.tensor([True, False, True]), -1, {0: -1, 2: -1}),
        (0, slice(2, None), {0: slice(2, None)}),
    ]
    for batch_index, positions, meant in cases:
        with model.trace(padded(each, side)):
            model.steer(1, VECTOR, 3.0, positions, batch_index=batch_index)
            found = model.next_token_probs
        for i, ids in enumerate(each):
            alone = steered_alone(model, "model.layers", ids, meant[i]) if i in meant else plain[i]
            assert close(found[i], alone), (batch_index, positions, i)


def test_a_vector_for_each_position_or_prompt() -> None:
    model, each = loaded("llama"), prompts("right")
    by_position = torch.stack([VECTOR, -VECTOR])
    by_prompt = torch.stack([VECTOR, 0 * VECTOR, -VECTOR])
    hf, layer = model.hf_model, model.hf_model.model.layers[1]
    with model.trace(padded(each, "right")):
        model.steer(1, by_position, 3.0, [0, -1])
        first = model.next_token_probs
    with model.trace(padded(each, "right")):
        model.steer(1, by_prompt, 3.0, -2)
        second = model.next_token_probs
    for i, ids in enumerate(each):

        def ends(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[:, 0] += 3 * VECTOR
            hidden[:, -1] -= 3 * VECTOR
            return hidden

        def one(hidden: Tensor, i: int = i) -> Tensor:
            hidden = hidden.clone()
            hidden[:, -2] += 3 * by_prompt[i]
            return hidden

        for found, edit in ((first, ends), (second, one)):
            alone = edited(lambda: hf(input_ids=torch.tensor([ids])).logits, layer, "output", edit)  # noqa: B023
            assert close(found[i], alone[0, -1].softmax(-1))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_next_token_is_that_after_each_prompts_last(model_type: str, side: str) -> None:
    model, each = loaded(model_type), prompts(side)
    expected = torch.stack([model.hf_model(input_ids=torch.tensor([i])).logits[0, -1] for i in each]).softmax(-1)
    with model.trace(padded(each, side)):
        model.layers_output[0]
        assert close(model.next_token_probs, expected)
    with model.trace() as tracer:
        block = tracer.invoke(padded(each, side), lambda: model.next_token_probs)
        other = tracer.invoke(each[0] + each[1], lambda: model.next_token_probs)
    assert close(block.value, expected)
    alone = model.hf_model(input_ids=torch.tensor([each[0] + each[1]])).logits[0, -1].softmax(-1)
    assert close(other.value[0], alone)


def test_positions_in_blocks_of_batches_that_are_padded() -> None:
    model, each = loaded("llama"), prompts("right")

    def steered(positions: Any) -> Tensor:
        model.steer(1, VECTOR, 3.0, positions)
        return model.next_token_probs

    for positions in (0, -1, 2, -3):
        with model.trace() as tracer:
            blocks = [
                tracer.invoke(padded(each, "right"), functools.partial(steered, positions)),
                tracer.invoke(prompt_ids(1, 9)[0].tolist(), lambda: model.next_token_probs),
                tracer.invoke(padded(each[1:], "left"), functools.partial(steered, positions)),
            ]
        expected = torch.stack([steered_alone(model, "model.layers", ids, positions) for ids in each])
        assert close(blocks[0].value, expected)
        assert close(blocks[2].value, expected[1:])


# On which side a batch is padded.


@pytest.fixture
def demo() -> StandardizedTransformer:
    return StandardizedTransformer("demo:llama", validate=False)


def test_the_side_that_the_user_sets_is_that_of_the_batch(demo: StandardizedTransformer) -> None:
    texts = ["The capital of France is", "Japan is in"]
    left, right = [[1] * 5, [0, 0, 1, 1, 1]], [[1] * 5, [1, 1, 1, 0, 0]]
    alone = [demo(text).logits[0, -1].softmax(-1) for text in texts]
    assert demo.prepare(texts)["attention_mask"].tolist() == left
    assert demo.prepare(texts, padding_side="right")["attention_mask"].tolist() == right
    demo.tokenizer.padding_side = "right"
    prepared = demo.prepare(texts)
    assert prepared["attention_mask"].tolist() == right
    assert prepared["position_ids"].tolist()[1][:3] == [0, 1, 2]
    assert demo.prepare([demo.tokenizer(text)["input_ids"] for text in texts])["attention_mask"].tolist() == right
    assert demo.prepare(texts, padding_side="left")["attention_mask"].tolist() == left
    with demo.trace(texts):
        assert demo.attention_mask.tolist() == right
        assert close(demo.next_token_probs, torch.stack(alone))
    with demo.trace() as tracer:
        block = tracer.invoke(texts, lambda: (demo.attention_mask, demo.next_token_probs))
        tracer.invoke("The capital of France is Paris. Japan is in", lambda: demo.logits)
    assert block.value[0].tolist() == right
    assert close(block.value[1], torch.stack(alone))
    demo.tokenizer.padding_side = "left"
    assert demo.prepare(texts)["attention_mask"].tolist() == left
    with pytest.raises(InputError, match=r"padding_side='middle': it is 'left' or 'right'\."):
        demo.prepare(texts, padding_side="middle")


def test_nothing_is_generated_behind_padding(demo: StandardizedTransformer) -> None:
    texts = ["The capital of France is", "Japan is in"]
    expected = "What is generated would come behind the padding of prompts 1, which are padded on the right: pad them on the left"
    demo.tokenizer.padding_side = "right"
    for given in (texts, padded([[5, 6, 7], [5]], "right")):
        with pytest.raises(InputError, match=re.escape(expected)):
            demo.generate(given, max_new_tokens=2)
    with pytest.raises(InputError, match=re.escape(expected)), demo.generate(max_new_tokens=2) as tracer:
        tracer.invoke(texts, lambda: demo.logits)
    tokens = demo.generate(texts, padding_side="left", max_new_tokens=1).run()
    assert [demo.tokenizer.decode(row[-1]) for row in tokens] == [" Paris", " Asia"]


# Where it cannot be told.


def test_embeddings_without_a_mask_do_not_say_what_is_padding() -> None:
    model = loaded("llama")
    embeddings = model.hf_model.get_input_embeddings()(prompt_ids(2, 5))
    expected = (
        "Positions are those of each prompt's own tokens, and inputs_embeds without an attention_mask do not say which are "
        "padding: give attention_mask=..., 1 for tokens and 0 for padding (torch.ones(inputs_embeds.shape[:2]) if none is)."
    )

    def apply() -> None:
        SteeringVector({1: VECTOR}, "layers_output", "llama", "given").apply(model, positions=0)

    for ask in (
        lambda: model.next_token_probs,
        lambda: model.steer(0, VECTOR, token_positions=-1),
        apply,
        lambda: get_token_activations(model, tracer=tracer),
    ):
        with (
            pytest.raises(InputError, match=re.escape(expected)),
            model.trace(inputs_embeds=embeddings) as tracer,
        ):
            ask()
    with model.trace(inputs_embeds=embeddings):  # nothing of positions is asked
        model.steer(0, VECTOR)
        assert model.logits.shape[:2] == (2, 5)
    plain = model.hf_model(input_ids=prompt_ids(2, 5)).logits[:, -1].softmax(-1)
    with model.trace(inputs_embeds=embeddings, attention_mask=torch.ones(2, 5)):
        assert close(model.next_token_probs, plain)
    with model.trace(inputs_embeds=embeddings[:1]):  # one prompt has no reason to be padded
        assert close(model.next_token_probs, plain[:1])


def test_prompts_that_share_a_row_have_no_positions_of_their_own() -> None:
    model = loaded("llama")
    packed = {
        "input_ids": prompt_ids(1, 7),
        "attention_mask": None,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        "use_cache": False,
    }
    with (
        pytest.raises(InputError, match="beside position_ids says that several prompts share a row"),
        model.trace(**packed),
    ):
        model.next_token_probs


def test_logits_of_the_last_positions_alone() -> None:
    model, each = loaded("llama"), prompts("right")
    expected = torch.stack([model.hf_model(input_ids=torch.tensor([i])).logits[0, -1] for i in each]).softmax(-1)
    with model.trace(padded(each, "right"), logits_to_keep=4):
        assert close(model.next_token_probs, expected)
    with (
        pytest.raises(
            InputError, match="gave the logits of the last 2 positions alone, behind which prompts are padded"
        ),
        model.trace(padded(each, "right"), logits_to_keep=2),
    ):
        model.next_token_probs


def test_a_position_that_a_prompt_does_not_have() -> None:
    model, each = loaded("llama"), prompts("left")
    for side in ("left", "right"):
        for positions, prompt, count in ((4, 1, 4), (-6, 1, 4), (9, 0, 7)):
            text = f"prompt {prompt} has {count} tokens, at 0 to {count - 1} (or -{count} to -1); there is no position {positions}"
            with pytest.raises(InputError, match=re.escape(text)), model.trace(padded(each, side)):
                model.steer(0, VECTOR, token_positions=positions)


# In a generation, and behind a cache.


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_positions_count_on_in_what_is_generated(kwargs: dict[str, Any]) -> None:
    """Position 6 of prompts of 7 and 4 tokens: the first one's last, and the third new one of the second."""
    model, each = loaded("llama"), [prompt_ids(1, 7)[0].tolist(), prompt_ids(1, 4, seed=3)[0].tolist()]
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **kwargs}
    edited_view = model.edit(
        lambda: SteeringVector({1: VECTOR}, "layers_output", "llama", "").apply(model, 3, positions=slice(6, 7))
    )
    steered_view = model.edit(lambda: model.steer(1, VECTOR, 3.0, slice(6, 7)))
    found = edited_view.generate(each, **greedy).run()
    assert torch.equal(steered_view.generate(each, **greedy).run(), found)
    for row, ids in zip(found, each, strict=True):
        tokens = list(ids)
        for _ in range(5):

            def add(hidden: Tensor) -> Tensor:
                hidden = hidden.clone()
                hidden[:, 6:7] += 3 * VECTOR
                return hidden

            hf = model.hf_model
            call = lambda: hf(input_ids=torch.tensor([tokens]), use_cache=False).logits  # noqa: B023, E731
            tokens.append(int(edited(call, hf.model.layers[1], "output", add)[0, -1].argmax()))
        assert row[-len(tokens) :].tolist() == tokens


def test_a_position_in_the_cache_is_said_to_be_there() -> None:
    model, ids = loaded("llama"), prompt_ids(1, 6)
    cache = model.hf_model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with (
        pytest.raises(
            InputError,
            match=r"Position 2 is in the KV cache .* of prompt 0 this pass computes positions 5 to 5",
        ),
        model.trace(ids[:, 5:], past_key_values=cache),
    ):
        model.steer(0, VECTOR, token_positions=2)


# Other classes.


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_of_an_encoder_decoder_positions_are_the_decoders(name: str) -> None:
    hf = encoder_decoders.build(name)
    model = StandardizedTransformer(hf)
    decoder_ids = torch.tensor([[0, 5, 9], [0, 7, 8]])
    given = {**padded([[3, 4, 5, 6, 9], [7, 8]], "right"), "decoder_input_ids": decoder_ids}
    wide = model.hidden_size
    vector = SteeringVector({0: torch.ones(wide)}, "layers_output", name, "given")
    layer = model.layers[0].module

    def add(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, 1] += 1
        return hidden

    expected = edited(lambda: hf(**given).logits, layer, "output", add)[:, -1].softmax(-1)
    for ask in (
        lambda: model.steer(0, torch.ones(wide), token_positions=1),
        lambda: vector.apply(model, positions=-2),
    ):
        with model.trace(given):
            ask()
            assert close(model.next_token_probs, expected)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_a_soft_prompt_has_no_positions_and_padding_behind_it_shows(model_type: str, kind: Any) -> None:
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(build(model_type), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    model, each = StandardizedTransformer(wrapped), prompts("right")
    layer = wrapped.get_submodule("base_model." + PLACES[model_type][0])[1]

    def alone(ids: list[int], position: int | None) -> Tensor:
        def add(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            if position is not None:
                hidden[:, 4:][:, position] += 3 * VECTOR
            return hidden

        call = lambda: wrapped(input_ids=torch.tensor([ids])).logits  # noqa: E731
        return edited(call, layer, "output", add)[0, -1].softmax(-1)

    for position in (None, 0, -1, 2):
        with model.trace(padded(each, "right")):
            if position is not None:
                model.steer(1, VECTOR, 3.0, position)
            found = model.next_token_probs
        assert close(found, torch.stack([alone(ids, position) for ids in each])), position
    if model_type == "bloom":  # whose positions follow the mask
        assert model.validation["padding", None].status == "verified"
        with model.trace(each):
            assert close(model.next_token_probs, torch.stack([alone(ids, None) for ids in each]))
        return
    row = model.validation["padding", None]
    assert row.status == "refused"
    assert row.detail.startswith("it shows in layers_output[-1], by ")
    with pytest.raises(
        InputError,
        match=r"no way to one length: it shows .*, or pad on the right \(padding_side='right'\)",
    ):
        model.trace(each)
    with model.trace(each, padding_side="right"):
        assert close(model.next_token_probs, torch.stack([alone(ids, None) for ids in each]))
    with pytest.warns(UserWarning, match=r"Prompts 1, 2 are padded on the left .* changes their values: it shows"):
        model.prepare(padded(each, "left"))


def test_padding_that_has_not_been_checked_is_not_verified() -> None:
    """Of a model whose MLP is said to be another module, other names fail first."""
    hf = build("llama")
    config = ArchConfig(layers="model.layers", self_attn="self_attn", mlp="mlp.gate_proj")
    model = StandardizedTransformer(hf, arch_config=config, allow_failures=True)
    each = prompts("right")
    row = model.validation["padding", None]
    assert (row.status, row.detail) == (
        "unverified",
        "it could not be checked: other names have failed before",
    )
    assert not model.takes_padding
    with pytest.raises(InputError, match="whether it shows could not be checked: other names have failed before"):
        model.trace(each)
    expected = torch.stack([hf(input_ids=torch.tensor([ids])).logits[0, -1] for ids in each]).softmax(-1)
    with model.trace(padded(each, "right")):
        assert close(model.next_token_probs, expected)
