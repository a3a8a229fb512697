"""Prompts longer than the model's table of positions are refused at the user's line; what has no table takes any."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
import zoo
from owners import owner
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import cache_name
from nnatomy.errors import InputError

LIMIT = 64  # in the config of every type of the zoo that has one
#: What has such a table: of learned positions, of rotations or biases by distance computed once, of buffers as long.
TABLES = (
    *("gpt2", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "bart", "openai-gpt", "roberta"),
    *("gptj", "codegen", "ctrl", "mpt"),
    *("bert", "xlm", "big_bird", "git"),
)
#: What computes positions as it needs them.
ANY = ("llama", "bloom", "xglm", "mistral", "gpt_neox", "falcon", "mamba")


def ids(seq: int, batch: int = 1) -> Tensor:
    return torch.randint(16, zoo.configs.VOCAB, (batch, seq), generator=torch.Generator().manual_seed(0))


def longest(hf: nn.Module) -> int:
    """The longest prompt on which the model itself runs (RoBERTa: 2 less than its config says)."""

    def runs(seq: int) -> bool:
        try:
            hf(ids(seq))
        except (IndexError, RuntimeError):
            return False
        return True

    with torch.no_grad():
        return next(seq for seq in range(LIMIT + 6, 0, -1) if runs(seq))


@pytest.mark.parametrize("model_type", TABLES)
def test_beyond_the_table(model_type: str) -> None:
    model = zoo.loaded(model_type)
    limit = longest(model.hf_model)
    text = f"The prompt is of {limit + 1} tokens, and .* has no positions for more than {limit} "
    text += rf"\((max_position_embeddings|n_positions|max_seq_len)=64 in its config\): give fewer, such as ids\[..., -{limit}:\]"
    calls: tuple[Any, ...] = (model, model.trace, model.generate)
    for call in calls:
        with pytest.raises(InputError, match=text) as caught:
            call(ids(limit + 1))
        files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert 1 <= [owner(file) for file in files].count("us") <= 2
    with torch.no_grad(), model.trace(ids(limit)):
        assert torch.equal(model.logits, model.hf_model(ids(limit)).logits)


@pytest.mark.parametrize("model_type", ANY)
def test_what_has_no_table_takes_any(model_type: str) -> None:
    model = zoo.loaded(model_type)
    with torch.no_grad(), model.trace(ids(LIMIT + 6)):
        assert torch.equal(model.logits, model.hf_model(ids(LIMIT + 6)).logits)


def test_padding_a_cache_and_positions() -> None:
    model = zoo.loaded("gpt2")
    hf: Any = model.hf_model
    short = {"input_ids": ids(LIMIT + 6), "attention_mask": torch.ones(1, LIMIT + 6, dtype=torch.long)}
    short["attention_mask"][:, :6] = 0  # of padding, for which there need be no position
    with torch.no_grad():
        with model.trace(short):
            assert torch.allclose(model.logits[:, 6:], hf(ids(LIMIT + 6)[:, 6:]).logits, atol=1e-4)
        again = torch.arange(LIMIT + 6)[None] % LIMIT
        with model.trace(ids(LIMIT + 6), position_ids=again):
            assert torch.equal(model.logits, hf(ids(LIMIT + 6), position_ids=again).logits)
        name, past = cache_name(hf), DynamicCache(config=hf.config)
        hf(ids(LIMIT), **{name: past}, use_cache=True)
        with pytest.raises(InputError, match="The prompt is of 65 tokens"):
            model.trace(ids(1), **{name: past}, use_cache=True)
    with pytest.raises(InputError, match="The prompt is of 65 tokens"), model.trace() as tracer:
        tracer.invoke(ids(LIMIT + 1)[0].tolist(), lambda: model.logits)


def test_another_error_stays_the_models_own() -> None:
    model = StandardizedTransformer(zoo.build("gpt2"))

    def fail(*_: Any) -> None:
        raise RuntimeError("the model's own")

    model.hf_model.transformer.wte.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="^the model's own$"), model.trace(ids(LIMIT + 1)):
        model.logits


GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_bigcode", "biogpt", "gptj"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_generation_beyond_the_table(model_type: str, cached: bool) -> None:
    model = zoo.loaded(model_type)
    hf: Any = model.hf_model
    limit = longest(hf)
    more = {"use_cache": cached, **GREEDY}
    prompt = ids(limit - 4)
    fits = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5, **more)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, min_new_tokens=5, **more).run(), fits)
    text = rf"Step 5 of the generation is at position {limit + 1}, and \w+ has no positions for more than {limit} \(\w+=64 in its "
    text += rf"config\): after a prompt of {limit - 4} tokens there is room for 5 new ones, max_new_tokens=5\. For more"
    with pytest.raises(InputError, match=text):
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, **more).run()
    with (
        pytest.raises(InputError, match=text),
        model.generate(prompt, max_new_tokens=9, min_new_tokens=9, **more) as tracer,
    ):
        for _ in tracer.iter[:]:
            model.layers_output[1]
    with pytest.raises(InputError, match=text):
        model.generate(prompt, max_length=limit + 5, min_length=limit + 5, **more).run()
    assert torch.equal(
        model.generate(prompt, max_new_tokens=5, min_new_tokens=5, **more).run(), fits
    )  # and nothing is left


def test_a_generation_that_ends_in_time_is_none() -> None:
    model = zoo.loaded("gpt2")
    prompt = ids(LIMIT - 4)
    first = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, **GREEDY).run()[0, -3:]
    found = model.generate(prompt, max_new_tokens=50, eos_token_id=int(first[-1]), **GREEDY).run()
    assert found.shape[1] <= LIMIT - 1


def test_of_a_batch_the_longest_prompt_counts_without_its_padding() -> None:
    model = zoo.loaded("gpt2")
    rows = [ids(40)[0].tolist(), ids(LIMIT - 1)[0].tolist()]
    with pytest.raises(InputError, match="after a prompt of 63 tokens there is room for 2 new ones"):
        model.generate(rows, max_new_tokens=4, min_new_tokens=4, **GREEDY).run()
    short = {"input_ids": ids(LIMIT - 1), "attention_mask": torch.ones(1, LIMIT - 1, dtype=torch.long)}
    short["attention_mask"][:, :6] = 0
    expected = model.hf_model.generate(**short, max_new_tokens=8, min_new_tokens=8, **GREEDY)
    assert torch.equal(model.generate(short, max_new_tokens=8, min_new_tokens=8, **GREEDY).run(), expected)
    with pytest.raises(InputError, match="after a prompt of 57 tokens there is room for 8 new ones"):
        model.generate(short, max_new_tokens=9, min_new_tokens=9, **GREEDY).run()
    with (
        pytest.raises(InputError, match="after a prompt of 63 tokens"),
        model.generate(max_new_tokens=4, min_new_tokens=4, **GREEDY) as tracer,
    ):
        tracer.invoke(rows[0], lambda: tracer.result)
        tracer.invoke(rows[1], lambda: tracer.result)


@pytest.mark.parametrize("model_type", ["llama", "bloom", "mamba"])
def test_a_generation_of_what_has_no_table_goes_on(model_type: str) -> None:
    model = zoo.loaded(model_type)
    prompt = ids(LIMIT - 2)
    more = {"max_new_tokens": 6, "min_new_tokens": 6, **GREEDY}
    expected = model.hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)
    assert torch.equal(model.generate(prompt, **more).run(), expected)
