"""`make cluster`, which takes minutes: every check on every architecture on two ranks, some on three and four."""

from __future__ import annotations

import pytest
from parallel.ranks import checked

TYPES = (
    *(
        "llama",
        "llama-eager",
        "llama-one-kv",
        "qwen2",
        "qwen3",
        "qwen3-one-kv",
        "mistral-three-heads",
        "gemma2",
        "gemma3_text",
    ),
    *("phi3", "olmo2", "granite", "cohere", "gpt_neox", "starcoder2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"),
)
KINDS = ("reads", "writes", "gradients", "generations", "several_blocks")


@pytest.mark.parametrize("model_type", TYPES)
def test_two_ranks(model_type: str) -> None:
    found = checked(2, [*(f"{kind}[{model_type}]" for kind in KINDS), f"programs[{model_type}, 25]"], 900)
    assert not any(found.values()), "\n".join(found.values())


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks(ranks: int) -> None:
    types = ("llama", "qwen3_moe", "phi3")  # heads that go into four ranks (keys' do not), and not into three
    found = checked(ranks, [f"{kind}[{model_type}]" for model_type in types for kind in KINDS], 900)
    assert not any(found.values()), "\n".join(found.values())
