"""Types and shapes are checked at run time in the whole suite: `conftest.py` switches that on, before any import."""

from __future__ import annotations

from threading import Lock
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from jaxtyping import TypeCheckError

from nnatomy.core import worker
from nnatomy.methods import directions, kl_divergence
from nnatomy.standardized.inputs import Prompts


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = kl_divergence(torch.zeros(1, 2))
    assert metric(torch.zeros(1, 2)).shape == (1,)
    with pytest.raises(TypeCheckError, match="Type-check error whilst checking the parameters of"):
        metric(torch.zeros(2))
    with pytest.raises(TypeCheckError, match="Type-check error whilst checking the return value of"):
        monkeypatch.setattr(directions, "_scaled", lambda *_: torch.zeros(3))
        directions.pca(torch.zeros(2, 2), torch.ones(2, 2))


def test_types_where_there_is_no_shape() -> None:
    with pytest.raises(BeartypeCallHintParamViolation):
        worker.wait_for(Lock(), seconds="long")  # type: ignore[arg-type]


def test_what_is_returned_where_there_is_no_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(None, "", 0, None, 5, takes_positions=False)
    assert prompts.token_lists([1, 2]) == [[1, 2]]
    not_a_list: Any = lambda *_: (1, 2)  # noqa: E731
    monkeypatch.setattr(Prompts, "_one", not_a_list)
    with pytest.raises(BeartypeCallHintReturnViolation):
        prompts.token_lists([1, 2])
