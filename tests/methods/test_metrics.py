"""Metrics against the same written out."""

from __future__ import annotations

import math

import pytest
import torch

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import kl_divergence, log_probability, logit_difference, probability
from nnatomy.methods.metrics import token_ids

LOGITS = torch.tensor([[3.0, 0.0, 1.0], [5.0, -1.0, 2.5]])


@pytest.fixture(scope="module", params=["demo:gpt2", "demo:llama"])
def demo(request: pytest.FixtureRequest) -> StandardizedTransformer:
    return StandardizedTransformer(request.param)


def test_one_answer_counts_for_all_rows() -> None:
    assert logit_difference(0, 2)(LOGITS).tolist() == [2.0, 2.5]
    exps = [[math.exp(x) for x in row] for row in LOGITS.tolist()]
    expected = [row[2] / sum(row) for row in exps]
    assert probability(2)(LOGITS).tolist() == pytest.approx(expected)
    assert log_probability(2)(LOGITS).tolist() == pytest.approx([math.log(p) for p in expected])


def test_or_each_row_has_its_own() -> None:
    assert logit_difference([0, 1], [2, 0])(LOGITS).tolist() == [2.0, -6.0]
    with pytest.raises(InputError, match="^3 answers for 2 rows of logits: give one, or one for each.$"):
        probability([0, 1, 2])(LOGITS)


def test_the_divergence_is_from_the_reference() -> None:
    p, q = LOGITS.softmax(-1)
    expected = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    assert kl_divergence(LOGITS[0])(LOGITS).tolist() == pytest.approx([0, expected], abs=1e-6)
    assert kl_divergence(LOGITS)(LOGITS.flip(0))[0].item() == pytest.approx(expected, abs=1e-6)
    masked = torch.tensor([[1.0, 2.0, -math.inf]])
    assert kl_divergence(masked)(masked).item() == pytest.approx(0, abs=1e-6)
    missed = torch.tensor([[1.0, -math.inf, 2.0]])
    assert kl_divergence(masked)(missed).item() > 1e6, "nothing where the reference has something"


def test_texts_are_one_token(demo: StandardizedTransformer) -> None:
    ids = token_ids([" Paris", 7], demo)
    assert demo.tokenizer.decode(ids[0]) == " Paris"
    assert ids[1] == 7
    with pytest.raises(
        InputError, match=r"The answer ' Paris Rome' is 2 tokens, \[.*\]: a metric looks at the next token"
    ):
        token_ids(" Paris Rome", demo)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match=r"^The answer ' Paris' is text: give the model whose tokenizer reads it"):
        logit_difference(" Paris", " Rome")
