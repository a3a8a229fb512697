"""Batches of prompts of similar length."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nnatomy.methods.by_length import PADDING, TOKENS, batches


@given(st.lists(st.integers(1, 3000), max_size=60))
def test_each_prompt_is_in_one_batch_with_little_padding(lengths: list[int]) -> None:
    found = list(batches(lengths, None))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        own = [lengths[i] for i in batch]
        assert own == sorted(own, reverse=True)
        assert len(batch) == 1 or len(batch) * own[0] <= TOKENS
        assert len(batch) * own[0] - sum(own) <= PADDING
    for batch, after in itertools.pairwise(found):  # none is closed too early
        one_more = [*batch, after[0]]
        whole = len(one_more) * lengths[batch[0]]
        assert whole > TOKENS or whole - sum(lengths[i] for i in one_more) > PADDING


@given(st.lists(st.integers(1, 3000), max_size=60), st.integers(1, 9))
def test_a_number_of_prompts_is_kept_to(lengths: list[int], size: int) -> None:
    found = list(batches(lengths, size))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in found[:-1])
    assert all(0 < len(batch) <= size for batch in found)
    order = [lengths[i] for batch in found for i in batch]
    assert order == sorted(order, reverse=True)
