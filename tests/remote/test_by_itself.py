"""What the user has put around a pass or on a module is here: such a pass runs by commands, and gives what a local model gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from remote_blocks import leaves
from remote_server import served
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnatomy import StandardizedTransformer

PROMPT = "The capital of France is"


class Tanh(TorchFunctionMode):
    """Halves what tanh gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if func in (torch.tanh, torch.nn.functional.silu) else result


class Counts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    torch.set_num_threads(1)
    with served("demo:llama") as server:
        remote: Any = StandardizedTransformer("demo:llama", server=server.address)
        yield StandardizedTransformer("demo:llama"), remote
        remote.close()


def logits(model: Any, around: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad(), around, model.trace(PROMPT):
        model.layers_output[2][:, -1] *= 1.5
        found = model.logits
    return leaves(found)[0]


AROUND = {
    "a function mode": Tanh,
    "a dispatch mode": Counts,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", AROUND)
def test_around(pair: tuple[Any, Any], name: str) -> None:
    local, remote = pair
    wanted, found = (logits(model, AROUND[name]()) for model in pair)
    assert torch.equal(wanted, found)
    if name != "a dispatch mode":
        assert not torch.equal(wanted, logits(remote, nullcontext()))


def test_a_hook(pair: tuple[Any, Any]) -> None:
    found = []
    for model in pair:
        handle = model.layers[3].mlp.module.register_forward_hook(lambda module, args, output: output * 2)
        found.append(logits(model, nullcontext()))
        handle.remove()
        assert not torch.equal(found[-1], logits(model, nullcontext()))
    assert torch.equal(*found)


def test_training(pair: tuple[Any, Any]) -> None:
    found = []
    for model in pair:
        attention = model.layers[3].self_attn.module
        attention.train()
        attention.attention_dropout = 0.5
        found.append(logits(model, nullcontext()))
        attention.attention_dropout = 0.0
        attention.eval()
    assert torch.equal(*found)


def test_a_call_without_a_trace(pair: tuple[Any, Any]) -> None:
    with torch.no_grad():
        one, other = (leaves(model(PROMPT).logits)[0] for model in pair)
    assert torch.equal(one, other)
    assert pair[0].generate_text(PROMPT, max_new_tokens=3) == pair[1].generate_text(PROMPT, max_new_tokens=3)
    assert pair[1].hf_model.to("cpu") is pair[1].hf_model
