"""`project_on_vocab` is computed in the thread that layers run in; nobody can tell, but by the time and the memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nnatomy import StandardizedTransformer


@pytest.fixture
def model(tmp_path: Path) -> StandardizedTransformer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return StandardizedTransformer(str(tmp_path))


def reference(model: StandardizedTransformer, hidden: torch.Tensor) -> torch.Tensor:
    hf = model.hf_model
    return hf.lm_head(hf.model.norm(hidden))


def test_it_runs_where_layers_run(model: StandardizedTransformer) -> None:
    hidden, threads = torch.randn(3, 32), []
    forward = nn.Linear.forward

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            threads.append(threading.current_thread())
            return forward(self, x)

    model.hf_model.lm_head.__class__ = Watched
    model.refresh()
    threads.clear()
    with torch.no_grad():
        logits = model.project_on_vocab(hidden)
        assert threads[0] is not threading.current_thread()
        with model.trace([[1, 2, 3]]):
            model.logits
        assert threads[1] is threads[0]
        assert torch.equal(logits, reference(model, hidden))


def test_gradients_and_transforms_are_of_the_users_thread(model: StandardizedTransformer) -> None:
    hidden = torch.randn(3, 32, requires_grad=True)
    (mine,) = torch.autograd.grad(model.project_on_vocab(hidden)[:, 5].sum(), hidden)
    (its,) = torch.autograd.grad(reference(model, hidden)[:, 5].sum(), hidden)
    assert torch.equal(mine, its)
    hidden, tangent = hidden.detach(), torch.randn(3, 32)
    with torch.no_grad():
        each = torch.vmap(model.project_on_vocab)(hidden)
        torch.testing.assert_close(each, reference(model, hidden))
        _, forward = torch.func.jvp(model.project_on_vocab, (hidden,), (tangent,))
    _, expected = torch.func.jvp(lambda h: reference(model, h), (hidden,), (tangent,))
    torch.testing.assert_close(forward, expected)


def test_inside_a_block_and_inside_blocks_that_share_a_pass(model: StandardizedTransformer) -> None:
    prompts = [[1, 2, 3], [4, 5, 6]]
    found = []
    with torch.no_grad():
        with model.trace(prompts):
            for layer in range(2):
                found.append(model.project_on_vocab(model.layers_output[layer]))
            logits = model.logits
        torch.testing.assert_close(found[1], logits)
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    found.append(model.project_on_vocab(model.layers_output[0]))
        torch.testing.assert_close(torch.cat(found[2:]), found[0])


def test_what_the_head_raises_comes_as_it_is(model: StandardizedTransformer) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype") as caught:
        model._head(torch.randn(3, 32, dtype=torch.float64))
    assert Path(str(caught.traceback[0].path)).name == "test_head_thread.py"
    assert str(caught.traceback[-1].path).endswith("linear.py")
