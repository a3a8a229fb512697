"""Quantized models: what is read and edited is what hooks of PyTorch's see and do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PLACES, build, prompt_ids
from optimum.quanto import QLinear, QTensor
from reference import edited, hooked
from transformers import AutoModelForCausalLM, QuantoConfig

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def load(model_type: str, weights: str, folder: Path, how: str) -> StandardizedTransformer:
    build(model_type).save_pretrained(folder)
    config = QuantoConfig(weights=weights)
    if how == "folder":
        return StandardizedTransformer(folder, quantization_config=config)
    return StandardizedTransformer(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))


@pytest.mark.parametrize("how", ["folder", "loaded"])
@pytest.mark.parametrize(
    ("model_type", "weights"),
    [("llama", "int8"), ("llama", "float8"), ("gemma2", "int8"), ("opt", "int8"), ("bloom", "int8")],
)
def test_reads_edits_and_steps(model_type: str, weights: str, how: str, tmp_path: Path) -> None:
    model, ids = load(model_type, weights, tmp_path, how), prompt_ids()
    hf = model.hf_model
    path, attention, mlp = PLACES[model_type]
    layers = list(hf.get_submodule(path))
    quantized = [module for module in layers[1].modules() if isinstance(module, QLinear)]
    assert len(quantized) >= 4
    assert all(isinstance(module.weight, QTensor) for module in quantized)

    points: dict[Any, Any] = {}
    for i, layer in enumerate(layers):
        points["layers_input", i] = layer, "input"
        points["attentions_output", i] = layer.get_submodule(attention), "output"
        if mlp is not None:
            points["mlps_output", i] = layer.get_submodule(mlp), "output"
        points["layers_output", i] = layer, "output"
    with torch.no_grad():
        plain = hf(ids).logits
        assert not torch.allclose(plain, build(model_type)(ids).logits, atol=1e-4)  # quantizing shows
        expected = hooked(hf, lambda: hf(ids), points)
        with model.trace(ids):
            seen = {}
            for name, i in expected:
                if name == "attentions_output":
                    pattern = model.attention_probabilities[i]
                    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
                seen[name, i] = getattr(model, name)[i]
            logits = model.logits
        assert torch.equal(logits, plain)
        assert all(torch.equal(seen[point], value) for point, value in expected.items())
        torch.testing.assert_close(model.project_on_vocab(seen["layers_output", 2]), plain, rtol=1e-4, atol=1e-4)

        with model.trace(ids):
            model.layers_output[1] = -model.layers_output[1]
            logits = model.logits
        assert torch.equal(logits, edited(lambda: hf(ids).logits, layers[1], "output", lambda out: -out))
        assert not torch.equal(logits, plain)

        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
        with model.generate(ids, **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                model.layers_output[1] = -model.layers_output[1]
            tokens = tracer.result
        assert torch.equal(tokens, edited(lambda: hf.generate(**arguments), layers[1], "output", lambda out: -out))
        assert not torch.equal(tokens, hf.generate(**arguments))


@pytest.mark.parametrize("weights", ["int8", "float8", "int4"])
def test_weights_are_dequantized_copies(weights: str, tmp_path: Path) -> None:
    model = load("llama", weights, tmp_path, "loaded")
    attention, mlp = (getattr(model.layers[1].module, name) for name in ("self_attn", "mlp"))
    assert isinstance(attention.q_proj, QLinear)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        queries = attention.q_proj(x).unflatten(-1, (4, 8)).transpose(0, 1)  # by the module itself
        torch.testing.assert_close(x @ model.W_Q[1] + model.b_Q[1][:, None], queries, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x @ model.W_gate[1], mlp.gate_proj(x), rtol=1e-4, atol=1e-5)
        neurons = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(neurons @ model.W_out[1], mlp.down_proj(neurons), rtol=1e-4, atol=1e-5)
        full = build("llama").model.layers[1].self_attn.q_proj
        assert not torch.equal(model.W_Q[1].transpose(0, 1).reshape(32, 32), full.weight.T)  # quantizing shows
        before = attention.q_proj(x)
        model.W_Q[1].zero_()  # a copy
        assert torch.equal(attention.q_proj(x), before)


class Packed(torch.nn.Module):
    """A linear of whole numbers of one byte, which its forward alone unpacks; it may round what it is given, too."""

    def __init__(self, linear: torch.nn.Linear, rounds: bool) -> None:
        super().__init__()
        self.in_features, self.rounds = linear.in_features, rounds
        self.register_buffer("scale", linear.weight.detach().abs().amax() / 127)
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole.reshape(-1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rounds:
            step = x.abs().amax(-1, keepdim=True) / 127
            x = (x / step).round() * step
        return x @ (self.weight.view(-1, self.in_features).float() * self.scale).T


@pytest.mark.parametrize("rounds", [False, True])
def test_a_weight_that_the_forward_alone_unpacks(rounds: bool) -> None:
    hf = build("llama")
    attention = hf.model.layers[1].self_attn
    packed = attention.q_proj = Packed(attention.q_proj, rounds)
    model = StandardizedTransformer(hf)
    if rounds:  # there is no matrix that it multiplies by
        with pytest.raises(NotInThisModelError, match=r"q_proj \(Packed\) is of torch\.int8, beside scales"):
            model.W_Q[1]
        return
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    queries = packed(x).unflatten(-1, (4, 8)).transpose(0, 1)
    torch.testing.assert_close(x @ model.W_Q[1], queries, rtol=1e-4, atol=1e-5)


def test_gradients_reach_a_quantized_models_stream(tmp_path: Path) -> None:
    model, ids = load("llama", "int8", tmp_path, "folder"), prompt_ids()
    with model.trace(ids):
        hidden = model.layers_output[0]
        hidden.retain_grad()
        model.logits[0, -1].max().backward()
    assert hidden.grad[0].abs().max() > 0
    assert hidden.grad[1].abs().max() == 0
