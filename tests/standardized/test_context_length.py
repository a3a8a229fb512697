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
