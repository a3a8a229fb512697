"""What is true for one prompt alone, drawn, or not seen is refused, with the line and the reason."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from architectures import prompt_ids, shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, PlanError, UsageError

V = torch.randn(32, generator=torch.Generator().manual_seed(0))
IDS = prompt_ids(1, 7)[0]


@cache
def model_of(model_type: str) -> Any:
    return StandardizedTransformer(shared(model_type))


def item(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h / h.norm().item()


def branch(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = 2 * h if h.sum() > 0 else 3 * h


def as_list(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h * h[0, 0, :1].tolist()[0]


def as_array(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h + torch.as_tensor(h.numpy()[0, 0])


def found_places(model: Any) -> None:
    h = model.layers_output[1]
    places = (h[0, :, 0] > 0).nonzero()
    h[:, places[:, 0]] = 0


def masked_read(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h + h[h > 0].mean()


def length(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h * torch.arange(h.shape[1])[:, None]


def mask_of_the_prompt(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h * (torch.arange(7) % 2)[:, None]


def mean_by_hand(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h.sum(1, keepdim=True).expand_as(h) * (1 / h.shape[1])


def from_elsewhere(model: Any) -> None:
    """A value read by a module's own name, that is not seen."""
    h = model.layers[1].mlp.module
    inner = model[_path(model, h)].output
    model.layers_output[2] = model.layers_output[2] + inner


def another_length_does_more(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = 2 * h if h.shape[1] > 8 else h + V


def at_most_six(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h * min(h.shape[1], 6)


def drawn(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h + torch.randn(32)


def drawn_like(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = h + torch.rand_like(h)


def dropped(model: Any) -> None:
    h = model.layers_output[1]
    model.layers_output[1] = torch.nn.functional.dropout(h)


def _path(model: Any, module: Any) -> str:
    return next(path for path, one in model.hf_model.named_modules() if one is module)


FOR_ONE_PROMPT = {
    item: "a number or a yes and no (item, bool, equal) is decided by what the model has computed",
    branch: "a number or a yes and no (item, bool, equal) is decided by what the model has computed",
    as_list: "tolist takes what the model has computed of this prompt out of its tensors",
    as_array: "numpy takes what the model has computed of this prompt out of its tensors",
    found_places: "a size (of nonzero) is decided by what the model has computed",
    masked_read: "a size (of index) is decided by what the model has computed",
    length: "is made of this prompt's length or values",
    mask_of_the_prompt: "on another prompt, of 10 tokens, the block fails (The size of tensor a (10) must match",
    mean_by_hand: "mul.Tensor is given 0.14285",
    from_elsewhere: "is made of this prompt's length or values",
    another_length_does_more: "the block does",
    at_most_six: "mul.Tensor is given 6 here, and 4 on 4 tokens",
}


def code_of(block: Any) -> re.Pattern[str]:
    """A line in that function."""
    first = block.__code__.co_firstlineno
    lines = "|".join(str(first + i) for i in range(1, 6))
    return re.compile(rf"{re.escape(block.__code__.co_filename)}:({lines})\b")


@pytest.mark.parametrize("block", FOR_ONE_PROMPT, ids=lambda block: block.__name__)
def test_for_one_prompt(block: Any) -> None:
    model = model_of("llama")
    with pytest.raises(PlanError) as error:
        model.record(lambda: block(model), IDS)
    assert FOR_ONE_PROMPT[block] in str(error.value)
    assert code_of(block).search(str(error.value))
    assert "record(..., any_prompt=False)" in str(error.value)


@pytest.mark.parametrize("block", FOR_ONE_PROMPT, ids=lambda block: block.__name__)
def test_a_plan_for_one_prompt(block: Any) -> None:
    """It does there what the block does, and is refused on any other."""
    model = model_of("llama")
    plan = model.record(lambda: block(model), IDS, any_prompt=False)
    assert plan.only["ids"] == IDS.tolist()
    assert str(plan).splitlines()[1].startswith("for one prompt alone, of 7 tokens: ")
    edited = plan.apply(model)
    with torch.no_grad(), model.trace(IDS):
        block(model)
        wanted = model.logits
    with torch.no_grad(), edited.trace([IDS.tolist()] * 2):
        found = model.logits
    assert torch.allclose(found, wanted.expand_as(found), atol=1e-4)
    with torch.no_grad():
        assert torch.equal(edited(IDS).logits, wanted)
        with pytest.raises(PlanError, match=r"This plan is for the one prompt that it was recorded on, of tokens \["):
            edited(prompt_ids(1, 7, 5)[0])
    assert edited.generate(IDS, max_new_tokens=2, do_sample=False).run().shape[1] == 9


@pytest.mark.parametrize("block", [drawn, drawn_like, dropped], ids=lambda block: block.__name__)
def test_random_numbers(block: Any) -> None:
    model = model_of("llama")
    with pytest.raises(
        PlanError, match="a random number is drawn in the block, which would be another each time: draw it before"
    ):
        model.record(lambda: block(model), IDS)


def test_random_numbers_of_before_are_constants() -> None:
    model, noise = model_of("llama"), torch.randn(32)

    def block() -> None:
        model.layers_output[1] = model.layers_output[1] + noise

    assert [*model.record(block, IDS).constants] == ["noise"]


def test_what_is_only_looked_at_is_no_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")

    def block() -> None:
        h = model.layers_output[1]
        print(h, f"{h.norm():.2f}")  # noqa: T201
        torch.randn(3) + h.sum()
        model.layers_output[1] = h + V

    plan = model.record(block, IDS)
    assert len(plan.nodes) == 4
    assert "tensor(" in capsys.readouterr().out


def stale(model: Any) -> None:
    h = model.layers_output[0]
    model.layers_output[1]
    h[:, -1] = 0


def after_assigning(model: Any) -> None:
    h = model.layers_output[0] + 1
    model.layers_output[0] = h
    h += 1


def nested(model: Any) -> None:
    with model.trace(IDS):
        h = model.layers_output[1]
    model.layers_output[1] = model.layers_output[1] + h[:, -1:]


def a_hidden_view(model: Any) -> None:
    h = model.layers_output[1]
    hidden = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(h))
    model.layers_output[1] = h + hidden


OTHERS = {
    stale: "a value is changed in place after the block has gone on to another",
    after_assigning: "a tensor is changed in place after it has been assigned",
    nested: "layers_output is read in a trace of its own within the block: trace before",
    a_hidden_view: "shares memory with a value of the model's in a way that is not seen",
}


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.__name__)
def test_what_is_not_seen(block: Any) -> None:
    model = model_of("llama")
    with pytest.raises(PlanError) as error:
        model.record(lambda: block(model), IDS)
    assert OTHERS[block] in str(error.value)
    assert code_of(block).search(str(error.value))


def test_a_function_that_no_plan_may_have() -> None:
    model = model_of("llama")

    def block() -> None:
        h = model.layers_output[1]
        model.layers_output[1] = h + torch.bincount(h[0, :, 0].abs().long()).float().mean()

    with pytest.raises(PlanError, match=r"test_refused.py:\d+: a (plan cannot have aten.bincount|size \(of bincount)"):
        model.record(block, IDS)


def test_several_names_at_once() -> None:
    model = model_of("llama")

    def block() -> None:
        model.read("layers_output", "mlps_output")
        model.logits = model.logits * 2

    with pytest.raises(PlanError, match="several names are read at once: read one after the other"):
        model.record(block, IDS)


def test_a_slice_is_read() -> None:
    model = model_of("llama")

    def block() -> None:
        early = model.layers_output[:2]
        model.layers_output[2] = model.layers_output[2] + sum(early)

    edited = model.record(block, IDS).apply(model)
    assert torch.equal(edited(IDS).logits, model.edit(block)(IDS).logits)


def test_nothing_is_changed() -> None:
    model = model_of("llama")
    with pytest.raises(PlanError, match="The block changes nothing"):
        model.record(lambda: model.layers_output[1] + 1, IDS)


def test_the_blocks_own_errors_arrive_as_they_are() -> None:
    model = model_of("llama")
    with pytest.raises(ZeroDivisionError):
        model.record(lambda: 1 / 0, IDS)


def test_prompts_and_views() -> None:
    model = model_of("llama")
    block = lambda: model.skip_layer(1)  # noqa: E731
    with pytest.raises(InputError, match="takes one prompt"):
        model.record(block, prompt_ids(2, 5))
    with pytest.raises(UsageError, match="it has no edits"):
        model.record(model)
    with pytest.raises(UsageError, match="a view of another model"):
        model.record(model_of("gpt2").edit(block))
    with pytest.raises(PlanError, match="linear is an attached module: its code is no data"):
        model.record(model.attach("layers_output[1]", torch.nn.Linear(32, 32)), IDS)
    with model.trace(IDS), pytest.raises(UsageError, match="outside of traces"):
        model.record(block)


def test_another_step_does_something_else() -> None:
    model, seen = model_of("llama"), []

    def block() -> None:
        h = model.layers_output[1]
        seen.append(h.shape[1])
        model.layers_output[1] = h * 2 if len(seen) % 6 else h + V

    with pytest.raises(PlanError, match="The block does something else in step 3 of a generation"):
        model.record(block, IDS)


def test_nothing_is_left(recwarn: pytest.WarningsRecorder) -> None:
    """No mode, hook, trace or watcher outlives a recording, also one that fails."""
    from nnatomy.standardized.watched import watcher

    model = model_of("llama")
    for block in (item, stale, drawn):
        with pytest.raises(PlanError):
            model.record(lambda block=block: block(model), IDS)
    assert watcher.get() is None
    assert not model._blocks.is_open_here
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    assert not any(one._forward_hooks for one in model.hf_model.modules())
