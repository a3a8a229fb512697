"""Models of several architectures at a server: blocks give what the local model gives, by every way that the model can be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from remote_blocks import leaves
from remote_server import served

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError, NotRemoteError

#: And whether they can be run by commands: grouped matrix products have no shapes without elements in float32, and a
#: convolution is not among the functions that a server allows.
MODELS = {"gpt_neox": True, "bloom": True, "gemma2": True, "mixtral": False, "mamba": False}
PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 6, 7, 5]]


def edits(model: Any) -> list[torch.Tensor]:
    with torch.no_grad(), model.trace(PROMPTS):
        hidden = model.layers_output[0]
        hidden[:, -1] *= 1.5
        model.layers_output[1] = 2 * model.layers_output[1]
        logits = model.logits
    return [hidden, logits]


def layers(model: Any) -> list[torch.Tensor]:
    with torch.no_grad(), model.trace(PROMPTS):
        found = model.layers_output[:]
    return [*found, model.project_on_vocab(found[-1][:, -1])]


def inside(model: Any) -> list[torch.Tensor]:
    found = []
    with torch.no_grad(), model.trace(PROMPTS):
        for i in range(model.num_layers):
            for accessor in (model.attention_probabilities, model.time_steps, model.ssm_states, model.layers_mid):
                if accessor.modules[i] is not None:
                    found.append(accessor[i])
            if model.ssm_states.modules[i] is not None:
                model.ssm_states[i] = 2 * found[-1]
                found.append(model.layers_output[i])
    return [*found, torch.tensor(model.num_layers)]


def gradients(model: Any) -> list[torch.Tensor]:
    with model.trace(PROMPTS):
        hidden = model.layers_output[0]
        value = model.logits[:, -1, 5].sum()
        (grad,) = torch.autograd.grad(value, hidden)
    return [grad]


@pytest.mark.parametrize("name", MODELS)
def test_blocks(name: str, tmp_path: Path) -> None:
    zoo.build(name).save_pretrained(tmp_path)
    local = StandardizedTransformer(tmp_path)
    with served(str(tmp_path)) as server:
        remote: Any = StandardizedTransformer(str(tmp_path), server=server.address)
        for by_commands in (False, True):
            if by_commands and not MODELS[name]:
                with pytest.raises(NotRemoteError, match="cannot be run by commands"):
                    remote.by_commands = True
                continue
            remote.by_commands = by_commands
            for block in (edits, layers, inside, gradients):
                wanted, found = block(local), leaves(refused_or(block, remote, by_commands))
                if not found and name == "bloom" and by_commands and block is gradients:
                    continue  # its activation has a backward of its own
                assert len(wanted) == len(found)
                for one, other in zip(wanted, found, strict=True):
                    assert torch.equal(one.detach(), other), (block.__name__, by_commands)
        remote.close()


def refused_or(block: Any, remote: Any, by_commands: bool) -> list[torch.Tensor]:
    """What the block gives; nothing where a function with a backward of its own is refused, which only commands meet."""
    try:
        return block(remote)  # type: ignore[no-any-return]
    except NotRemoteError as error:
        assert by_commands
        assert "torch.autograd.Function" in str(error)
        return []


#: A BERT whose layers go through their MLP in pieces, which no validation has seen.
IN_PIECES = """
import sys, torch
from transformers import BertConfig, BertLMHeadModel
from nnatomy import StandardizedTransformer
from nnatomy.serve.app import Server
from nnatomy.serve.run import run
torch.manual_seed(0)
sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=60)
model = StandardizedTransformer(BertLMHeadModel(BertConfig(is_decoder=True, **sizes)).eval())
server = Server({"bert": model})
for layer in model.hf_model.bert.encoder.layer:
    layer.chunk_size_feed_forward = 4
run(server, "127.0.0.1", int(sys.argv[1]))
"""


def test_a_value_in_pieces_is_refused() -> None:
    with served("bert", script=IN_PIECES) as server:
        remote: Any = StandardizedTransformer("bert", server=server.address)
        text = r"neurons\[1\]: .* in pieces: what comes first has 4 positions, where the layer was given 12"
        with pytest.raises(NotInThisModelError, match=text):
            with torch.no_grad(), remote.trace(torch.arange(3, 15)[None]):
                remote.neurons[1]
        with torch.no_grad(), remote.trace(torch.arange(3, 15)[None]):
            first = remote.bert.encoder.layer[1].intermediate.calls[0].output
            last = remote.bert.encoder.layer[1].intermediate.calls[2].output
        assert first.shape == last.shape == (1, 4, 40)
        remote.close()


def test_a_function_with_a_backward_of_its_own_is_refused() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad

    with served("demo:gpt2") as server:
        remote: Any = StandardizedTransformer("demo:gpt2", server=server.address)
        with pytest.raises(NotRemoteError, match="Straight is a torch.autograd.Function"):
            with remote.trace("The capital of France is"):
                Straight.apply(remote.layers_output[1])
        with torch.no_grad(), remote.trace("The capital of France is"):
            rounded = Straight.apply(remote.layers_output[1])
        assert (rounded == rounded.round()).all()
        remote.close()
    x = torch.ones(2, requires_grad=True)
    Straight.apply(x).sum().backward()  # local tensors are as ever
    assert torch.equal(x.grad, torch.ones(2))  # type: ignore[arg-type]
