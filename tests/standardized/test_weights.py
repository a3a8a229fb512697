"""Weights under standard names, against what the models' own modules give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import architectures
import peft
import pytest
import torch
import zoo
import zoo.weights
from encoder_decoders import build as encoder_decoder
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import (
    AssignmentError,
    InputError,
    LayerIndexError,
    ModelChangedError,
    NotInThisModelError,
    UsageError,
)
from nnatomy.weights import ROWS, FactoredMatrix

HEADS, WIDTH, NEURONS = 4, 32, 48
LAYER = 1
Split = Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]


def by_head(value: Tensor, size: int) -> Tensor:
    """(batch, seq, heads * size) as (batch, head, seq, size)."""
    return value.unflatten(-1, (-1, size)).transpose(1, 2)


def separate(size: int) -> Split:
    return lambda attention, x: tuple(  # type: ignore[return-value]
        by_head(getattr(attention, f"{one}_proj")(x), size) for one in "qkv"
    )


def gpt2(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(by_head(one, 8) for one in attention.c_attn(x).split(WIDTH, dim=2))


def neox(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    whole = attention.query_key_value(x).view(*x.shape[:2], HEADS, 3 * 8)
    return tuple(one.transpose(1, 2) for one in whole.chunk(3, dim=-1))


def bloom(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    whole = attention.query_key_value(x).view(*x.shape[:2], HEADS, 3, 8)
    return tuple(whole[..., k, :].transpose(1, 2) for k in range(3))


def falcon(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """One head of keys and values."""
    whole = by_head(attention.query_key_value(x), 8)
    return whole[:, :-2], whole[:, -2:-1], whole[:, -1:]


def falcon_grouped(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Two groups of two query heads, a key head and a value head."""
    whole = attention.query_key_value(x).view(*x.shape[:2], 2, 4, 8)
    queries = whole[..., :2, :].flatten(2, 3)
    return tuple(one.transpose(1, 2) for one in (queries, whole[..., 2, :], whole[..., 3, :]))


def phi3(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(by_head(one, 8) for one in attention.qkv_proj(x).split((32, 16, 16), dim=-1))


def mpt(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(by_head(one, 8) for one in attention.Wqkv(x).chunk(3, dim=-1))


def bigcode(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(by_head(one, 8) for one in attention.c_attn(x).split((32, 8, 8), dim=-1))


#: Queries, keys and values before norms and rotary; the output projection; whether the parameters lie so that views show them.
ATTENTIONS: dict[str, tuple[Any, str, bool]] = {
    "gpt2": (gpt2, "c_proj", True),
    "gpt_neox": (neox, "dense", True),
    "bloom": (bloom, "dense", True),
    "falcon": (falcon, "dense", True),
    "falcon grouped": (falcon_grouped, "dense", False),
    "phi3": (phi3, "o_proj", True),
    "mpt": (mpt, "out_proj", True),
    "gpt_bigcode": (bigcode, "c_proj", True),
    "gptj": (separate(8), "out_proj", True),
    "opt": (separate(8), "out_proj", True),
    "llama": (separate(8), "o_proj", True),
    "qwen2": (separate(8), "o_proj", True),
    "gemma2": (separate(16), "o_proj", True),
    "mixtral": (separate(8), "o_proj", True),
    "qwen3": (separate(16), "o_proj", True),
    "olmo2": (separate(8), "o_proj", True),
    "phi": (separate(8), "dense", True),
    "starcoder2": (separate(8), "o_proj", True),
}
#: Up, gate and down of an MLP, by its own modules.
MLPS: dict[str, tuple[Any, Any, str]] = {
    "gpt2": (lambda m, x: m.c_fc(x), None, "c_proj"),
    "gpt_neox": (lambda m, x: m.dense_h_to_4h(x), None, "dense_4h_to_h"),
    "bloom": (lambda m, x: m.dense_h_to_4h(x), None, "dense_4h_to_h"),
    "falcon": (lambda m, x: m.dense_h_to_4h(x), None, "dense_4h_to_h"),
    "mpt": (lambda m, x: m.up_proj(x), None, "down_proj"),
    "opt": (lambda m, x: m.fc1(x), None, "fc2"),
    "starcoder2": (lambda m, x: m.c_fc(x), None, "c_proj"),
    "phi3": (
        lambda m, x: m.gate_up_proj(x).chunk(2, dim=-1)[1],
        lambda m, x: m.gate_up_proj(x).chunk(2, dim=-1)[0],
        "down_proj",
    ),
    "glm4": (
        lambda m, x: m.gate_up_proj(x).chunk(2, dim=-1)[1],
        lambda m, x: m.gate_up_proj(x).chunk(2, dim=-1)[0],
        "down_proj",
    ),
    **dict.fromkeys(
        ("llama", "qwen2", "gemma2", "olmo2"),
        (lambda m, x: m.up_proj(x), lambda m, x: m.gate_proj(x), "down_proj"),
    ),
}


def build(model_type: str) -> Any:
    if model_type == "falcon grouped":
        return architectures.build("falcon", new_decoder_architecture=True, num_kv_heads=2)
    return architectures.build(model_type)


@cache
def loaded(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(build(model_type))


def attention_of(model: Any, layer: int = LAYER) -> Any:
    return model._anatomy.attentions[layer]


def stream(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, WIDTH), generator=torch.Generator().manual_seed(7))


def shares_memory(one: Tensor, module: Any) -> bool:
    return one.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    one, other = one.detach(), other.detach()
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("model_type", ATTENTIONS)
def test_queries_keys_and_values_are_the_models_own(model_type: str) -> None:
    model, (split, out, _) = loaded(model_type), ATTENTIONS[model_type]
    x = stream()
    with torch.no_grad():
        for name, own in zip("QKV", split(attention_of(model), x), strict=True):
            weight, bias = getattr(model, f"W_{name}")[LAYER], getattr(model, f"b_{name}")[LAYER]
            close(torch.einsum("bsm,hmd->bhsd", x, weight) + bias[:, None], own)
        projection = getattr(attention_of(model), out)
        weight, bias = model.W_O[LAYER], model.b_O[LAYER]
        heads = stream(2, 5, *weight.shape[:2])
        close(torch.einsum("bshd,hdm->bsm", heads, weight) + bias, projection(heads.flatten(2)))


@pytest.mark.parametrize("model_type", MLPS)
def test_neurons_come_of_the_models_own_projections(model_type: str) -> None:
    model, (up, gate, down) = loaded(model_type), MLPS[model_type]
    mlp = model._anatomy.mlps[LAYER] or model._anatomy.layers[LAYER]
    x = stream()
    with torch.no_grad():
        close(x @ model.W_in[LAYER] + model.b_in[LAYER], up(mlp, x))
        neurons = stream(2, 5, model.W_out[LAYER].shape[0])
        close(neurons @ model.W_out[LAYER] + model.b_out[LAYER], getattr(mlp, down)(neurons))
        if gate is not None:
            close(x @ model.W_gate[LAYER] + model.b_gate[LAYER], gate(mlp, x))
            assert shares_memory(model.W_gate[LAYER], getattr(mlp, "gate_proj", None) or mlp.gate_up_proj)
            return
    for name in ("W_gate", "b_gate"):
        with pytest.raises(NotInThisModelError, match=rf"{name}\[1\]: there is none: .*its MLP is not gated"):
            getattr(model, name)[LAYER]


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "mpt"])  # nothing stands behind their projections
def test_in_a_trace_they_give_queries_keys_values_and_the_output(model_type: str) -> None:
    model = loaded(model_type)
    names = ("attentions_input", "queries", "keys", "values", "heads_output", "attentions_contribution")
    weights = {name: getattr(model, name)[LAYER] for name in ROWS if ROWS[name].group == "attention"}
    with torch.no_grad(), model.trace(architectures.prompt_ids()):
        x, *seen, heads, output = (getattr(model, name)[LAYER] for name in names)
    for name, own in zip("QKV", seen, strict=True):
        close(torch.einsum("bsm,hmd->bhsd", x, weights[f"W_{name}"]) + weights[f"b_{name}"][:, None], own)
    close(torch.einsum("bshd,hdm->bsm", heads, weights["W_O"]) + weights["b_O"], output)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "qwen2"])
def test_rotary_turns_the_first_position_by_nothing(model_type: str) -> None:
    model = loaded(model_type)
    query, bias = model.W_Q[LAYER], model.b_Q[LAYER]
    with torch.no_grad(), model.trace(architectures.prompt_ids()):
        x, queries = model.attentions_input[LAYER], model.queries[LAYER]
    own = torch.einsum("bsm,hmd->bhsd", x, query) + bias[:, None]
    close(own[:, :, 0], queries[:, :, 0])
    assert float((own - queries).detach().abs().max()) > 0.1


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2", "glm4"])
def test_neurons_are_the_activated_gate_times_the_rest(model_type: str) -> None:
    model = loaded(model_type)
    w_in, w_gate, w_out = model.W_in[LAYER], model.W_gate[LAYER], model.W_out[LAYER]
    with torch.no_grad(), model.trace(architectures.prompt_ids()):
        x, neurons, output = model.mlps_input[LAYER], model.neurons[LAYER], model.mlps_output[LAYER]
    act = model.layers[LAYER].mlp.module
    act = getattr(act, "act_fn", None) or act.activation_fn
    close(act(x @ w_gate) * (x @ w_in), neurons)
    close(neurons @ w_out, output)


def test_a_scale_behind_the_down_projection_is_not_in_its_weight() -> None:
    model = zoo.loaded("inkling_text")
    w_out, mlp = model.W_out[0], model._anatomy.mlps[0]
    with torch.no_grad(), model.trace(torch.arange(3, 12)[None]):
        neurons, output = model.neurons[0], model.mlps_output[0]
    assert abs(float(mlp.global_scale.detach()) - 1) > 0.05
    close(neurons @ w_out, mlp.down_proj(neurons))
    close(neurons @ w_out * mlp.global_scale, output)


def test_scales_and_a_norm_of_neurons_are_not_in_their_weights() -> None:
    model = zoo.loaded("dory")
    w_in, w_gate, mlp = model.W_in[0], model.W_gate[0], model._anatomy.mlps[0]
    with torch.no_grad(), model.trace(torch.arange(3, 12)[None]):
        x, neurons = model.mlps_input[0], model.neurons[0]
    up, gate = x @ w_in + model.b_in[0], x @ w_gate + model.b_gate[0]
    close(up, mlp.up_proj(x))
    close(gate, mlp.gate_proj(x))
    gate, up = gate * mlp.suv_gate * WIDTH**0.5, up * mlp.suv_up * WIDTH**0.5
    product = mlp.act_fn(gate) * up
    assert float((mlp.suv_gate - 1).detach().abs().max()) > 0.1
    close(product / product.norm(dim=-1, keepdim=True), neurons, 1e-4)


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "gemma2", "granite", "cohere", "gemma3_text", "bloom", "gpt_neox"]
)
def test_the_ends(model_type: str) -> None:
    model = loaded(model_type)
    ids = architectures.prompt_ids()
    with torch.no_grad(), model.trace(ids) as tracer:
        embedded, normed = model.token_embeddings, model.ln_final.output
        unembedded = model.lm_head.output
        assert tracer is not None
    close(model.W_E[ids], embedded)
    close(normed @ model.W_U + model.b_U, unembedded)
    assert shares_memory(model.W_U, model.hf_model.get_output_embeddings())
    tied = model.config.get_text_config().tie_word_embeddings
    assert shares_memory(model.W_U, model.hf_model.get_input_embeddings()) == tied


@pytest.mark.parametrize("model_type", ["olmo", "bart"])
def test_an_unembedding_with_no_norm_of_its_own_before_it(model_type: str) -> None:
    model = StandardizedTransformer(zoo.build(model_type))
    head = model.hf_model.get_output_embeddings()
    close(stream(2, 5, model.hidden_size) @ model.W_U + model.b_U, head(stream(2, 5, model.hidden_size)))
    with pytest.raises(NotInThisModelError, match="no norm gives what it reads"):
        model.folded_unembedding()
    with pytest.raises(NotInThisModelError, match="but what is made of it"):
        StandardizedTransformer(zoo.build("bert")).W_U


def test_a_head_that_reads_something_else_than_the_final_norm_gives_is_refused() -> None:
    with pytest.raises(
        NotInThisModelError, match="W_U: there is none: lm_head does not read what the final norm .* gives"
    ):
        loaded("opt").W_U


@pytest.mark.parametrize("model_type", ATTENTIONS)
def test_gradients_come_to_the_parameters_and_views_are_views(model_type: str) -> None:
    hf = build(model_type)
    model, (split, out, views) = StandardizedTransformer(hf), ATTENTIONS[model_type]
    attention, x = attention_of(model), stream()
    loss, own = torch.zeros(()), torch.zeros(())
    for k, (name, value) in enumerate(zip("QKV", split(attention, x), strict=True)):
        weight = getattr(model, f"W_{name}")[LAYER]
        loss = loss + (k + 1) * torch.einsum("bsm,hmd->bhsd", x, weight).square().sum()
        bias = getattr(model, f"b_{name}")[LAYER]
        own = own + (k + 1) * (value - bias.detach()[:, None]).square().sum()
        module = (
            next(m for m in attention.modules() if getattr(m, "weight", None) is not None and shares_memory(weight, m))
            if views
            else None
        )
        assert (module is not None) == views
    parameters = [one for one in attention.parameters() if one.ndim == 2]
    gradients, others = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss, own))
    assert sum(one is not None for one in gradients) in (1, 3)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other, 1e-4)
    assert shares_memory(model.W_O[LAYER], getattr(attention, out))


def test_a_weight_is_the_parameters_value_of_the_moment() -> None:
    hf = build("llama")
    model = StandardizedTransformer(hf)
    before = model.W_Q[LAYER].detach().clone()
    with torch.no_grad():
        model.W_Q[LAYER][2, 3, 5] = 17.0
        assert hf.model.layers[LAYER].self_attn.q_proj.weight[2 * 8 + 5, 3] == 17
        hf.model.layers[LAYER].self_attn.q_proj.weight.mul_(2)
    assert model.W_Q[LAYER][2, 3, 5] == 34
    close(model.W_Q[LAYER][0], 2 * before[0])
    hf.model.layers[LAYER].self_attn.q_proj.weight = nn.Parameter(torch.ones(32, 32))
    assert bool((model.W_Q[LAYER] == 1).all())


def test_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for model_type in ("gpt2", "llama", "phi3", "qwen3", "bloom"):
            model = StandardizedTransformer(build(model_type).to(dtype))
            split, _, _ = ATTENTIONS[model_type]
            x = stream().to(dtype)
            with torch.no_grad():
                for name, own in zip("QKV", split(attention_of(model), x), strict=True):
                    weight, bias = getattr(model, f"W_{name}")[LAYER], getattr(model, f"b_{name}")[LAYER]
                    assert weight.dtype == dtype
                    close(torch.einsum("bsm,hmd->bhsd", x, weight) + bias[:, None], own, 2e-2)
            assert model.W_in[LAYER].dtype == model.W_U.dtype == model.W_E.dtype == dtype


def test_t5() -> None:
    hf: Any = encoder_decoder("T5ForConditionalGeneration")
    model = StandardizedTransformer(hf)
    attention, mlp = hf.decoder.block[LAYER].layer[0].SelfAttention, hf.decoder.block[LAYER].layer[-1].DenseReluDense
    x = stream(2, 5, model.hidden_size)
    with torch.no_grad():
        for name in "qkv":
            close(
                torch.einsum("bsm,hmd->bhsd", x, getattr(model, f"W_{name.upper()}")[LAYER]),
                by_head(getattr(attention, name)(x), model.W_Q[0].shape[-1]),
            )
        close(x @ model.W_in[LAYER], mlp.wi(x))
    assert shares_memory(model.W_O[LAYER], attention.o)
    assert shares_memory(model.W_out[LAYER], mlp.wo)


def test_latent_attention_is_refused_with_the_reason() -> None:
    model = loaded("deepseek_v3")
    for name, why in (
        ("W_Q", "q_b_proj, .*low-rank, latent"),
        ("W_K", "several matrices: .*kv_a_proj_with_mqa"),
        ("b_V", "kv_b_proj"),
    ):
        with pytest.raises(NotInThisModelError, match=rf"{name}\[1\]: there is none: .*{why}"):
            getattr(model, name)[LAYER]
    assert shares_memory(model.W_O[LAYER], attention_of(model).o_proj)
    with pytest.raises(NotInThisModelError, match="W_Q"):
        model.QK(LAYER)
    with pytest.raises(NotInThisModelError, match="W_V"):
        model.OV(LAYER)


@pytest.mark.parametrize("model_type", ["zamba"])
def test_an_attention_that_reads_more_than_the_stream_is_refused_with_the_reason(model_type: str) -> None:
    """It reads the stream beside the embeddings: twice as many entries as the axis `hidden` of the name has."""
    model = zoo.loaded(model_type)
    assert model._anatomy.attentions[1].q_proj.weight.shape[1] == 2 * model.hidden_size
    for name in ("W_Q", "W_K", "W_V"):
        with pytest.raises(
            NotInThisModelError, match=r"there is no attentions_input: .* \(2, 6, 64\), not \(2, 6, 32\)"
        ):
            getattr(model, name)[1]


def test_a_layer_without_attention_or_mlp_is_refused_with_the_reason() -> None:
    model = StandardizedTransformer(zoo.build("mamba"))
    for name in ("W_Q", "W_O", "W_in", "W_out"):
        with pytest.raises(NotInThisModelError, match=rf"{name}\[0\]: there is none: \w"):
            getattr(model, name)[0]
        assert {i for where in getattr(model, name).refusals().values() for i in where} == {*range(model.num_layers)}
    assert model.W_E.shape == (model.vocab_size, model.hidden_size)


class Quantized(nn.Module):
    """Stands for a linear of a quantization that has no parameter called weight."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes: Any = self.codes
        return x @ codes.T


class Integers(nn.Linear):
    """Stands for one whose weight is of whole numbers."""

    def __init__(self, linear: Any) -> None:
        super().__init__(2, 2, bias=False)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x) * self.scale).T


@pytest.mark.parametrize(
    ("kind", "why"), [(Quantized, r"q_proj \(Quantized\)"), (Integers, r"q_proj \(Integers\).*int8, beside scales")]
)
def test_quantized_projections_are_refused_with_the_mend(kind: Any, why: str) -> None:
    hf = build("llama")
    for layer in hf.model.layers:
        layer.self_attn.q_proj = kind(layer.self_attn.q_proj)
        layer.mlp.down_proj = kind(layer.mlp.down_proj)
    model = StandardizedTransformer(hf)
    with pytest.raises(NotInThisModelError, match=why):
        model.W_Q[LAYER]
    with pytest.raises(NotInThisModelError, match="W_out"):
        model.W_out[LAYER]
    assert shares_memory(model.W_K[LAYER], attention_of(model).k_proj)


class Odd(nn.Linear):
    """Has a weight, and computes with something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.flip(-1)


def test_a_module_that_computes_something_else_than_its_weight_says_is_refused() -> None:
    hf = build("llama")
    odd = Odd(32, 32, bias=False)
    odd.load_state_dict(hf.model.layers[LAYER].self_attn.q_proj.state_dict())
    hf.model.layers[LAYER].self_attn.q_proj = odd
    model = StandardizedTransformer(hf)
    with pytest.raises(NotInThisModelError, match="gives something else than its input times its weight"):
        model.W_Q[LAYER]
    model.W_Q[0]


class Convolved(nn.Module):
    """A projection, and the position before mixed in behind it."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + 0.25 * nn.functional.pad(y, (0, 0, 1, -1))


def test_a_convolution_behind_a_projection_is_refused() -> None:
    hf = build("llama")
    hf.model.layers[LAYER].self_attn.k_proj = Convolved(hf.model.layers[LAYER].self_attn.k_proj)
    with pytest.raises(NotInThisModelError, match="positions are mixed behind the projection"):
        StandardizedTransformer(hf).W_K[LAYER]


class Added(nn.Module):
    """A projection, and something of the input added behind it, which no module with a weight gives."""

    def __init__(self, linear: Any, size: float) -> None:
        super().__init__()
        self.linear, self.size = linear, size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.size * x.mean(-1, keepdim=True)


class Summed(nn.Module):
    """Two projections, of which the sum is given."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.one, self.other = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.one(x) + self.other(x)
        return total


@pytest.mark.parametrize("kind", [lambda linear: Added(linear, 0.3), Summed])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_something_added_behind_a_projection_is_refused(model_type: str, kind: Any) -> None:
    hf = build(model_type)
    attention, mlp = hf.model.layers[LAYER].self_attn, hf.model.layers[LAYER].mlp
    attention.q_proj, attention.v_proj = kind(attention.q_proj), kind(attention.v_proj)
    mlp.up_proj = kind(mlp.up_proj)
    model = StandardizedTransformer(hf)
    for name in ("W_Q", "W_V", "W_in"):
        with pytest.raises(NotInThisModelError, match=f"{name}.*(something else|not, entry by entry|no product)"):
            getattr(model, name)[LAYER]
    assert model.W_K[LAYER].shape[0] == 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_is_refused_until_it_is_merged() -> None:
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=targets)
    wrapped: Any = peft.get_peft_model(build("llama"), config)
    model = StandardizedTransformer(wrapped)
    for name in ("W_Q", "W_O", "W_in", "W_out"):
        with pytest.raises(NotInThisModelError, match=rf"{name}.*lora_A.*merge_and_unload"):
            getattr(model, name)[LAYER]
    assert model.W_K[LAYER].shape == (2, WIDTH, 8)
    merged = wrapped.merge_and_unload()
    with pytest.raises(ModelChangedError):
        model.W_K[LAYER]
    again = StandardizedTransformer(merged)
    assert shares_memory(again.W_Q[LAYER], merged.model.layers[LAYER].self_attn.q_proj)


def test_a_replaced_module_is_noticed_and_looked_at_again() -> None:
    hf = build("llama")
    model = StandardizedTransformer(hf)
    assert model.W_Q[LAYER].shape == (HEADS, WIDTH, 8)
    hf.model.layers[LAYER].self_attn.q_proj = nn.Linear(32, 32)
    with pytest.raises(ModelChangedError):
        model.W_Q[LAYER]
    assert shares_memory(model.refresh().W_Q[LAYER], hf.model.layers[LAYER].self_attn.q_proj)
    assert bool((model.b_Q[LAYER].flatten() == hf.model.layers[LAYER].self_attn.q_proj.bias).all())
    hf.resize_token_embeddings(90, mean_resizing=False)
    with pytest.raises(ModelChangedError):
        model.W_U
    assert model.refresh().W_U.shape == (WIDTH, 90)


def test_copies_and_edited_views_have_their_own() -> None:
    model = StandardizedTransformer(build("llama"))
    model.W_Q[LAYER]
    other = copy.deepcopy(model)
    assert shares_memory(other.W_Q[LAYER], other.hf_model.model.layers[LAYER].self_attn.q_proj)
    edited = StandardizedTransformer(build("llama"))
    edited = edited.edit(lambda: edited.skip_layer(1))
    close(edited.W_Q[LAYER], model.W_Q[LAYER])


def test_training_mode_and_the_model_are_left_as_they_were() -> None:
    hf = architectures.build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    before = {name: one.clone() for name, one in hf.state_dict().items()}
    model = StandardizedTransformer(hf)
    close(
        torch.einsum("bsm,hmd->bhsd", stream(), model.W_Q[LAYER]) + model.b_Q[LAYER][:, None],
        gpt2(attention_of(model), stream())[0],
    )
    assert model.W_out[LAYER].shape == (NEURONS, WIDTH)
    assert model.W_O[LAYER].shape == (HEADS, 8, WIDTH)
    assert all(module.training for module in hf.modules())
    assert not any(module._forward_hooks for module in hf.modules())
    assert all(torch.equal(one, before[name]) for name, one in hf.state_dict().items())


def test_what_is_asked_wrongly() -> None:
    model = StandardizedTransformer(build("llama"))
    with pytest.raises(LayerIndexError, match=r"W_Q\[3\]: the model has 3 layers"):
        model.W_Q[3]
    with pytest.raises(LayerIndexError, match="counted"):
        model.W_Q["1"]
    with pytest.raises(AssignmentError, match=r"W_Q is a weight of the model"):
        model.W_Q = torch.zeros(1)  # type: ignore[assignment]
    assert torch.equal(model.W_Q[-1], model.W_Q[2])
    assert len(model.W_Q[1:]) == 2
    assert len([*model.W_Q]) == len(model.W_Q) == 3
    fresh = StandardizedTransformer(build("llama"))
    with fresh.trace(architectures.prompt_ids()), pytest.raises(UsageError, match="before the trace"):
        fresh.W_Q[0]


# Circuits.


@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_qk_gives_the_scores(model_type: str) -> None:
    hf = build(model_type)
    for name, one in hf.named_parameters():
        if name.endswith(("c_attn.bias", "query_key_value.bias")):
            one.data.zero_()
    model = StandardizedTransformer(hf)
    circuit = model.QK(LAYER)
    with torch.no_grad(), model.trace(architectures.prompt_ids(1)):
        x = model.attentions_input[LAYER][0]
        queries, keys = model.queries[LAYER], model.keys[LAYER]
    scores = x @ circuit.full() @ x.T
    close(scores, (queries @ keys.mT)[0], 1e-4)


@pytest.mark.parametrize("model_type", ["llama", "falcon grouped", "gpt2", "falcon"])
def test_ov_gives_what_heads_write(model_type: str) -> None:
    model = loaded(model_type)
    ov, o, bias = model.OV(LAYER), model.W_O[LAYER], model.b_V[LAYER]
    with torch.no_grad(), model.trace(architectures.prompt_ids(1)):
        x = model.attentions_input[LAYER][0]
        pattern, heads = model.attention_probabilities[LAYER][0], model.heads_output[LAYER][0]
    for head in range(HEADS):
        shared = bias[model.kv_head(head)] @ o[head]
        close(pattern[head] @ x @ ov[head].full() + shared, heads[:, head] @ o[head], 1e-4)
    with pytest.raises(LayerIndexError):
        model.kv_head(HEADS)


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "gemma3_text"])
def test_norms_behind_queries_and_keys_leave_no_qk(model_type: str) -> None:
    model = loaded(model_type)
    with pytest.raises(NotInThisModelError, match=r"QK\[1\]: there is none: .*a norm, a gate or clipping"):
        model.QK(LAYER)
    assert model.OV(LAYER).shape == (HEADS, WIDTH, WIDTH)


@pytest.mark.parametrize("model_type", ["olmo", "dbrx"])
def test_clipped_values_leave_no_circuits(model_type: str) -> None:
    """Each of these clips its queries, keys and values, beyond what random weights give."""
    model = StandardizedTransformer(zoo.build(model_type))
    for circuit in (model.QK, model.OV):
        with pytest.raises(NotInThisModelError, match="a norm, a gate or clipping"):
            circuit(LAYER)
    assert model.W_V[LAYER].shape[1] == model.hidden_size


def test_norms_that_do_not_scale_are_norms() -> None:
    hf = build("qwen3")
    for name, one in hf.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            one.data.fill_(1.0)
    with pytest.raises(NotInThisModelError, match="a norm, a gate or clipping"):
        StandardizedTransformer(hf).QK(LAYER)


@pytest.mark.parametrize("by", ["Q", "K", "V"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_composition_scores(model_type: str, by: Any) -> None:
    """By the paper's formulas, for columns, of products that are formed."""
    model = loaded(model_type)
    scores = model.composition_scores(0, 2, by)
    assert scores.shape == (HEADS, HEADS)
    assert torch.equal(model.composition_scores(-model.num_layers, 2 - model.num_layers, by), scores)
    for one in range(HEADS):
        for other in range(HEADS):
            w_ov = model.OV(0).full()[one].T
            qk, ov = model.QK(2).full()[other], model.OV(2).full()[other].T
            product, size = {"Q": (qk.T @ w_ov, qk), "K": (qk @ w_ov, qk), "V": (ov @ w_ov, ov)}[by]
            close(scores[one, other], product.norm() / (size.norm() * w_ov.norm()))
    with pytest.raises(InputError, match="before"):
        model.composition_scores(2, 0, by)
    with pytest.raises(InputError, match="'Q', 'K' or 'V'"):
        model.composition_scores(0, 1, "O")


def test_a_product_is_that_of_its_factors() -> None:
    product = FactoredMatrix(stream(3, 9, 2), stream(3, 2, 7))
    full, vector, matrix = product.full(), stream(7), stream(7, 4)
    close(product @ vector, full @ vector)
    close((product @ matrix).full(), full @ matrix)  # type: ignore[union-attr]
    close(stream(9) @ product, stream(9) @ full)
    close((stream(4, 9) @ product).full(), stream(4, 9) @ full)
    close(product.T.full(), full.mT)
    close(product[1].full(), full[1])
    close(product.norm(), torch.linalg.matrix_norm(full))
    close(product.singular_values, torch.linalg.svdvals(full)[:, :2])
    u, s, vh = product.svd()
    close(u @ s.diag_embed() @ vh, full)
    other = FactoredMatrix(stream(3, 7, 3), stream(3, 3, 9))
    both = product @ other
    close(both.full(), full @ other.full())  # type: ignore[union-attr]
    close(both.trace, torch.einsum("hii->h", full @ other.full()))  # type: ignore[union-attr]
    own = torch.linalg.eigvals((full @ other.full())[0]).abs().sort(descending=True).values[:2]
    close(both.eigenvalues[0].abs().sort(descending=True).values[:2], own, 1e-4)  # type: ignore[union-attr]
    for wrong in (lambda: FactoredMatrix(stream(3, 2), stream(3, 2)), lambda: product.trace, lambda: product[0, 0]):
        with pytest.raises(InputError):
            wrong()


# Norms in the weights.


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gpt_neox", "phi3", "cohere"])
def test_folded_weights_read_the_norm_without_its_scale_and_shift(model_type: str) -> None:
    model = loaded(model_type)
    before = {name: one.clone() for name, one in model.hf_model.state_dict().items()}
    centers = model_type in ("gpt2", "gpt_neox", "cohere")
    layer = model._anatomy.layers[LAYER]
    with torch.no_grad(), model.trace(architectures.prompt_ids()):
        x = model.layers_input[LAYER]
        last = model.layers_output[-1]
    plain, plain_last = (one - one.mean(-1, keepdim=True) if centers else one for one in (x, last))
    plain, plain_last = (one / one.square().mean(-1, keepdim=True).add(1e-5).sqrt() for one in (plain, plain_last))
    norm = next(one for name, one in layer.named_modules() if name in ("input_layernorm", "ln_1"))
    for name in "QKV":
        weight, bias = getattr(model, f"W_{name}"), getattr(model, f"b_{name}")
        own = torch.einsum("bsm,hmd->bhsd", norm(x), weight[LAYER]) + bias[LAYER][:, None]
        folded = torch.einsum("bsm,hmd->bhsd", plain, weight.folded(LAYER)) + bias.folded(LAYER)[:, None]
        close(folded, own, 1e-4)
    w_u, b_u = model.folded_unembedding()
    close(plain_last @ w_u + b_u, model.ln_final.module(last) @ model.W_U + model.b_U, 1e-4)
    assert model.W_in.folded(LAYER).shape == model.W_in[LAYER].shape
    assert all(torch.equal(one, before[name]) for name, one in model.hf_model.state_dict().items())
    assert not shares_memory(w_u, model.hf_model.get_output_embeddings())


def test_where_no_norm_is_before_a_weight_none_is_folded() -> None:
    with pytest.raises(NotInThisModelError, match="no norm gives what it reads"):
        loaded("olmo2").W_Q.folded(LAYER)
    with pytest.raises(NotInThisModelError, match="no norm gives what it reads"):
        loaded("llama").W_O.folded(LAYER)


# The page.


def test_the_page_has_the_table_of_names() -> None:
    assert zoo.weights.NAMES_HEAD + zoo.weights.names() in zoo.weights.PAGE.read_text(), (
        "python tests/zoo/weights.py gpt2"
    )


def test_the_page_has_every_type_that_loads() -> None:
    assert zoo.weights.rows().keys() == {*zoo.TYPES} - zoo.REASONS.keys()


@pytest.mark.parametrize(
    "model_type", ["gpt2", "falcon", "gpt_neox", "mixtral", "deepseek_v3", "qwen3", "zamba2", "bert"]
)
def test_the_line_of_a_type_is_up_to_date(model_type: str) -> None:
    own = zoo.weights.row(model_type, StandardizedTransformer(zoo.build(model_type)))
    assert own == zoo.weights.rows()[model_type], f"python tests/zoo/weights.py {model_type}"
