"""Queries, keys, values, scores and heads' outputs against attention written out in plain PyTorch."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from architectures import TYPES, build, prompt_ids, shared
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, NotInThisModelError, OutOfOrderError

NAMES = (
    *("queries", "keys", "values", "attention_scores", "attention_probabilities", "values_weighted"),
    "heads_output",
)
BY_PAIRS = ("attention_scores", "attention_probabilities", "values_weighted")
LAYER = 1
HEADS = 4
#: Where each type's output projection is.
PROJECTIONS = {
    **dict.fromkeys(TYPES, "o_proj"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "c_proj"),
    **dict.fromkeys(("gpt_neo",), "attention.out_proj"),
    **dict.fromkeys(("gptj", "opt", "mpt"), "out_proj"),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "phi"), "dense"),
}


class Written:
    """One attention, written out: from what its module is given to what its output projection is given."""

    def __init__(self, model_type: str, hf: nn.Module, module: Any, inputs: tuple[Any, Any]) -> None:
        self.type, self.module, self.config = model_type, module, hf.config
        args, kwargs = inputs
        self.given = kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        self.batch, self.seq = hidden.shape[:2]
        self.queries, self.keys, self.values = getattr(self, model_type, self.separate)(hidden)
        self.attention_scores = self.scores(self.queries, self.keys)
        self.attention_probabilities = self.probabilities(self.attention_scores)
        self.values_weighted = self.weighted(self.attention_probabilities, self.values)
        self.heads_output = self.heads(self.attention_probabilities, self.values)

    # From the projections to the attention function's arguments.

    def rotate(self, q: Tensor, k: Tensor, name: str = "apply_rotary_pos_emb") -> tuple[Tensor, Tensor]:
        cos, sin = self.given["position_embeddings"]
        return getattr(sys.modules[type(self.module).__module__], name)(q, k, cos, sin)

    def split(self, x: Tensor, heads: int = -1) -> Tensor:
        return x.view(self.batch, self.seq, heads, x.shape[-1] // heads if heads > 0 else self.dim).transpose(1, 2)

    @property
    def dim(self) -> int:
        return int(getattr(self.module, "head_dim", 8))

    def separate(self, h: Tensor) -> tuple[Tensor, ...]:
        m = self.module
        return (*self.rotate(self.split(m.q_proj(h)), self.split(m.k_proj(h))), self.split(m.v_proj(h)))

    def qwen3(self, h: Tensor) -> tuple[Tensor, ...]:
        m = self.module
        q, k = m.q_norm(self.split(m.q_proj(h))), m.k_norm(self.split(m.k_proj(h)))
        return (*self.rotate(q, k), self.split(m.v_proj(h)))

    def phi3(self, h: Tensor) -> tuple[Tensor, ...]:
        q, k, v = map(self.split, self.module.qkv_proj(h).split([32, 16, 16], -1))
        return (*self.rotate(q, k), v)

    def gpt2(self, h: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.module.c_attn(h).split(32, -1)
        return self.split(q, 4), self.split(k, 4), self.split(v, 4)

    def mpt(self, h: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.module.Wqkv(h).split(32, -1)
        return self.split(q, 4), self.split(k, 4), self.split(v, 4)

    def gpt_neox(self, h: Tensor) -> tuple[Tensor, ...]:
        each = self.module.query_key_value(h).view(self.batch, self.seq, 4, 3, 8).permute(3, 0, 2, 1, 4)
        return (*self.rotate(each[0], each[1]), each[2])

    def bloom(self, h: Tensor) -> tuple[Tensor, ...]:
        each = self.module.query_key_value(h).view(self.batch, self.seq, 4, 3, 8).permute(3, 0, 2, 1, 4)
        return each[0], each[1], each[2]

    def falcon(self, h: Tensor) -> tuple[Tensor, ...]:
        fused = self.module.query_key_value(h).view(self.batch, self.seq, 6, 8).transpose(1, 2)
        return (*self.rotate(fused[:, :4], fused[:, 4:5]), fused[:, 5:])

    def opt(self, h: Tensor) -> tuple[Tensor, ...]:
        m = self.module
        return self.split(m.q_proj(h) * 8**-0.5), self.split(m.k_proj(h)), self.split(m.v_proj(h))

    def gptj(self, h: Tensor) -> tuple[Tensor, ...]:
        m = self.module
        positions = torch.arange(self.seq)
        angles = positions[:, None] / 10000 ** (torch.arange(0, 4, 2) / 4)  # rotary_dim = 4
        sin, cos = (x.repeat_interleave(2, -1) for x in (angles.sin(), angles.cos()))

        def turn(x: Tensor) -> Tensor:
            turned = torch.stack((-x[..., 1:4:2], x[..., 0:4:2]), -1).flatten(-2)
            return torch.cat([x[..., :4] * cos + turned * sin, x[..., 4:]], -1)

        return (
            turn(self.split(m.q_proj(h), 4)),
            turn(self.split(m.k_proj(h), 4)),
            self.split(m.v_proj(h), 4),
        )

    def deepseek_v3(self, h: Tensor) -> tuple[Tensor, ...]:
        m = self.module
        q = self.split(m.q_b_proj(m.q_a_layernorm(m.q_a_proj(h))), 4)
        latent, k_turned = m.kv_a_proj_with_mqa(h).split([8, 8], -1)
        kv = self.split(m.kv_b_proj(m.kv_a_layernorm(latent)), 4)
        assert self.config.rope_interleave
        q_turned, k_turned = self.rotate(q[..., 4:], k_turned[:, None], "apply_rotary_pos_emb_interleave")
        k = torch.cat([kv[..., :4], k_turned.expand(-1, 4, -1, -1)], -1)
        return torch.cat([q[..., :4], q_turned], -1), k, kv[..., 4:]

    # The attention.

    @property
    def visible(self) -> Tensor:
        back = torch.arange(self.seq)[:, None] - torch.arange(self.seq)
        window = self.seq
        if self.type in ("gemma2", "gpt_oss", "phi3"):
            kinds = getattr(self.config, "layer_types", None)
            window = 4 if kinds is None or kinds[LAYER] == "sliding_attention" else self.seq
        return (back >= 0) & (back < window)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = {"opt": 1.0, "gemma2": 256**-0.5}.get(self.type, q.shape[-1] ** -0.5)
        scores = q @ k.repeat_interleave(HEADS // k.shape[1], 1).mT * scale
        if self.type == "gemma2":
            scores = 5 * (scores / 5).tanh()
        slopes = 2.0 ** (-2 * torch.arange(1, 5))[:, None, None]  # ALiBi with 4 heads
        if self.type == "bloom":
            scores = scores + slopes * torch.arange(self.seq)
        if self.type == "mpt":
            scores = scores + slopes * torch.arange(1 - self.seq, 1)
        return scores.masked_fill(~self.visible, -torch.inf)

    def probabilities(self, scores: Tensor) -> Tensor:
        if self.type != "gpt_oss":
            return scores.softmax(-1)
        sinks = self.module.sinks[:, None, None].expand(self.batch, -1, self.seq, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def heads(self, probabilities: Tensor, values: Tensor) -> Tensor:
        return (probabilities @ values.repeat_interleave(HEADS // values.shape[1], 1)).transpose(1, 2)

    def weighted(self, probabilities: Tensor, values: Tensor) -> Tensor:
        each = values.repeat_interleave(HEADS // values.shape[1], 1)
        return torch.stack([probabilities[..., k, None] * each[:, :, k, None] for k in range(self.seq)], 3)

    def heads_if(self, name: str, value: Tensor) -> Tensor:
        """What the heads give where that is in the place of one of the names."""
        q, k, v = (value if name == n else getattr(self, n) for n in NAMES[:3])
        scores = value if name == "attention_scores" else self.scores(q, k)
        pattern = value if name == "attention_probabilities" else self.probabilities(scores)
        if name == "values_weighted":
            return value.sum(3).transpose(1, 2)
        return value if name == "heads_output" else self.heads(pattern, v)


WRITTEN = tuple("llama qwen3 gemma2 gpt2 gpt_neox falcon bloom mpt deepseek_v3 gpt_oss cohere phi3 opt gptj".split())


def load(model_type: str, implementation: str | None = None) -> StandardizedTransformer:
    if implementation is None:
        return StandardizedTransformer(shared(model_type))
    return StandardizedTransformer(build(model_type, attn_implementation=implementation))


def projection(model: StandardizedTransformer, model_type: str) -> nn.Module:
    return model.layers[LAYER].self_attn.module.get_submodule(PROJECTIONS[model_type])


def written(model: StandardizedTransformer, model_type: str, ids: Tensor) -> tuple[Written, Tensor]:
    """The attention of one layer written out, and what its output projection is given in a plain pass."""
    module = model.layers[LAYER].self_attn.module
    inputs: list[Any] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True),
        projection(model, model_type).register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
    ]
    with torch.no_grad():
        model.hf_model(ids)
        for handle in handles:
            handle.remove()
        given = inputs[0]
        return Written(model_type, model.hf_model, module, given), inputs[1]


def with_heads(model: StandardizedTransformer, model_type: str, ids: Tensor, edit: Any) -> Tensor:
    """The logits of a plain pass in which the output projection is given `edit` of its input."""
    hook = projection(model, model_type).register_forward_pre_hook(lambda _, args: (edit(args[0]),))
    try:
        with torch.no_grad():
            return model.hf_model(ids).logits
    finally:
        hook.remove()


def everything(model: StandardizedTransformer, layer: int = LAYER) -> dict[str, Tensor]:
    return {name: getattr(model, name)[layer] for name in NAMES}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    assert one.shape == other.shape
    seen = (other > -1e30) & (one > -1e30)  # masked scores are -inf or the dtype's least
    assert torch.equal(one > -1e30, other > -1e30)
    scale = other[seen].abs().max().clamp(min=1)
    return bool(((one - other)[seen].abs() <= tolerance * scale).all())


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("model_type", WRITTEN)
def test_they_are_what_is_written_out(model_type: str, implementation: str | None) -> None:
    model, ids = load(model_type, implementation), prompt_ids()
    reference, given = written(model, model_type, ids)
    with torch.no_grad():
        with model.trace(ids):
            own = everything(model)
            logits = model.logits
        assert torch.equal(logits, model.hf_model(ids).logits)
    if model_type == "gpt_oss":  # takes the row's largest off
        own["attention_scores"] = own["attention_scores"].log_softmax(-1)
        reference.attention_scores = reference.attention_scores.log_softmax(-1)
    for name in NAMES:
        assert close(own[name], getattr(reference, name)), name
    assert torch.equal(own["heads_output"].flatten(2), given)


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("model_type", WRITTEN)
def test_an_edit_is_what_the_definition_makes_of_it(model_type: str, implementation: str | None) -> None:
    model, ids = load(model_type, implementation), prompt_ids()
    reference, _ = written(model, model_type, ids)
    with torch.no_grad():
        plain = model.hf_model(ids).logits
    for name in NAMES:
        with torch.no_grad(), model.trace(ids):
            old = getattr(model, name)[LAYER]
            new = old.clone()
            new[1] = old[1] * 0.6 + 0.1 * torch.linspace(-1, 1, old.shape[-1])
            getattr(model, name)[LAYER] = new
            logits = model.logits
        with torch.no_grad(), model.trace(ids):
            getattr(model, name)[LAYER][1] = new[1]
            in_place = model.logits
        if model_type == "gpt_oss" and name == "attention_scores":  # the sink's column is the row's largest less
            largest = torch.cat(
                [reference.attention_scores, reference.module.sinks[:, None, None].expand(2, -1, 9, 1)], -1
            ).amax(-1, keepdim=True)
            new = new + largest
        heads = reference.heads_if(name, new).flatten(2)
        expected = with_heads(model, model_type, ids, lambda _: heads)  # noqa: B023
        assert torch.equal(logits, in_place), name
        assert close(logits, expected, 1e-4), name
        assert not close(logits[1], plain[1], 1e-3), name
        assert close(logits[0], plain[0], 1e-4), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_angles_that_are_computed_inside_are_no_queries_and_keys(implementation: str) -> None:
    """As many prompts as heads: by its shape alone, frequencies by positions could be a product of queries and keys."""
    hf, ids = build("llama", attn_implementation=implementation), prompt_ids(batch=HEADS)
    found = []
    for _ in range(2):
        model = StandardizedTransformer(hf)
        with torch.no_grad(), model.trace(ids):
            found.append(everything(model))
        attention = hf.model.layers[LAYER].self_attn
        forward = attention.forward

        def rotating(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            torch.ones(HEADS, 8, 1) @ torch.arange(9.0).expand(HEADS, 1, 9)
            return forward(*args, **kwargs)

        attention.forward = rotating
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("model_type", TYPES)
def test_they_are_the_same_in_eager_mode_and_reading_leaves_the_logits(model_type: str) -> None:
    ids = prompt_ids()
    found = []
    for implementation in (None, "eager"):
        model = load(model_type, implementation)
        with torch.no_grad():
            with model.trace(ids):
                found.append([everything(model, layer) for layer in range(model.num_layers)])
                logits = model.logits
            assert torch.equal(logits, model.hf_model(ids).logits)
        values = model.hf_model.config.get_text_config()
        for one in found[-1]:
            assert one["queries"].shape[:3] == (2, HEADS, 9)
            kv = 1 if getattr(values, "multi_query", False) else getattr(values, "num_key_value_heads", HEADS)
            assert one["keys"].shape[:3] == one["values"].shape[:3] == (2, kv, 9)
    for own, eager in zip(*found, strict=True):
        for name in NAMES:
            assert close(own[name], eager[name]), name


@pytest.mark.parametrize("model_type", TYPES)
def test_a_head_without_output_is_its_columns_without_any(model_type: str) -> None:
    model, ids = load(model_type), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        model.heads_output[LAYER][:, :, 2] = 0
        logits = model.logits

    def without(x: Tensor) -> Tensor:
        x = x.clone().unflatten(-1, (HEADS, -1))
        x[:, :, 2] = 0
        return x.flatten(-2)

    assert torch.equal(logits, with_heads(model, model_type, ids, without))
    assert not torch.equal(logits, with_heads(model, model_type, ids, lambda x: x))


def test_gates_come_after_what_the_heads_give() -> None:
    import zoo

    model = StandardizedTransformer(zoo.shared("qwen3_next"))
    layer = model.attention_layers[0]
    ids, given = zoo.ids(model.hf_model), []
    hook = model.layers[layer].self_attn.module.o_proj.register_forward_pre_hook(lambda _, a: given.append(a[0]))
    with torch.no_grad(), model.trace(ids):
        heads = model.heads_output[layer].flatten(2)
        model.attentions_output[layer]
    hook.remove()
    ratio = given[0] / heads
    assert bool(((ratio > 0) & (ratio < 1)).all())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "falcon", "gpt_oss", "deepseek_v3", "phi3"])
def test_padding_on_the_left_and_blocks_of_invoke(model_type: str) -> None:
    model = load(model_type)
    long, short = prompt_ids(1, 8, 1)[0].tolist(), prompt_ids(1, 4, 2)[0].tolist()
    with torch.no_grad():
        with model.trace([long, short]):
            together = everything(model)
        with model.trace() as tracer:
            with tracer.invoke(long):
                first = everything(model)
            with tracer.invoke(short):
                second = everything(model)
        with model.trace(long):
            long_alone = everything(model)
        with model.trace(short):
            short_alone = everything(model)
    for name in NAMES:
        assert close(first[name], long_alone[name], 1e-4), name
        assert close(second[name], short_alone[name], 1e-4), name
        padded = together[name][1:]
        if name == "heads_output":
            padded = padded[:, -4:]
        else:
            padded = padded[:, :, -4:, -4:] if name in BY_PAIRS else padded[:, :, -4:]
        if name != "attention_scores" or model_type not in ("bloom",):  # ALiBi's zero is elsewhere
            assert close(padded, short_alone[name], 1e-4), name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "falcon"])
def test_blocks_of_invoke_edit_their_own_rows(model_type: str) -> None:
    model = load(model_type)
    long, short = prompt_ids(1, 8, 1)[0].tolist(), prompt_ids(1, 4, 2)[0].tolist()

    def edits(model: StandardizedTransformer) -> Tensor:
        model.keys[LAYER][:, :, 1] = 0
        model.values[LAYER] = 2 * model.values[LAYER]
        model.heads_output[LAYER][:, -1, 3] = 0
        return model.logits

    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(long):
                plain = model.logits
            with tracer.invoke(short):
                edited = edits(model)
        with model.trace(long):
            plain_alone = model.logits
        with model.trace(short):
            edited_alone = edits(model)
    assert close(plain, plain_alone, 1e-4)
    assert close(edited, edited_alone, 1e-4)
    assert not close(edited, model(short).logits, 1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "falcon", "gpt_neox", "deepseek_v3"])
def test_each_step_of_a_generation(model_type: str, implementation: str | None, padded: bool) -> None:
    """With the cache: queries of the newest token, keys and values of all so far."""
    model = load(model_type, implementation)
    prompt = prompt_ids(2, 5)
    prompts = [prompt[0].tolist(), prompt[1, 2 if padded else 0 :].tolist()]
    with model.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        steps = [everything(model) for _ in tracer.iter[:]]
        tokens = tracer.result
    row = tokens[0, :-1]  # the longer prompt, without padding
    with torch.no_grad(), model.trace(row[None]):
        whole = everything(model)
    for step, one in enumerate(steps):
        now, so_far = slice(0, 5) if step == 0 else slice(4 + step, 5 + step), slice(0, 5 + step)
        for name in NAMES:
            full = whole[name]
            if name == "heads_output":
                full = full[:, now]
            elif name == "queries":
                full = full[:, :, now]
            else:
                full = full[:, :, now, so_far] if name in BY_PAIRS else full[:, :, so_far]
            assert close(one[name][:1], full, 1e-4), (name, step)


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_blocks_of_invoke_in_a_generation(implementation: str | None) -> None:
    model = load("llama", implementation)
    long, short = prompt_ids(1, 8, 1)[0].tolist(), prompt_ids(1, 4, 2)[0].tolist()
    with model.generate(max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        with tracer.invoke(long):
            first = [everything(model) for _ in tracer.iter[:]]
        with tracer.invoke(short):
            second = [everything(model) for _ in tracer.iter[:]]
    for prompt, steps in ((long, first), (short, second)):
        with model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            alone = [everything(model) for _ in tracer.iter[:]]
        for mine, own in zip(steps, alone, strict=True):
            assert all(close(mine[name], own[name], 1e-4) for name in NAMES)


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("model_type", WRITTEN)
def test_a_gradient_reaches_them(model_type: str, implementation: str | None) -> None:
    """It is that of the attention written out, given the gradient that the output projection's input has."""
    model, ids = load(model_type, implementation), prompt_ids()
    reference, _ = written(model, model_type, ids)
    weights = torch.arange(2 * 9 * 67).reshape(2, 9, 67).sin()
    given: list[Tensor] = []
    hook = projection(model, model_type).register_forward_pre_hook(
        lambda _, args: args[0].retain_grad() or given.append(args[0])
    )
    (model.hf_model(ids).logits * weights).sum().backward()
    hook.remove()
    for name in NAMES:
        with model.trace(ids):
            value = getattr(model, name)[LAYER]
            value.retain_grad()
            (model.logits * weights).sum().backward()
        leaf = getattr(reference, name).detach().clone().requires_grad_()
        reference.heads_if(name, leaf).flatten(2).backward(given[0].grad)
        assert value.grad is not None, name
        assert leaf.grad.any()
        assert float((value.grad - leaf.grad).abs().max() / leaf.grad.abs().max()) < 1e-4, name
    model.hf_model.zero_grad()


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mpt", "gpt_oss"])
def test_the_order_within_a_layer(model_type: str, implementation: str | None) -> None:
    model, ids = load(model_type, implementation), prompt_ids()
    for n, first in enumerate(NAMES):
        for second in NAMES[:n]:
            with torch.no_grad(), model.trace(ids):
                getattr(model, first)[LAYER]
                with pytest.raises(OutOfOrderError, match=second):
                    getattr(model, second)[LAYER]
                assert getattr(model, first)[LAYER + 1].shape[0] == 2  # the next layer is not


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_slices_negative_indices_and_attached_modules(implementation: str | None) -> None:
    model, ids = load("llama", implementation), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        each = [everything(model, layer) for layer in range(3)]
    for name in NAMES:
        with torch.no_grad(), model.trace(ids):
            several = getattr(model, name)[:]
        with torch.no_grad(), model.trace(ids):
            last = getattr(model, name)[-1]
        assert torch.equal(last, each[2][name])
        assert all(torch.equal(a, b[name]) for a, b in zip(several, each, strict=True))
        with torch.no_grad(), model.trace(ids):
            getattr(model, name)[1:] = [torch.zeros_like(one[name]) for one in each[1:]]
            zeroed = model.logits
        with torch.no_grad(), model.attach(f"{name}[1]", Zero(), name="zero").trace(ids):
            one_zeroed = model.logits
        assert not torch.equal(zeroed, model.hf_model(ids).logits), name
        assert one_zeroed.shape == zeroed.shape


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_what_does_not_fit_is_refused() -> None:
    model, ids = load("llama"), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        with pytest.raises(AssignmentError, match=r"keys\[1\]"):
            model.keys[LAYER] = torch.zeros(2, HEADS, 9, 8)  # one for each query head


def test_an_attention_of_two_patterns_has_none_of_them() -> None:
    import zoo

    model = StandardizedTransformer(zoo.shared("diffllama"))
    for name in NAMES:
        with (
            model.trace(zoo.ids(model.hf_model)),
            pytest.raises(NotInThisModelError, match="fires 2 times"),
        ):
            getattr(model, name)[0]


def through_data(value: Tensor) -> None:
    value.data[1] *= 0.5


def through_numpy(value: Tensor) -> None:
    value.detach().numpy()[1] *= 0.5


def through_dlpack(value: Tensor) -> None:
    torch.from_dlpack(value.detach())[1] *= 0.5


@pytest.mark.parametrize("edit", [through_data, through_numpy, through_dlpack])
@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "gpt_neox"])
def test_an_edit_that_leaves_no_mark_on_the_tensor_counts(
    model_type: str, implementation: str | None, edit: Any
) -> None:
    model, ids = load(model_type, implementation), prompt_ids()
    with torch.no_grad():
        plain = model.hf_model(ids).logits
    for name in NAMES:
        with torch.no_grad(), model.trace(ids):
            getattr(model, name)[LAYER][1] *= 0.5
            expected = model.logits
        with torch.no_grad(), model.trace(ids):
            edit(getattr(model, name)[LAYER])
            assert torch.equal(model.logits, expected), name
        assert not close(expected, plain, 1e-3), name
    with model.trace(ids):  # where gradients are recorded, too
        edit(model.attention_probabilities[LAYER])
        logits = model.logits
    assert not close(logits, plain, 1e-3)


def test_such_an_edit_in_a_later_step_of_a_padded_generation() -> None:
    """There, the one query comes packed by key heads."""
    model = load("llama")
    prompts = [prompt_ids(1, 8, 1)[0].tolist(), prompt_ids(1, 4, 2)[0].tolist()]

    def scores(edit: Any) -> Tensor:
        with model.generate(prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
            for step in tracer.iter[:]:
                if step == 1:
                    edit(model.attention_scores[LAYER])
                logits = model.logits
        return logits

    def in_place(value: Tensor) -> None:
        value[1] *= 0.5

    assert torch.equal(scores(through_data), scores(in_place))
    assert not torch.equal(scores(through_data), scores(lambda value: None))


@pytest.mark.parametrize("name", ["attention_scores", "attention_probabilities"])
@pytest.mark.parametrize("ask", ["register_hook", "requires_grad_"])
def test_a_gradient_asked_for_in_another_way(ask: str, name: str) -> None:
    hf = build("llama").requires_grad_(ask == "register_hook")
    model, ids = StandardizedTransformer(hf), prompt_ids()
    seen: list[Tensor] = []
    with model.trace(ids):
        value = getattr(model, name)[LAYER]
        value.register_hook(seen.append) if ask == "register_hook" else value.requires_grad_()
        model.logits.sin().sum().backward()
    got = seen[0] if ask == "register_hook" else value.grad
    hf.requires_grad_()
    with model.trace(ids):
        value = getattr(model, name)[LAYER]
        value.retain_grad()
        model.logits.sin().sum().backward()
    assert float((got - value.grad).abs().max() / value.grad.abs().max()) < 1e-5
