"""A plan on the model it comes from, on others, and elsewhere: what fits, and how far off the expected numbers are."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, prompt_ids, shared
from remote_server import served

from nnatomy import StandardizedTransformer
from nnatomy.errors import PlanError
from nnatomy.methods import ablate_direction
from nnatomy.plans import Plan, load_plan
from nnatomy.plans.identity import weights_hash

V = torch.randn(32, generator=torch.Generator().manual_seed(0))
IDS = prompt_ids(1, 7)[0]


@cache
def model_of(model_type: str) -> Any:
    return StandardizedTransformer(shared(model_type))


def add(model: Any) -> None:
    model.layers_output[1] = model.layers_output[1] + 4.0 * V


@cache
def plan_of(model_type: str) -> Plan:
    model = model_of(model_type)
    plan: Plan = model.record(partial(add, model), IDS)
    return plan


def test_the_numbers_are_those_of_plain_hooks() -> None:
    """Norms and logits by hooks of torch's, with no trace."""
    hf_model, plan = shared("llama"), plan_of("llama")
    seen = []

    def hook(_: Any, __: Any, output: Any) -> Any:
        seen.append(output)
        return output + 4.0 * V

    handle = hf_model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        logits = hf_model(IDS[None]).logits[0, -1]
    handle.remove()
    numbers = plan.prompts[0]["numbers"]
    assert plan.prompts[0]["ids"] == IDS.tolist()
    assert numbers["layers_output[1]: norm before"] == pytest.approx(float(seen[0].norm()), rel=1e-5)
    assert numbers["layers_output[1]: norm of the change"] == pytest.approx(float((4 * V).norm() * 7**0.5), rel=1e-5)
    assert numbers["logits: norm"] == pytest.approx(float(logits.norm()), rel=1e-5)
    top = [name for name in numbers if name.startswith("logits: of token")]
    assert top == [f"logits: of token {one}" for one in logits.topk(5).indices.tolist()]
    assert [numbers[name] for name in top] == pytest.approx(logits.topk(5).values.tolist(), rel=1e-5)


def test_on_the_same_weights() -> None:
    found = plan_of("llama").check(StandardizedTransformer(copy.deepcopy(shared("llama"))))
    assert found.ok
    assert found.same_weights
    assert found.differs == ()
    assert found.worst is not None
    assert found.worst.off == 0
    assert str(found).startswith(
        "the same model; all numbers are equal, bit for bit\n  prompt 0  layers_output[1]: norm before"
    )


def test_other_weights_are_told() -> None:
    changed = copy.deepcopy(shared("llama"))
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight *= 1.5
    other = StandardizedTransformer(changed)
    found = plan_of("llama").check(other)
    assert not found.same_weights
    assert not found.ok
    assert found.differs == ("weights",)
    with pytest.warns(
        UserWarning, match=r"this is another model \(other weights\); numbers are off by \d\.\de-0\d at most"
    ) as warned:
        edited = plan_of("llama").apply(other)
    assert warned[0].filename == __file__
    assert torch.equal(edited(IDS).logits, other.edit(partial(add, other))(IDS).logits)


def test_numbers_that_are_off_on_the_same_weights_fail() -> None:
    plan = copy.deepcopy(plan_of("llama"))
    plan.prompts[1]["numbers"]["logits: norm"] *= 1.01
    with pytest.raises(
        PlanError, match=r"(?s)On the weights that it was recorded on, the plan gives other numbers\..*logits: norm"
    ):
        plan.apply(model_of("llama"))
    plan.apply(model_of("llama"), check=False)
    plan.prompts[1]["numbers"]["logits: norm"] *= (1 + 1e-5) / 1.01
    plan.apply(model_of("llama"))


@pytest.mark.parametrize("other", ["gpt2", "gemma2", "mixtral", "gpt_neox"])
def test_on_another_architecture(other: str) -> None:
    model = model_of(other)
    with pytest.warns(UserWarning, match=r"this is another model \(other class, type, weights\); numbers are off"):
        edited = plan_of("llama").apply(model)
    assert torch.equal(edited(IDS).logits, model.edit(partial(add, model))(IDS).logits)


def test_what_does_not_fit_is_told_all_at_once() -> None:
    model = model_of("gpt2")

    def block() -> None:
        model.layers_mid[1] = model.layers_mid[1] + V
        model.layers_output[2] = model.layers_output[2] + V

    plan = model.record(block, IDS)
    small = StandardizedTransformer(build("gpt_neox", num_hidden_layers=2))
    with pytest.raises(PlanError) as error:
        plan.apply(small)
    text = str(error.value)
    assert text.startswith("The plan does not fit this model:\n- layers_mid[1]: this layer has none")
    assert "- layers_output[2]: the model has 2 layers, 0 to 1." in text
    wide = StandardizedTransformer(build("gpt2", n_embd=48))
    with pytest.raises(PlanError, match=r"layers_output\[2\]: hidden is 48 here, and 32 where it was recorded"):
        plan.apply(wide)
    with pytest.raises(PlanError, match="A plan is applied to a StandardizedTransformer; got a GPT2LMHeadModel"):
        plan.apply(shared("gpt2"))


def test_sizes_that_show_when_it_is_run() -> None:
    model = model_of("llama")

    def block() -> None:
        model.neurons[1] = model.neurons[1] * 2

    plan = model.record(block, IDS)
    with pytest.raises(PlanError, match=r"neurons\[1\]: neuron is 40 here, and 48 where it was recorded"):
        plan.apply(StandardizedTransformer(build("llama", intermediate_size=40)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_another_dtype(dtype: torch.dtype) -> None:
    """Constants in the model's dtype are in the other model's; so is what is put."""
    model = model_of("llama")
    other = StandardizedTransformer(build("llama").to(dtype))
    unit = V / V.norm()

    def block(model: Any = model) -> None:
        add(model)
        ablate_direction(model, unit, layers=[2])

    plan = model.record(block, IDS)
    with pytest.warns(UserWarning, match="other dtype, weights.; numbers are off"):
        edited = plan.apply(other)

    def wanted() -> None:
        other.layers_output[1] = other.layers_output[1] + 4.0 * V.to(dtype)
        ablate_direction(other, unit, layers=[2])

    found, its = (one(IDS).logits for one in (edited, other.edit(wanted)))
    assert found.dtype == dtype
    assert torch.allclose(found, its, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
    back = other.record(wanted, IDS)
    with pytest.warns(UserWarning, match="other dtype, weights"):
        again = back.apply(model)
    assert torch.allclose(again(IDS).logits, model.edit(block)(IDS).logits, atol=0.05)


def test_constants_are_in_the_models_dtype() -> None:
    """As the block itself would have them: bit for bit."""
    other = StandardizedTransformer(build("llama").to(torch.bfloat16))
    with torch.no_grad(), plan_of("llama").apply(other, check=False).trace(IDS):
        found = other.layers_output[1]
    with torch.no_grad(), other.trace(IDS):
        wanted = other.layers_output[1] + 4.0 * V.to(torch.bfloat16)
    assert torch.equal(found, wanted)


def test_another_tokenizer_reads_the_text() -> None:
    gpt2, llama = StandardizedTransformer("demo:gpt2"), StandardizedTransformer("demo:llama")

    def block() -> None:
        gpt2.layers_output[2] = gpt2.layers_output[2] * 1.5

    plan = gpt2.record(block, "The capital of France is")
    llama.tokenizer = copy.deepcopy(llama.tokenizer)
    llama.tokenizer.add_tokens(["<new>"])
    found = plan.check(llama)
    assert "tokenizer" in found.differs
    assert {one.prompt for one in found.numbers} == {0}  # the other prompt is of token ids alone


def test_scan_invoke_and_a_call(tmp_path: Path) -> None:
    model = model_of("llama")
    edited = plan_of("llama").apply(model)
    with edited.scan(IDS):
        assert model.layers_output[2].shape == (1, 7, 32)
    lists = [prompt_ids(1, seq, seed)[0].tolist() for seq, seed in ((4, 1), (9, 2))]
    with torch.no_grad(), edited.trace() as tracer:
        for one in lists:
            tracer.invoke(one, lambda: None)
        with tracer.invoke():
            together = model.logits
    for row, one in zip(together, lists, strict=True):
        with torch.no_grad():
            assert torch.allclose(row[-len(one) :], edited(one).logits[0], atol=1e-4)
    assert repr(edited.edits[0]) == "<block 0 of a plan: layers_output[1] = layers_output[1] + (V * 4)>"
    assert torch.equal(edited.without_edits()(IDS).logits, model(IDS).logits)


def test_at_a_server(tmp_path: Path) -> None:
    """The same plan on the same weights elsewhere, and recorded there: bit for bit, in traces and generations."""
    torch.set_num_threads(1)
    local = StandardizedTransformer("demo:llama")
    direction = torch.randn(local.hidden_size, generator=torch.Generator().manual_seed(0))

    def block(model: Any) -> None:
        model.layers_output[2][:, -1] += 3 * direction
        p = model.attention_probabilities[3]
        model.attention_probabilities[3] = p.mean(1, keepdim=True).expand_as(p)
        ablate_direction(model, direction, layers=[4])
        model.steer(5, direction, token_positions=-1)

    local.record(partial(block, local), "Japan is in").save(tmp_path)
    plan = load_plan(tmp_path)
    with served("demo:llama") as server:
        remote: Any = StandardizedTransformer("demo:llama", server=server.address)
        assert plan.about["weights"] == weights_hash(local.hf_model) == remote._told["hash"]
        check = plan.check(remote)
        assert check.differs == ()
        assert check.worst is not None
        assert check.worst.off == 0
        here, there = plan.apply(local), plan.apply(remote)
        for prompts in ("The capital of France is", ["Japan is in", "The capital of France is"]):
            with torch.no_grad(), here.trace(prompts):
                wanted = local.logits
            with torch.no_grad(), there.trace(prompts):
                found = remote.logits
            assert torch.equal(found.local(), wanted)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(
            there.generate("Japan is in", **options).run().cpu(), here.generate("Japan is in", **options).run()
        )
        its = remote.record(partial(block, remote), "Japan is in")
        assert its.check(local).worst.off == 0
        remote.close()
