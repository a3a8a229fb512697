"""`remote=True`: a trace of a local model that a server runs gives what the model itself gives, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from remote_blocks import BLOCKS, leaves
from remote_server import Process, served

from nnatomy import StandardizedTransformer
from nnatomy.errors import ConnectionLostError, InputError, NotRemoteError

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    torch.set_num_threads(1)
    with served("demo:gpt2", "demo:llama") as process:
        yield process


@pytest.fixture
def model(server: Process) -> Iterator[Any]:
    model: Any = StandardizedTransformer("demo:llama")
    model.server = server.address
    yield model
    if model._sender is not None:
        model._sender.connection.close()


class Sends:
    """A model all of whose traces and generations are sent."""

    def __init__(self, model: Any) -> None:
        object.__setattr__(self, "_model", model)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name in ("trace", "generate"):
            return lambda *args, **kwargs: found(*args, remote=True, **kwargs)
        if name in ("edit", "attach"):
            return lambda *args, **kwargs: Sends(found(*args, **kwargs))
        return found

    def __getitem__(self, path: str) -> Any:
        return self._model[path]

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks(model: Any, name: str) -> None:
    wanted = BLOCKS[name](StandardizedTransformer("demo:llama"))
    model.trace(PROMPT, remote=True).run()
    trips = model._sender.connection.trips
    found = BLOCKS[name](Sends(model))
    assert wanted.keys() == found.keys()
    for key, one in wanted.items():
        (mine,), (its,) = leaves(one), leaves(found[key])
        assert torch.equal(mine.nan_to_num(7), its.nan_to_num(7)), key
    assert model._sender.connection.trips > trips


def test_the_model_itself_is_not_run(model: Any) -> None:
    ran = []
    for layer in model.hf_model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: (ran.append(1), forward(*args, **kwargs))[1]
    model.refresh()
    ran.clear()
    with torch.no_grad(), model.trace(PROMPT, remote=True):
        there = model.layers_output[3], model.logits
    assert not ran
    with torch.no_grad(), model.trace(PROMPT):
        here = model.layers_output[3], model.logits
    assert ran
    for one, other in zip(leaves(there), here, strict=True):
        assert torch.equal(one, other)


def test_without_a_server(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address, model.server = model.server, None
    with pytest.raises(InputError, match=r"set model\.server = 'http://HOST:PORT'.*or NNATOMY_SERVER"):
        model.trace(PROMPT, remote=True)
    monkeypatch.setenv("NNATOMY_SERVER", address)
    loaded: Any = StandardizedTransformer(model.hf_model, model.tokenizer)
    with pytest.raises(Exception, match="say which model: it has 'demo:gpt2', 'demo:llama'"):
        loaded.trace(PROMPT, remote=True)
    with torch.no_grad(), loaded.trace(PROMPT, remote="demo:llama"):
        found = loaded.logits
    assert torch.equal(leaves(found)[0], leaves(model(PROMPT).logits)[0])
    loaded._sender.connection.close()
    with pytest.raises(InputError, match="a server's already"):
        with closing(StandardizedTransformer("demo:llama")) as remote:
            remote.trace(PROMPT, remote=True)


@contextmanager
def closing(model: Any) -> Iterator[Any]:
    try:
        yield model
    finally:
        model.close()


def test_another_model_or_other_weights(model: Any) -> None:
    with pytest.raises(
        NotRemoteError, match="has a GPT2LMHeadModel under the name 'demo:gpt2', which is not this LlamaForCausalLM"
    ):
        model.trace(PROMPT, remote="demo:gpt2")
    model.generate(PROMPT, max_new_tokens=1, remote=True).run()
    with torch.no_grad():
        model.hf_model.lm_head.weight[0, 0] += 1
    with pytest.raises(NotRemoteError, match="their SHA-256 is [0-9a-f]{64} here, and [0-9a-f]{64} there"):
        model.trace(PROMPT, remote=True)
    model.server = "http://127.0.0.1:9"
    with pytest.raises(ConnectionLostError, match="No connection"):
        model.trace(PROMPT, remote=True)


def test_what_cannot_be_sent(model: Any) -> None:
    handle = model.layers[1].mlp.module.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(NotRemoteError, match="This trace cannot be sent"):
        with model.trace(PROMPT, remote=True):
            model.logits
    handle.remove()
    with model.trace(PROMPT, remote=True):
        assert model.logits.shape[1] == 5


def test_a_copy_has_a_session_of_its_own(model: Any) -> None:
    model.trace(PROMPT, remote=True).run()
    other = copy.deepcopy(model)
    other.trace(PROMPT, remote=True).run()
    assert other._sender.connection is not model._sender.connection
    other._sender.connection.close()
