"""What a block or a method gives on a model at a server is, bit for bit, what it gives on the same model here."""

from __future__ import annotations

import io
import pdb
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from remote_blocks import BLOCKS, leaves, methods
from remote_server import served

from nnatomy import StandardizedTransformer

MODELS = ("demo:llama", "demo:gpt2")
METHODS = sorted(methods(None))


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A model here, and the same one at a server in another process."""
    torch.set_num_threads(1)
    with served(request.param) as server:
        remote: Any = StandardizedTransformer(request.param, server=server.address)
        yield StandardizedTransformer(request.param), remote
        remote.close()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("by_commands", [False, True], ids=["points", "commands"])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_block(pair: tuple[Any, Any], name: str, by_commands: bool) -> None:
    local, remote = pair
    remote.by_commands = by_commands
    wanted, found = BLOCKS[name](local), BLOCKS[name](remote)
    assert wanted.keys() == found.keys()
    differ = [key for key, one in wanted.items() if not same(*leaves(one), *leaves(found[key]))]
    assert not differ


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by passes"])
@pytest.mark.parametrize("name", METHODS)
def test_method(pair: tuple[Any, Any], name: str, whole: bool) -> None:
    local, remote = pair
    remote.by_commands, remote.whole_methods = False, whole
    torch.manual_seed(0)
    wanted = leaves(methods(local)[name]())
    torch.manual_seed(0)
    found = leaves(methods(remote)[name]())
    assert wanted
    assert len(wanted) == len(found)
    assert all(map(same, wanted, found))


def test_that_it_can_differ(pair: tuple[Any, Any]) -> None:
    local, remote = pair
    with remote.trace("The capital of France is"):
        found = remote.layers_output[2]
        found[0, 0, 0] += 1e-5
    with local.trace("The capital of France is"):
        wanted = local.layers_output[2]
    assert not same(*leaves(wanted), *leaves(found))


def test_trips(pair: tuple[Any, Any]) -> None:
    """By points, one for each read and one at the end; by commands one, however much is read."""
    _, remote = pair

    def trips(by_commands: bool) -> int:
        remote.by_commands = by_commands
        before = remote._connection.trips
        with remote.trace("The capital of France is"):
            for i in range(3):
                remote.layers_output[i][0, -1] *= 1.5
            logits = remote.logits
        logits.detach().numpy()
        return int(remote._connection.trips - before)

    assert trips(by_commands=False) == 5
    assert trips(by_commands=True) == 1


def test_trips_of_many_at_once(pair: tuple[Any, Any]) -> None:
    """A slice and a cache are taken while the pass goes on; where gradients are recorded, at each point."""
    _, remote = pair
    remote.by_commands = False

    def trips(gradients: bool) -> int:
        before = remote._connection.trips
        with torch.set_grad_enabled(gradients), remote.trace("The capital of France is") as tracer:
            found = remote.layers_output[:3]
            tracer.cache(remote.mlps)
        assert len(found) == 3
        return int(remote._connection.trips - before)

    assert trips(gradients=False) == 3
    assert trips(gradients=True) > 3


def test_what_the_server_tells(pair: tuple[Any, Any]) -> None:
    local, remote = pair
    status = remote.server_status()
    assert status["versions"]["torch"] == str(torch.__version__)
    assert status["models"][0]["report"] == local.validation.to_dict() == remote.validation.to_dict()
    assert len(status["models"][0]["hash"]) == 64
    assert not any(True for one in remote.hf_model.parameters() if type(one) is torch.nn.Parameter)
    assert repr(remote.hf_model.lm_head.weight).startswith("<remote torch.float32 of")


def test_a_block_is_stepped_through_in_pdb(pair: tuple[Any, Any]) -> None:
    """The debugger stands between two lines for as long as its user likes; the server waits, and others go on meanwhile."""
    local, remote = pair

    def steps(model: Any, meanwhile: Any) -> tuple[str, torch.Tensor]:
        shown = io.StringIO()
        commands = io.StringIO(
            "next\nnext\np tuple(hidden.shape)\np hidden[0, -1, 0].item()\nmeanwhile()\nnext\ncontinue\n"
        )
        debugger = pdb.Pdb(stdin=commands, stdout=shown, readrc=False, nosigint=True)
        with model.trace("The capital of France is"):
            debugger.set_trace()
            hidden = model.layers_output[1]
            model.layers_output[2] = 2 * hidden
            logits = model.logits
        return shown.getvalue(), logits

    others: list[torch.Tensor] = []

    def other() -> None:
        second: Any = StandardizedTransformer(remote._connection.model, server=remote._connection.server)
        with second.trace("Japan is in"):
            others.append(torch.tensor(second.logits[0, -1].tolist()))
        second.close()

    (wanted, logits), (shown, found) = steps(local, lambda: None), steps(remote, other)
    assert same(logits, found)
    numbers = re.findall(r"\(Pdb\) (\(1, \d+, \d+\)|-?\d+\.\d+)", wanted)
    assert len(numbers) == 2, wanted
    assert re.findall(r"\(Pdb\) (\(1, \d+, \d+\)|-?\d+\.\d+)", shown) == numbers
    with local.trace("Japan is in"):
        assert same(local.logits[0, -1], others[0])
