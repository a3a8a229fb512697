"""The states of recurrent mixers by position: against passes over the first ones, caches written by hand, and the papers."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.rwkv import modeling_rwkv

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError, NotReachedError
from nnatomy.names import STATES

#: By type, what is in its states, in the order of `STATES`; one has no convolution, one nothing else.
ALL, CONV, SSM = STATES, STATES[:1], STATES[1:2]
KEEP = {
    **dict.fromkeys(
        ("mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "zamba", "falcon_h1", "granitemoehybrid"), ALL[:2]
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid"), ALL[:2]),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "lara_mini", "recurrent_gemma"), ALL[:2]),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), CONV),
    **dict.fromkeys(("zamba2", "nemotron_h"), ALL[:2]),
    "minimax": SSM,
    "rwkv": ALL,
    "xlstm": ALL[1:],
}
#: One of each way to keep a state.
WRITTEN = ("mamba", "mamba2", "falcon_h1", "zamba", "qwen3_5_text", "kimi_linear", "lfm2", "minimax", "rwkv", "xlstm")
IDS = torch.tensor([[3, 5, 7, 9, 11, 6], [2, 4, 6, 8, 10, 5]])


def kept(hf: Any, result: Any, layer: int) -> list[Tensor]:
    """What the model itself keeps of a layer behind a pass, in the order of `STATES`."""
    if (state := getattr(result, "state", None)) is not None:  # rwkv
        return [one[:, :, layer] for one in state[1:]]
    cache = result.get("cache")
    if cache is None:  # recurrent_gemma
        block = hf.model.layers[layer].temporal_block
        return [block.conv1d_state, block.rg_lru.recurrent_states]
    if hasattr(cache, "rnn_state"):  # xlstm
        return list(cache.rnn_state[layer])
    if hasattr(cache, "linear_cache"):  # minimax
        return [cache.linear_cache[layer]]
    there = cache.layers[layer]
    return [one for one in (there.conv_states[0], there.recurrent_states[0]) if one is not None]


def layer_of(model: StandardizedTransformer, name: str) -> int:
    """The last layer that has it."""
    model._mixers.find()
    return max(i for i, one in enumerate(getattr(model, name).modules) if one is not None)


@pytest.mark.parametrize("model_type", KEEP)
def test_states_are_those_behind_a_pass_over_the_first_positions(model_type: str) -> None:
    hf = zoo.build(model_type)
    model = StandardizedTransformer(hf, validate=False)
    names = KEEP[model_type]
    layer = layer_of(model, names[0])
    assert [name for name in STATES if getattr(model, name).modules[layer] is not None] == list(names)
    with torch.no_grad():
        plain = hf(IDS).logits
        with model.trace(input_ids=IDS) as tracer:
            states = [getattr(model, name)[layer] for name in names]
            logits = tracer.result.logits
        assert torch.equal(logits, plain)
        for end in (2, 4, 6):
            ends = [one.clone() for one in kept(hf, hf(IDS[:, :end], use_cache=True), layer)]
            for state, own in zip(states, ends, strict=True):
                assert torch.allclose(
                    state[:, end - 1].reshape(own.shape), own, rtol=1e-4, atol=1e-5 * float(own.abs().max())
                )
    assert all(not torch.equal(state[:, 2], state[:, 3]) for state in states[:2])


@pytest.mark.parametrize("model_type", ["zamba2", "nemotron_h"])
def test_where_the_single_step_is_no_part_of_the_scan_states_are_read_alone(model_type: str) -> None:
    """Their scan limits the time steps from below, and their single step does not."""
    hf = zoo.build(model_type)
    model = StandardizedTransformer(hf)
    layer = layer_of(model, "ssm_states")
    with torch.no_grad():
        scanned = kept(hf, hf(IDS, use_cache=True), layer)[1]
        stepped = hf(IDS[:, :1], use_cache=True)
        for t in range(1, 6):
            stepped = hf(IDS[:, t : t + 1], cache=stepped["cache"], use_cache=True)
        apart = (kept(hf, stepped, layer)[1] - scanned).abs().max()
        assert apart > 1e-3 * scanned.abs().max(), "the limit does not count"
        for name in ("ssm_states", "conv_states"):
            with (
                pytest.raises(NotInThisModelError, match=rf"^{name} of an? \w+ cannot be assigned, .* of it, relative"),
                model.trace(input_ids=IDS) as tracer,
            ):
                getattr(model, name)[layer][:, 2] = 0
                tracer.result
        with model.generate(IDS[:1], max_new_tokens=3, do_sample=False) as tracer:
            steps = [(model.ssm_states[layer].shape[1], model.ssm_states[layer][:, -1]) for _ in tracer.iter[:]]
            tokens = tracer.result
        assert [length for length, _ in steps] == [6, 1, 1]
        cache = hf(tokens[:, :6], use_cache=True)["cache"]
        for t, (_, state) in enumerate(steps):
            if t:
                cache = hf(tokens[:, 5 + t : 6 + t], cache=cache, use_cache=True)["cache"]
            own = cache.layers[layer].recurrent_states[0]
            assert torch.allclose(state.reshape(own.shape), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))
    with (
        pytest.raises(NotInThisModelError, match="nor its gradient be asked for"),
        model.trace(input_ids=IDS) as tracer,
    ):
        model.ssm_states[layer].retain_grad()
        tracer.result


@pytest.mark.parametrize("model_type", WRITTEN)
def test_a_state_written_is_a_pass_that_goes_on_from_another_cache(model_type: str) -> None:
    hf = zoo.build(model_type)
    model = StandardizedTransformer(hf, validate=False)
    names, ids, place = KEEP[model_type], IDS[:1], 2
    layer = layer_of(model, names[0])
    with torch.no_grad():
        plain = hf(ids).logits
        with model.trace(input_ids=ids) as tracer:
            state = getattr(model, names[0])[layer]
            state[0, place] = new = torch.linspace(0.5, 1.5, state[0, 0].numel()).reshape(state[0, 0].shape)
            logits = tracer.result.logits
        name = "state" if hasattr(tracer.result, "state") else "cache"
        cut = hf(ids[:, : place + 1], use_cache=True)
        own = kept(hf, cut, layer)[0]
        own.copy_(new.reshape(own.shape))
        for t in range(place + 1, 6):
            where = {"position_ids": torch.tensor([[t]])} if "position_ids" in signature(hf.forward).parameters else {}
            cut = hf(ids[:, t : t + 1], use_cache=True, **{name: cut[name]}, **where)
            assert torch.allclose(logits[:, t], cut.logits[:, 0], rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
        for mine, own in zip(kept(hf, tracer.result, layer), kept(hf, cut, layer), strict=True):
            assert torch.allclose(mine, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))
    # Experts' rows are added up in another order.
    assert torch.allclose(logits[:, : place + 1], plain[:, : place + 1], rtol=0, atol=1e-5 * float(plain.abs().max()))
    assert (logits[:, place + 1] - plain[:, place + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "qwen3_5_text"])
def test_the_last_of_the_states_is_written(model_type: str) -> None:
    """`ssm_states` behind `conv_states`, which keeps what was read of it, by assignment, for one of two prompts."""
    model = StandardizedTransformer(zoo.build(model_type), validate=False)
    layer = layer_of(model, "ssm_states")
    with torch.no_grad():
        plain = model(input_ids=IDS)
        with model.trace(input_ids=IDS) as tracer:
            conv, state = model.conv_states[layer], model.ssm_states[layer]
            new = state.clone()
            new[1, 1:3] = 3.0
            model.ssm_states[layer] = new
            result = tracer.result
        first = kept(model.hf_model, result, layer)
        with model.trace(input_ids=IDS) as tracer:
            again = model.conv_states[layer]
            given = model.ssm_states[layer]
            tracer.result
    assert torch.equal(conv, again)
    assert torch.equal(given, state)
    clean = kept(model.hf_model, plain, layer)
    assert torch.equal(result.logits[0, :2], plain.logits[0, :2])
    assert torch.equal(first[1][0], clean[1][0])
    assert (first[1][1] - clean[1][1]).abs().max() > 1e-3
    assert torch.allclose(result.logits[0], plain.logits[0], rtol=0, atol=1e-5 * float(plain.logits.abs().max()))


def test_mamba_by_its_formula() -> None:
    """Gu and Dao 2023, equation 2: h_t = exp(step A) h_(t-1) + step B x_t; y_t = C h_t + D x_t; out of y gate(z)."""
    hf = zoo.build("mamba")
    model = StandardizedTransformer(hf)
    mixer = hf.backbone.layers[2].mixer
    with torch.no_grad(), model.trace(input_ids=IDS):
        given = model.layers[2].mixer.input
        gates = model.mixer_gates[2]
        convolved = model.conv_states[2]
        states = model.ssm_states[2]
        output = model.mixers_output[2]
    with torch.no_grad(), model.trace(input_ids=IDS):
        steps = model.time_steps[2]
    with torch.no_grad():
        x, z = mixer.in_proj(given).chunk(2, -1)
        window = F.pad(x.mT, (3, 0)).unfold(2, 4, 1)
        assert torch.allclose(window.transpose(1, 2), convolved, atol=1e-5)
        x = F.silu((window * mixer.conv1d.weight[:, 0, None]).sum(-1) + mixer.conv1d.bias[:, None]).mT
        rank, size = mixer.time_step_rank, mixer.ssm_state_size
        low, b, c = mixer.x_proj(x).split([rank, size, size], -1)
        delta = F.softplus(low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
        assert torch.allclose(delta, steps, atol=1e-5)
        assert torch.allclose(F.silu(z), gates, atol=1e-5)
        h, y = torch.zeros(2, x.shape[-1], size), []
        for t in range(6):
            h = torch.exp(-delta[:, t, :, None] * mixer.A_log.exp()) * h + (delta * x)[:, t, :, None] * b[:, t, None]
            assert torch.allclose(h, states[:, t, 0], atol=1e-5)
            y.append((h * c[:, t, None]).sum(-1) + mixer.D * x[:, t])
        assert torch.allclose(mixer.out_proj(torch.stack(y, 1) * gates), output, atol=1e-4)


def test_the_gated_delta_rule_by_its_formula() -> None:
    """Yang et al. 2024 (2412.06464), equation 10: S_t = S_(t-1) a_t (I - b_t k_t k_t') + b_t v_t k_t', with a_t = exp(-A step)."""
    hf = zoo.build("qwen3_next")
    model = StandardizedTransformer(hf, validate=False)
    layer = layer_of(model, "ssm_states")
    mixer = hf.model.layers[layer].linear_attn
    with torch.no_grad(), model.trace(input_ids=IDS):
        given = model.layers[layer].linear_attn.input
        steps = model.time_steps[layer]
        states = model.ssm_states[layer]
    with torch.no_grad():
        q, k, v, _, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(given), mixer.in_proj_ba(given))
        mixed = torch.cat([one.flatten(2) for one in (q, k, v)], -1).mT
        mixed = F.silu(mixer.conv1d(mixed)[..., :6]).mT
        k = mixed[..., q[0, 0].numel() : 2 * q[0, 0].numel()].reshape(k.shape)
        v = mixed[..., 2 * q[0, 0].numel() :].reshape(v.shape)
        k = F.normalize(k, dim=-1).repeat_interleave(v.shape[2] // k.shape[2], 2)
        assert torch.allclose(F.softplus(a + mixer.dt_bias), steps, atol=1e-5)
        decay, beta = torch.exp(-mixer.A_log.exp() * steps), b.sigmoid()
        s = torch.zeros_like(states[:, 0])
        for t in range(6):
            s = s * decay[:, t, :, None, None]
            read = (s * k[:, t, :, :, None]).sum(-2)
            s = s + k[:, t, :, :, None] * ((v[:, t] - read) * beta[:, t, :, None])[:, :, None]
            assert torch.allclose(s, states[:, t], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [("mamba2", "time_steps"), ("mamba", "mixer_gates"), ("qwen3_5_text", "mixer_gates"), ("zamba2", "time_steps")],
)
def test_what_is_written_inside_is_not_read_as_a_state(model_type: str, name: str, dtype: torch.dtype) -> None:
    """Half precision leaves no room for it."""
    model = StandardizedTransformer(zoo.build(model_type).to(dtype), validate=False)
    layer = layer_of(model, "ssm_states")
    with torch.no_grad():
        with model.trace(input_ids=IDS) as tracer:
            model.ssm_states[layer]
            tracer.result
        with pytest.raises(NotInThisModelError) as error, model.trace(input_ids=IDS):
            getattr(model, name)[layer] = 1.3 * getattr(model, name)[layer]
            model.ssm_states[layer]
    assert "has ended elsewhere than its own single steps" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_tokens_behind_a_state(dtype: torch.dtype) -> None:
    """Mamba's scan begins anew there, so that no state of the call is its single steps'; Mamba-2's goes on."""
    for model_type in ("mamba", "mamba2"):
        hf = zoo.build(model_type).to(dtype)
        model = StandardizedTransformer(hf, validate=False)
        with torch.no_grad():
            whole = kept(hf, hf(IDS[:, :5], use_cache=True), 1)[1]
            begun = hf(IDS[:, :3], use_cache=True)["cache"]
            if model_type == "mamba":
                with (
                    pytest.raises(NotInThisModelError, match="several tokens behind a state"),
                    model.trace(input_ids=IDS[:, 3:], cache=begun, use_cache=True),
                ):
                    model.ssm_states[1]
                continue
            with model.trace(input_ids=IDS[:, 3:], cache=begun, use_cache=True):
                states = model.ssm_states[1]
        off = (states[:, 1].reshape(whole.shape) - whole).abs().max()
        assert off <= (1e-5 if dtype == torch.float32 else 5e-2) * whole.abs().max()


@pytest.mark.parametrize("model_type", ["zamba2", "mamba", "rwkv"])
def test_states_in_double_precision(model_type: str) -> None:
    """There the same inputs of a longer prompt are computed with other roundings, and a window of them is one still."""
    hf = zoo.build(model_type).double()
    model = StandardizedTransformer(hf, validate=False)
    names = KEEP[model_type][:2]
    layer = layer_of(model, names[0])
    with torch.no_grad():
        with model.trace(input_ids=IDS):
            states = [getattr(model, name)[layer] for name in names]
        for end in (2, 6):
            ends = kept(hf, hf(IDS[:, :end], use_cache=True), layer)
            for state, own in zip(states, ends, strict=False):
                assert (state[:, end - 1].reshape(own.shape) - own).abs().max() <= 1e-6 * own.abs().max()


def test_a_single_step_that_is_not_the_scan_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = modeling_mamba2.mamba2_selective_state_update

    def wrong(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given: Tensor = step(state, *args, **kwargs)
        state.mul_(1.01)
        return given

    monkeypatch.setattr(modeling_mamba2, "mamba2_selective_state_update", wrong)
    hf = zoo.build("mamba2")
    model = StandardizedTransformer(hf, validate=False)
    assert model.time_steps.module(1) is not None
    with torch.no_grad(), model.trace(input_ids=IDS):
        states = model.ssm_states[1]
    for end in (1, 4, 6):  # those of the scan
        with torch.no_grad():
            own = kept(hf, hf(IDS[:, :end], use_cache=True), 1)[1]
        assert torch.allclose(states[:, end - 1].reshape(own.shape), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))
    with pytest.raises(NotInThisModelError, match="cannot be assigned"), model.trace(input_ids=IDS) as tracer:
        model.ssm_states[1] = 2 * model.ssm_states[1]
        tracer.result


def test_a_scan_that_is_no_recurrence_has_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives at a position is not what it gives there when it is the last."""
    scan = modeling_mamba2.mamba2_chunk_scan

    def wrong(*args: Any, **kwargs: Any) -> Any:
        given = scan(*args, **kwargs)
        out = given[0] if isinstance(given, tuple) else given
        out = out + 0.3 * out.mean(1, keepdim=True)
        return (out, *given[1:]) if isinstance(given, tuple) else out

    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", wrong)
    model = StandardizedTransformer(zoo.build("mamba2"), validate=False)
    with pytest.raises(NotInThisModelError, match=r"give something else than it gives at once: \d\.\de[+-]\d\d of it"):
        model.ssm_states.module(1)


def test_a_fused_kernel_hides_the_time_steps_and_keeps_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands where Transformers puts that of mamba_ssm, and torch sees nothing of what it computes."""
    hf = zoo.build("mamba2")
    with torch.no_grad(), StandardizedTransformer(hf, validate=False).trace(input_ids=IDS) as tracer:
        plain = tracer.result.logits

    def kernel(own: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return own(*args, **kwargs)

    for name in ("mamba2_chunk_scan", "mamba2_selective_state_update"):
        monkeypatch.setattr(modeling_mamba2, name, partial(kernel, getattr(modeling_mamba2, name)))
    model = StandardizedTransformer(hf, validate=False)
    with (
        pytest.raises(
            NotInThisModelError, match=r"no softplus gives any that torch sees \(a fused kernel shows none\)"
        ),
        model.trace(input_ids=IDS),
    ):
        model.time_steps[1]
    with torch.no_grad(), model.trace(input_ids=IDS) as tracer:
        states = model.ssm_states[1]
        logits = tracer.result.logits
    assert torch.equal(logits, plain)
    for end in (2, 6):
        with torch.no_grad():
            own = kept(hf, hf(IDS[:, :end], use_cache=True), 1)[1]
        assert torch.allclose(states[:, end - 1].reshape(own.shape), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


def test_three_states_that_are_no_sum_with_its_normalizer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is read without its normalizer: single steps and scan agree, and the three do not belong together."""
    scan = modeling_rwkv.rwkv_linear_attention

    def wrong(
        decay: Tensor, first: Tensor, key: Tensor, value: Tensor, state: Any = None, return_state: bool = False
    ) -> Any:
        keeps, given = return_state or state is not None, []
        for k, v in zip(key.split(1, 1), value.split(1, 1), strict=True):
            one, state = scan(decay, first, k, v, state=state, return_state=True)
            given.append(one + 0.1 * state[0][:, None])
        return torch.cat(given, 1), state if keeps else None

    monkeypatch.setattr(modeling_rwkv, "rwkv_linear_attention", wrong)
    model = StandardizedTransformer(zoo.build("rwkv"), validate=False)
    with pytest.raises(NotInThisModelError, match="its three states are no sum, normalizer and stabilizer"):
        model.ssm_normalizers.module(1)


def test_a_pass_that_keeps_no_states() -> None:
    """An empty cache is made where one is made as it fills; where not, the pass has to keep them."""
    model = StandardizedTransformer(zoo.build("mamba2"), validate=False)
    with torch.no_grad(), model.trace(input_ids=IDS):
        states = model.ssm_states[1]
    with torch.no_grad(), model.trace(input_ids=IDS, use_cache=False) as tracer:
        assert torch.equal(model.ssm_states[1], states)
        model.ssm_states[1][:, 2] = 0
        logits = tracer.result.logits
    with torch.no_grad(), model.trace(input_ids=IDS) as tracer:
        model.ssm_states[1][:, 2] = 0
        assert torch.equal(logits, tracer.result.logits)
    model = StandardizedTransformer(zoo.build("rwkv"), validate=False)
    with torch.no_grad(), pytest.raises(NotReachedError) as error, model.trace(input_ids=IDS, use_cache=False):
        model.ssm_states[1]
    assert "use_cache=True" in str(error.value)
    model = StandardizedTransformer(zoo.build("llama"), validate=False)
    with pytest.raises(NotInThisModelError, match="this layer has none: no token mixer of it is recurrent"):
        model.ssm_states.module(1)


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_5_text"])
def test_gradients(model_type: str) -> None:
    """Of the logits of a later position by a state: as finite differences have it."""
    model = StandardizedTransformer(zoo.build(model_type), validate=False)
    layer = layer_of(model, "ssm_states")
    with model.trace(input_ids=IDS) as tracer:
        state = model.ssm_states[layer]
        state.retain_grad()
        loss = tracer.result.logits[:, 4].square().mean()
    loss.backward()
    assert state.grad is not None
    direction = torch.randn(state[:, 1].shape, dtype=state.dtype, generator=torch.Generator().manual_seed(0))
    losses = []
    for sign in (1, -1):
        with torch.no_grad(), model.trace(input_ids=IDS) as tracer:
            model.ssm_states[layer][:, 1] += sign * 3e-3 * direction
            losses.append(tracer.result.logits[:, 4].square().mean())
    slope = float(losses[0] - losses[1]) / 6e-3
    assert slope == pytest.approx(float((state.grad[:, 1] * direction).sum()), rel=2e-2)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "qwen3_5_text"])
def test_the_gradient_of_a_state_leaves_all_others_as_they_are(model_type: str) -> None:
    """Those of the embedding are a plain pass's, and an earlier layer's state has what finite differences give."""
    hf = zoo.build(model_type).double()
    model = StandardizedTransformer(hf, validate=False)
    weight = hf.get_input_embeddings().weight
    hf(IDS).logits[:, 4].square().mean().backward()
    plain = weight.grad.clone()
    weight.grad = None
    states = []
    with model.trace(input_ids=IDS) as tracer:
        for layer in (0, 2):
            states.append(model.ssm_states[layer])
            states[-1].retain_grad()
        loss = tracer.result.logits[:, 4].square().mean()
    loss.backward()
    assert (weight.grad - plain).abs().max() <= 1e-4 * plain.abs().max()
    direction = torch.randn(states[0][:, 1].shape, generator=torch.Generator().manual_seed(0)).to(states[0])
    losses = []
    for sign in (1, -1):
        with torch.no_grad(), model.trace(input_ids=IDS) as tracer:
            model.ssm_states[0][:, 1] += sign * 1e-3 * direction
            losses.append(tracer.result.logits[:, 4].square().mean())
    slope = float(losses[0] - losses[1]) / 2e-3
    assert states[0].grad is not None
    assert slope == pytest.approx(float((states[0].grad[:, 1] * direction).sum()), rel=2e-2)


def test_a_generation() -> None:
    """Each step's states go on from those of the step before, also from those put there."""
    model = StandardizedTransformer(zoo.build("mamba2"), validate=False)
    states, shapes = [], []
    with torch.no_grad(), model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                model.ssm_states[2][:] = 0
            states.append(model.ssm_states[2])
            shapes.append(tuple(states[-1].shape[:2]))
    assert shapes == [(2, 6), (2, 1), (2, 1)]
    assert not states[1].any()
    assert states[2].any()


def test_two_blocks() -> None:
    """Blocks of prompts of unequal length see their own positions, and write them alone."""
    model = StandardizedTransformer(zoo.build("qwen3_next"), validate=False)
    layer = layer_of(model, "ssm_states")
    with torch.no_grad():
        with model.trace([[3, 5, 7]]) as tracer:
            alone = model.ssm_states[layer]
            tracer.result
        with model.trace() as tracer:
            with tracer.invoke([[3, 5, 7]]):
                first = model.ssm_states[layer]
            with tracer.invoke([[2, 4, 6, 8, 10]]):
                model.ssm_states[layer][:, 2] = 1.0
                second = model.ssm_states[layer]
    assert torch.allclose(first, alone, atol=1e-5)
    assert bool((second[:, 2] == 1).all())
    assert second.shape[1] == 5
