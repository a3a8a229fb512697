"""The weights of experts under standard names, against what the models' own modules give for one expert after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError

LAYER = 1
HIDDEN, EXPERTS = 32, 8
Activated = Callable[[Tensor, Tensor], Tensor]


def swish(gate: Tensor, other: Tensor) -> Tensor:
    return F.silu(gate) * other


def gpt_oss(gate: Tensor, other: Tensor, limit: float) -> Tensor:
    gate, other = gate.clamp(max=limit), other.clamp(-limit, limit)
    return (other + 1) * gate * torch.sigmoid(1.702 * gate)


#: What experts do between their matrices, and the entries of their first parameter: (gate, the other).
HALVES = lambda n: (slice(0, n), slice(n, 2 * n))  # noqa: E731
IN_TURN = lambda n: (slice(0, 2 * n, 2), slice(1, 2 * n, 2))  # noqa: E731
TYPES: dict[str, Any] = {
    "mixtral": HALVES,
    "qwen3_moe": HALVES,
    "deepseek_v3": HALVES,  # with shared experts beside
    "granitemoe": HALVES,
    "jamba": HALVES,
    "lfm2_moe": HALVES,
    "gpt_oss": IN_TURN,  # with biases, and parameters of (in, out)
}


def experts_of(model: StandardizedTransformer, layer: int) -> Any:
    return next(
        one for one in model.layers[layer].module.modules() if hasattr(one, "down_proj") and one.down_proj.ndim == 3
    )


def layer_of(model: StandardizedTransformer) -> int:
    with_experts = [i for i in range(model.num_layers) if model.routers_experts.modules[i] is not None]
    return with_experts[-1]


def one_by_one(experts: Any, states: Tensor) -> Tensor:
    """(expert, row, hidden): what each gives alone."""
    rows, found = len(states), []
    for e in range(EXPERTS):
        index = torch.tensor([[e, (e + 1) % EXPERTS]]).expand(rows, -1)
        found.append(experts(states, index, torch.tensor([[1.0, 0.0]]).expand(rows, -1).to(states)))
    return torch.stack(found)


@pytest.mark.parametrize("model_type", TYPES)
def test_each_experts_matrices_give_what_it_gives(model_type: str) -> None:
    model = StandardizedTransformer(zoo.build(model_type))
    layer = layer_of(model)
    own = experts_of(model, layer)
    w_in, w_gate, w_out = model.W_in[layer], model.W_gate[layer], model.W_out[layer]
    neurons = w_in.shape[2]
    assert w_in.shape == w_gate.shape == (EXPERTS, HIDDEN, neurons)
    assert w_out.shape == (EXPERTS, neurons, HIDDEN)
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    gate = states @ w_gate + model.b_gate[layer][:, None]
    other = states @ w_in + model.b_in[layer][:, None]
    activated = gpt_oss(gate, other, own.limit) if model_type == "gpt_oss" else swish(gate, other)
    with torch.no_grad():
        torch.testing.assert_close(
            activated @ w_out + model.b_out[layer][:, None], one_by_one(own, states), rtol=1e-4, atol=1e-5
        )
    whole = own.gate_up_proj if model_type == "gpt_oss" else own.gate_up_proj.mT
    for name, entries in zip(("W_gate", "W_in"), TYPES[model_type](neurons), strict=True):
        weight = getattr(model, name)[layer]
        assert torch.equal(weight, whole[..., entries])
        assert weight.untyped_storage().data_ptr() == own.gate_up_proj.untyped_storage().data_ptr()
    assert bool(model.b_in[layer].any()) == (model_type == "gpt_oss")


def test_what_is_chosen_and_weighted_of_them_is_what_the_mlp_gives() -> None:
    model = StandardizedTransformer(zoo.build("mixtral"))
    mlp: Any = model.layers[LAYER].module.mlp
    seen: list[tuple[Tensor, Tensor]] = []
    hook = mlp.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    ids = torch.randint(16, zoo.configs.VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.hf_model(ids)
        hook.remove()
        states, gave = (one[0] for one in seen[0])
        _, weights, chosen = mlp.gate(states)
        every = swish(states @ model.W_gate[LAYER], states @ model.W_in[LAYER]) @ model.W_out[LAYER]
        picked = every[chosen, torch.arange(5)[:, None]]  # (row, choice, hidden)
        torch.testing.assert_close((weights[..., None] * picked).sum(1), gave, rtol=1e-4, atol=1e-5)


def test_to_write_into_one_changes_that_expert_and_gradients_come_to_the_parameter() -> None:
    model = StandardizedTransformer(zoo.build("mixtral"))
    own, states = experts_of(model, LAYER), torch.randn(3, HIDDEN)
    with torch.no_grad():
        before = one_by_one(own, states)
        model.W_out[LAYER][2].zero_()
        after = one_by_one(own, states)
    assert not after[2].any()
    assert torch.equal(after[[0, 1, 3, 4, 5, 6, 7]], before[[0, 1, 3, 4, 5, 6, 7]])
    model.W_gate[LAYER][3].sum().backward()
    assert own.gate_up_proj.grad[3].abs().sum() == HIDDEN * model.W_gate[LAYER].shape[2]
    assert not own.gate_up_proj.grad[2].any()


def test_looking_leaves_the_model_as_it_was() -> None:
    hf = zoo.build("qwen3_moe").train()
    before, state = copy.deepcopy(hf.state_dict()), torch.random.get_rng_state()
    model = StandardizedTransformer(hf)
    state = torch.random.get_rng_state()
    model.W_in[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    assert hf.training
    assert all(one.grad is None and one.requires_grad for one in hf.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in hf.modules())


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("eager", torch.float32),
        ("eager", torch.float64),  # grouped products of Transformers have none
        ("batched_mm", torch.float32),
        ("grouped_mm", torch.bfloat16),
        ("grouped_mm", torch.float16),
    ],
)
def test_other_implementations_and_dtypes(implementation: str, dtype: torch.dtype) -> None:
    hf = zoo.build("mixtral").to(dtype)
    hf.set_experts_implementation(implementation)
    model = StandardizedTransformer(hf)
    own, neurons = experts_of(model, LAYER), model.W_gate[LAYER].shape[2]
    assert torch.equal(model.W_gate[LAYER], own.gate_up_proj.mT[..., :neurons])
    assert torch.equal(model.W_in[LAYER], own.gate_up_proj.mT[..., neurons:])
    assert torch.equal(model.W_out[LAYER], own.down_proj.mT)


def test_the_norm_before_is_folded_into_all() -> None:
    model = StandardizedTransformer(zoo.build("mixtral"))
    scale: Any = model.layers[LAYER].module.post_attention_layernorm.weight
    torch.testing.assert_close(model.W_in.folded(LAYER), scale[:, None] * model.W_in[LAYER])


class Odd(nn.Module):
    """Experts, and something else of the states beside them."""

    def __init__(self, own: Any, how: str) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.how = own.gate_up_proj, own.down_proj, how
        self.scale = nn.Parameter(torch.full((EXPERTS, HIDDEN), 0.5))

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        gave = torch.zeros_like(states)
        for e in index.unique().tolist():
            rows, choice = torch.where(index == e)
            own = states[rows]
            used = e if self.how != "swapped" else (e + 1) % EXPERTS * (e > 0)
            gate, other = F.linear(own, self.gate_up_proj[used]).chunk(2, -1)
            activated = torch.tanh(gate * other) if self.how == "neither linear" else F.silu(gate) * other
            if self.how == "mixed":
                activated = activated + activated.roll(1, -1)
            one = F.linear(activated, self.down_proj[e])
            one = one * self.scale[e] if self.how == "scaled" else one
            one = one + 0.3 * own if self.how == "beside" else one
            gave = gave.index_add(0, rows, one * weights[rows, choice, None])
        return gave


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("neither linear", "not linear in one product and a function of another"),
        ("mixed", "no functions of one or two products each"),
        ("scaled", "no matrices between which|compute with scale beside"),
        ("swapped", "what its experts give is not what their matrices say"),
        ("beside", "what its experts give is not what their matrices say"),
    ],
)
def test_experts_that_compute_something_else_are_refused(how: str, why: str) -> None:
    hf = zoo.build("mixtral")
    hf.model.layers[LAYER].mlp.experts = Odd(hf.model.layers[LAYER].mlp.experts, how)
    model = StandardizedTransformer(hf)
    for name in ("W_in", "W_gate", "W_out", "b_out"):
        with pytest.raises(NotInThisModelError, match=rf"{name}\[1\].*mixture of experts.*({why})"):
            getattr(model, name)[LAYER]
    assert model.W_in[0].shape[0] == EXPERTS


@pytest.mark.parametrize(
    ("model_type", "layer", "why"),
    [
        ("dbrx", 0, "each with neurons of its own"),
        ("llama4_text", 1, "not one function of states, choices and their weights"),
        ("nemotron_h", None, "do not read what the MLP is given"),
    ],
)
def test_other_mixtures_are_refused_with_the_reason(model_type: str, layer: int | None, why: str) -> None:
    model = StandardizedTransformer(zoo.build(model_type))
    layer = layer_of(model) if layer is None else layer
    with pytest.raises(NotInThisModelError, match=f"W_in.*mixture of experts.*{why}"):
        model.W_in[layer]
