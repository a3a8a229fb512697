"""Results of a model at a server are what they are of one here: text, tables, files and plots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_server import served
from results_asked import ASKS
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.methods.result import KINDS, Result


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    torch.set_num_threads(1)
    model = StandardizedTransformer("demo:gpt2")
    return {name: ask(model) for name, (ask, *_) in ASKS.items()}


@pytest.fixture(scope="module")
def remote() -> Iterator[Any]:
    with served("demo:gpt2") as process:
        model: Any = StandardizedTransformer("demo:gpt2", server=process.address)
        yield model
        model.close()


def same(one: Any, other: Any) -> bool:
    """Of tensors each number, and that both are plain ones."""
    if isinstance(one, Tensor):
        alike = type(one) is type(other) is Tensor and (one.dtype, one.device) == (other.dtype, other.device)
        return alike and one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return type(one) is type(other) and bool(one == other)


def test_two_that_differ_are_seen(local: dict[str, Any]) -> None:
    one = local["head_scores"].effect
    assert same(one, one.clone())
    assert not same(one, one + 1e-6)
    assert not same(one, one.double())
    assert not same((1,), [1])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by points"])
@pytest.mark.parametrize("name", ASKS)
def test_a_result_of_a_server_is_as_one_of_here(
    local: dict[str, Any], remote: Any, name: str, whole: bool, tmp_path: Path
) -> None:
    wanted, remote.whole_methods = local[name], whole
    before = remote._connection.trips
    found = ASKS[name][0](remote)
    assert remote._connection.trips > before
    assert type(found) is type(wanted)
    mine, theirs = found._state(), wanted._state()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not same(mine[key], theirs[key])] == []
    assert repr(found) == repr(wanted)
    assert found.top(7) == wanted.top(7)
    assert found.to_dataframe().equals(wanted.to_dataframe())
    assert found.to_xarray().identical(wanted.to_xarray())
    assert found.plot().to_json() == wanted.plot().to_json()
    found.save(tmp_path / "result")
    wanted.save(tmp_path / "wanted")
    assert (tmp_path / "result").read_bytes() == (tmp_path / "wanted").read_bytes()
    assert repr(Result.load(tmp_path / "result")) == repr(wanted)


def test_each_class_of_results_is_among_them(local: dict[str, Any]) -> None:
    assert {type(one).__name__ for one in local.values()} == set(KINDS) - {
        "ImageLens",
        "PicturePatching",
    }  # of prompts with images
