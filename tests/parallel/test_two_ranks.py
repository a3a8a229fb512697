"""A model on two ranks gives what it gives in one process; `cluster.py` has all of it."""

from __future__ import annotations

import pytest
from parallel.ranks import checked

#: Quick ones: each kind once, on architectures that have something of their own to be wrong about.
CHECKS = (
    "reads[llama]",  # 47 neurons
    "writes[llama]",
    "gradients[llama]",
    "by_own_names[llama]",
    "refused[llama]",
    "out_of_step[llama]",
    "fails_alike[llama]",
    "generations[qwen2]",  # a tied head
    "reads[gemma2]",  # post-norms, soft caps, eager attention
    "gradients[phi3]",  # projections whose output is gathered
    "several_blocks[llama-one-kv]",  # one head of keys and values: every rank has all heads
    "reads[qwen3_moe]",  # a mixture of experts, norms of queries and keys
    "programs[qwen3_moe, 3]",
    "programs[llama, 3]",
)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return checked(2, CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, found: dict[str, str]) -> None:
    assert not found[check], found[check]
