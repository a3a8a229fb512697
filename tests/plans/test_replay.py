"""A plan does what its block does: on other prompts, in batches, while generating, after a file, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import prompt_ids, shared

from nnatomy import StandardizedTransformer
from nnatomy.methods import SteeringVector, ablate_direction
from nnatomy.plans import Plan, load_plan

#: Learned positions, rotary, norms behind the parts, experts, a parallel block, scaled logits and streams, sinks.
TYPES = ("gpt2", "llama", "gemma2", "mixtral", "gpt_neox", "granite", "gpt_oss")
V = torch.randn(32, generator=torch.Generator().manual_seed(0))


@cache
def model_of(model_type: str) -> Any:
    changes = {"use_parallel_residual": True} if model_type == "gpt_neox" else {}
    assert not changes or shared(model_type).config.use_parallel_residual
    return StandardizedTransformer(shared(model_type))


def add(model: Any) -> None:
    model.layers_output[1] = model.layers_output[1] + 4.0 * V


def in_place_at_the_last(model: Any) -> None:
    model.layers_output[0][:, -1] += 3 * V
    h = model.layers_output[1]
    h[:, -1].mul_(0.5)


def by_values(model: Any) -> None:
    """Of each prompt's own values: their mean, a threshold, a product with the values of an earlier layer."""
    early = model.layers_output[0]
    mlp = model.mlps_output[1]
    model.mlps_output[1] = torch.where(mlp > 0, mlp, 0.1 * early.mean(1, keepdim=True))
    late = model.layers_output[-1]
    model.layers_output[-1] = late - (late @ V)[..., None] * V / (V @ V) + late[:, -1:]


def patterns(model: Any) -> None:
    p = model.attention_probabilities[1]
    model.attention_probabilities[1] = p.mean(1, keepdim=True).expand_as(p)
    heads = model.heads_output[2]
    new = heads.clone()
    new[..., 1, :] = 0
    model.heads_output[2] = new.reshape(*heads.shape)


def sizes(model: Any) -> None:
    """Sizes of the prompt among the arguments, with what is made of them."""
    h = model.layers_output[1]
    batch, seq, hidden = h.shape
    flat = h.reshape(batch * seq, hidden)
    model.layers_output[1] = (flat * flat.norm(dim=-1, keepdim=True).clamp(max=2.0)).view(batch, seq, hidden)
    x = model.layers_output[2]
    model.layers_output[2] = torch.cat([x[:, : seq - 1], 2 * x[:, seq - 1 :]], 1)


def of_the_whole(model: Any) -> None:
    model.token_embeddings = model.token_embeddings * 1.5
    model.logits = model.logits.masked_fill(model.logits < -2, float("-inf"))


def skip(model: Any) -> None:
    model.skip_layer(1)


def skip_with(model: Any) -> None:
    h = model.layers_input[1]
    model.skip_layers(1, 1, 0.5 * h + V)


def steer(model: Any) -> None:
    model.steer([0, 2], V, factor=2.0, token_positions=-1)


def steer_all(model: Any) -> None:
    model.steer(1, V, factor=2.0, token_positions=slice(1, None))


def vector(model: Any, **kwargs: Any) -> None:
    SteeringVector({0: V, 2: 0.5 * V}, "layers_output", "any", "any").apply(model, **kwargs)


def ablate(model: Any) -> None:
    ablate_direction(model, V)


def unembedded(model: Any) -> None:
    """Weights of the model's take part."""
    h = model.layers_output[-1]
    model.layers_output[-1] = h + model.embed_tokens.module.weight[5]


def head(model: Any) -> None:
    """The exact head, in the midst of the model; a module's own call; a module of the user's."""
    h = model.layers_output[1]
    said = model.project_on_vocab(h)[..., :32] + model.ln_final.module(h)
    model.layers_output[1] = h + 0.1 * said.softmax(-1) + SAE(h)[:, ::2].mean(1, keepdim=True)


torch.manual_seed(0)
SAE = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.ReLU(), torch.nn.Linear(40, 32))
BLOCKS: dict[str, Callable[[Any], None]] = {
    one.__name__: one
    for one in (
        *(add, in_place_at_the_last, by_values, patterns, sizes, of_the_whole, skip, skip_with, steer, steer_all),
        *(ablate, unembedded, head),
    )
} | {
    "vector": vector,
    "vector_first": partial(vector, positions=[0, -1]),
    "vector_late": partial(vector, from_step=2),
    "vector_behind": partial(vector, positions=slice(2, None), factor=-1.0),
}
#: Every block on two models; some on all.
CASES = [(kind, name) for kind in ("gpt2", "gemma2") for name in BLOCKS]
CASES += [
    (kind, name) for kind in TYPES for name in ("by_values", "patterns", "vector") if kind not in ("gpt2", "gemma2")
]
NOT_THERE: set[tuple[str, str]] = set()


def logits(model: Any, prompts: Any) -> torch.Tensor:
    with torch.no_grad(), model.trace(prompts):
        found = model.logits
    return found


def steps(model: Any, prompts: Any, count: int = 5) -> list[torch.Tensor]:
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
    found = []
    with torch.no_grad(), model.generate(prompts, **options) as tracer:
        for _ in tracer.iter[:]:
            found.append(model.logits[:, -1])
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_it_does_what_the_block_does(model_type: str, name: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    block = partial(BLOCKS[name], model)
    plan = model.record(block, prompt_ids(1, 7)[0])
    plan.save(tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert str(loaded) == str(plan)
    edited, wanted = loaded.apply(model), model.edit(block)
    lists = [prompt_ids(1, seq, seed)[0].tolist() for seq, seed in ((4, 1), (9, 2), (13, 3))]
    alone = [logits(wanted, one) for one in lists]
    assert all(same(logits(edited, one), its) for one, its in zip(lists, alone, strict=True))
    if name != "vector_late":
        assert all(
            (logits(model, one) - its).nan_to_num(0, 0, 0).abs().max() > 1e-3
            for one, its in zip(lists, alone, strict=True)
        )
    batch = logits(edited, lists)  # padded: each prompt as if alone
    for row, its in zip(batch, alone, strict=True):
        assert torch.allclose(row[-its.shape[1] :].nan_to_num(7), its[0].nan_to_num(7), atol=2e-4, rtol=1e-4)
    for one, its in zip(steps(edited, lists[1]), steps(wanted, lists[1]), strict=True):
        assert same(one, its)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_while_a_batch_is_generated(model_type: str) -> None:
    """Each prompt's steps are those it has alone, with the cache and without."""
    model = model_of(model_type)
    plan = model.record(partial(in_place_at_the_last, model), prompt_ids(1, 7)[0])
    edited, wanted = plan.apply(model), model.edit(partial(in_place_at_the_last, model))
    lists = [prompt_ids(1, seq, seed)[0].tolist() for seq, seed in ((4, 1), (9, 2))]
    together = steps(edited, lists, 3)
    for row, one in enumerate(lists):
        for step, its in enumerate(steps(wanted, one, 3)):
            assert torch.allclose(together[step][row], its[0], atol=2e-4, rtol=1e-4)


def check_each_as_alone(model: Any, plan: Plan, block: Any) -> None:
    """A plan on two prompts in a generation, against the block on each by itself."""
    lists = [prompt_ids(1, seq, seed)[0].tolist() for seq, seed in ((4, 1), (9, 2))]
    together = steps(plan.apply(model), lists, 3)
    for row, one in enumerate(lists):
        for step, its in enumerate(steps(model.edit(block), one, 3)):
            assert torch.allclose(together[step][row], its[0], atol=2e-4, rtol=1e-4)


def test_logits_while_a_batch_is_generated() -> None:
    """They are of the last position alone, which is each prompt's."""
    model = model_of("llama")

    def block() -> None:
        logits = model.logits
        model.logits = logits - logits[:, -1:].max() * (logits == logits.max(-1, keepdim=True).values)

    plan = model.record(block, prompt_ids(1, 7)[0])
    check_each_as_alone(model, plan, block)


def test_patterns_of_a_padded_batch_in_a_generation() -> None:
    """Keys that are padding are no prompt's own."""
    model = model_of("llama")

    def block() -> None:
        p = model.attention_probabilities[1]
        model.attention_probabilities[1] = torch.zeros_like(p) + 1 / (p + 1).sum(-1, keepdim=True)

    plan = model.record(block, prompt_ids(1, 7)[0])
    check_each_as_alone(model, plan, block)


def test_rows_of_a_prompt_are_of_each_prompt() -> None:
    """A plan means what its block does to each prompt alone: `h[0, -1]` is each prompt's."""
    model = model_of("llama")

    def block() -> None:
        model.layers_output[1][0, -1] += V

    plan = model.record(block, prompt_ids(1, 7)[0])
    assert not plan.blocks[0].together
    batch = prompt_ids(3, 6, 4)
    found = logits(plan.apply(model), batch.tolist())
    for row, ids in zip(found, batch.tolist(), strict=True):
        assert torch.allclose(row, logits(model.edit(block), ids)[0], atol=1e-4)
    assert not torch.allclose(logits(model.edit(block), batch.tolist())[1], found[1], atol=1e-3)


def test_a_batch_at_once() -> None:
    """What a block does to a batch of one length it does at once, and bit for bit."""
    model = model_of("llama")
    plan = model.record(partial(add, model), prompt_ids(1, 7)[0])
    assert plan.blocks[0].together
    batch = prompt_ids(3, 6, 4).tolist()
    assert same(logits(plan.apply(model), batch), logits(model.edit(partial(add, model)), batch))


def test_padding_on_the_right() -> None:
    model = model_of("llama")
    plan = model.record(partial(in_place_at_the_last, model), prompt_ids(1, 7)[0])
    lists = [prompt_ids(1, seq, seed)[0].tolist() for seq, seed in ((4, 1), (9, 2))]
    edited = plan.apply(model)
    with torch.no_grad(), edited.trace(lists, padding_side="right"):
        found = model.logits
    alone = logits(model.edit(partial(in_place_at_the_last, model)), lists[0])
    assert torch.allclose(found[0, :4], alone[0], atol=1e-4)


def test_what_each_step_does() -> None:
    model = model_of("gpt2")
    plan = model.record(partial(BLOCKS["vector_late"], model), prompt_ids(1, 7)[0])
    assert [(part.first, bool(part.nodes)) for part in plan.blocks[0].parts] == [(0, False), (2, True)]
    far = model.record(partial(vector, model, from_step=7), prompt_ids(1, 7)[0])
    assert [(part.first, bool(part.nodes)) for part in far.blocks[0].parts] == [(0, False), (7, True)]


def test_a_column_that_later_steps_do_not_have() -> None:
    """`h[:, 3]` is in the first step alone; the block itself fails in later ones, and the plan says so."""
    model = model_of("gpt2")

    def block() -> None:
        model.layers_output[1][:, 3] = 0

    plan = model.record(block, prompt_ids(1, 7)[0])
    assert [(part.first, bool(part.nodes)) for part in plan.blocks[0].parts] == [(0, True), (1, False)]
    assert "the block itself fails here" in str(plan)
    edited = plan.apply(model)
    with torch.no_grad(), model.generate(prompt_ids(1, 7)[0], max_new_tokens=3, do_sample=False) as tracer:
        block()
        wanted = tracer.result
    assert torch.equal(edited.generate(prompt_ids(1, 7)[0], max_new_tokens=3, do_sample=False).run(), wanted)
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "use_cache": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found, wanted = (one.generate(prompt_ids(1, 7)[0], **options).run().logits for one in (edited, model.edit(block)))
    assert all(torch.equal(one, its) for one, its in zip(found, wanted, strict=True))  # there every step has the column


def test_edits_and_views() -> None:
    """Of an edited view: each edit on what those before it did, also one that is a plan."""
    model, ids = model_of("llama"), prompt_ids(1, 7)[0]
    first = model.record(partial(add, model), ids)
    edited = first.apply(model).edit(partial(by_values, model)).edit(partial(in_place_at_the_last, model))
    plan = model.record(edited, ids)
    assert len(plan.blocks) == 3
    assert same(logits(plan.apply(model), ids), logits(edited, ids))
    other = edited.without_edits().edit(partial(add, model)).record(partial(by_values, model), ids)
    wanted = model.edit(partial(add, model)).edit(partial(by_values, model))
    assert same(logits(other.apply(model), ids), logits(wanted, ids))


def test_gradients_go_through() -> None:
    model, ids = model_of("llama"), prompt_ids(2, 7).tolist()
    ids[0] = ids[0][:4]
    edited = model.record(partial(in_place_at_the_last, model), prompt_ids(1, 7)[0]).apply(model)
    with edited.trace(ids):
        h = model.layers_output[0]
        h.retain_grad()
        model.logits[:, -1].max().backward()
    assert h.grad.abs().sum() > 0


def test_of_the_source() -> None:
    model = model_of("llama")
    with model.record(prompt_ids(1, 7)[0]) as plan:
        h = model.layers_output[1]
        model.layers_output[1] = h + 4.0 * V
    assert isinstance(plan, Plan)
    assert same(logits(plan.apply(model), [3, 4, 5]), logits(model.edit(partial(add, model)), [3, 4, 5]))


def test_the_text_reads_like_the_block() -> None:
    model = StandardizedTransformer("demo:gpt2")
    direction = torch.ones(model.hidden_size)

    def block() -> None:
        model.layers_output[2] = model.layers_output[2] + 4.0 * direction
        model.layers_output[3][:, -1] *= 2
        model.mlps_output[4] = torch.zeros_like(model.mlps_output[4])
        model.steer(5, direction, token_positions=-1)

    plan = model.record(block, "The capital of France is")
    assert str(plan) == (
        "plan of demo:gpt2 (GPT2LMHeadModel, float32)\n"
        "in every step:\n"
        "    layers_output[2] = layers_output[2] + (direction * 4)\n"
        "    layers_output[3][:, -1] *= 2\n"
        "    mlps_output[4] = zeros_like(mlps_output[4])\n"
        "    x0 = clone(layers_output[5])\n"
        "    x0[...] = where(unsqueeze(positions(-1), 2), x0 + (direction * 1), x0)\n"
        "    layers_output[5] = x0\n"
        "direction: tensor of (96,), float32, norm 9.798\n"
        "expected on 'The capital of France is': 14 numbers\n"
        "expected on 8 tokens: 14 numbers"
    )
    assert repr(plan) == "<plan of demo:gpt2: layers_output[2] = layers_output[2] + (direction * 4)>"
