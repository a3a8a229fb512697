"""Which keys a query may attend to, against Transformers' own masks."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from nnatomy.arch_configs import masks_windows, visible_keys

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(num_hidden_layers=2, sliding_window=3),
        Llama4TextConfig(
            num_hidden_layers=2, attention_chunk_size=3, layer_types=["full_attention", "chunked_attention"]
        ),
    ],
    ids=["gemma2", "llama4"],
)
def test_the_windows_are_those_of_the_masks(config: object) -> None:
    config._attn_implementation = "eager"  # type: ignore[attr-defined]
    for layer, kind in enumerate(config.layer_types):  # type: ignore[attr-defined]
        stream = torch.zeros(1, 8, 4)
        mask = MASKS[kind](config, stream, None, None)
        assert torch.equal(visible_keys(config, layer, 2, 8), mask[0, 0] == 0)


def test_gpt_neo_says_it_in_other_words() -> None:
    config = GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=2)
    everything, window = (visible_keys(config, layer, 2, 5) for layer in (0, 1))
    assert torch.equal(everything, torch.ones(5, 5).tril().bool())
    assert torch.equal(window, torch.ones(5, 5).tril().triu(-1).bool())


@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(sliding_window=4)])
def test_a_config_that_does_not_say_it_by_layer_says_nothing(config: object) -> None:
    assert visible_keys(config, 0, 32, 8) is None


def test_one_window_for_every_layer_where_the_model_makes_masks_of_it() -> None:
    config = MistralConfig(sliding_window=3, num_hidden_layers=2)
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(config, torch.zeros(1, 8, 4), None, None)
    assert torch.equal(visible_keys(config, 1, 2, 8, everywhere=True), mask[0, 0] == 0)
    assert visible_keys(MistralConfig(sliding_window=None), 1, 32, 8, everywhere=True) is None
    with torch.device("meta"):
        for causal_lm, masks in (
            (MistralForCausalLM(config), True),
            (LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), False),
        ):
            assert masks_windows(causal_lm, causal_lm.model.layers[0]) is masks
            assert masks_windows(causal_lm.model, causal_lm.model.layers[0]) is masks
