"""What scripts written for nnsight do, done with nnatomy, each against plain PyTorch hooks or the model's own methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotReachedError, OutOfOrderError
from nnatomy.tracing import Traceable

PROMPT = "The capital of Peru is"
OTHER = "The capital of Cuba is"
SHORT = "Kenya is in"
PAGE = Path(__file__).parent.parent / "docs" / "from_nnsight.md"


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer("demo:gpt2")


@pytest.fixture
def layers(model: StandardizedTransformer) -> nn.ModuleList:
    return model.hf_model.transformer.h


@contextmanager
def hook(module: nn.Module, function: Callable[[Any], Any]) -> Iterator[None]:
    """A plain forward hook: it is given the output, and returns another or None."""
    handle = module.register_forward_hook(lambda _, __, output: function(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seen(*modules: nn.Module) -> Iterator[list[Any]]:
    """What these modules return, in the order in which they do."""
    outputs: list[Any] = []
    handles = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def inputs(model: StandardizedTransformer, *prompts: str) -> dict[str, Tensor]:
    """Prompts of one length, as the tokenizer gives them."""
    encoded = model.tokenizer(list(prompts), return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def logits_of(model: StandardizedTransformer, *prompts: str) -> Tensor:
    return model.hf_model(**inputs(model, *prompts)).logits


def greedy(model: StandardizedTransformer, prompt: str, steps: int) -> Tensor:
    return model.hf_model.generate(**inputs(model, prompt), max_new_tokens=steps, do_sample=False)


def close(one: Tensor, other: Tensor) -> None:
    """The same to float32's precision: a batch of another size is summed in another order."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_script_of_the_page_runs(model, layers) -> None:
    script, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(script, names)

    def edit(output: Tensor) -> None:
        output[:, 0] = 0

    with hook(layers[0], edit), seen(layers[3]) as expected:
        logits = logits_of(model, PROMPT)
    assert torch.equal(names["hidden"], expected[0])
    assert torch.equal(names["logits"], logits)
    assert names["steps"] == names["tokens"][0, -3:].tolist() == greedy(model, PROMPT, 3)[0, -3:].tolist()


# One forward pass.


def test_a_block_edits_in_place_reads_below_and_keeps_the_logits(model, layers) -> None:
    with hook(layers[0], lambda output: output.mul_(0)), seen(layers[4]) as expected:
        expected_logits = logits_of(model, PROMPT)
    with model.trace(PROMPT):
        model.transformer.h[0].output[:] = 0
        hidden = model.transformer.h[4].output
        logits = model.output.logits
    assert torch.equal(hidden, expected[0])
    assert torch.equal(logits, expected_logits)
    assert not torch.equal(logits, logits_of(model, PROMPT))


def test_ordinary_operations_on_a_value_and_the_steps_between(model, layers) -> None:
    with seen(layers[-1]) as expected:
        logits_of(model, PROMPT)
    with model.trace(PROMPT):
        before = model.transformer.h[-1].output
        total = torch.sum(before)
        shifted = before + total
    assert torch.equal(before, expected[0])
    assert torch.equal(shifted, expected[0] + expected[0].sum())


def test_an_assigned_value_is_what_the_rest_of_the_pass_and_of_the_block_see(model, layers) -> None:
    noise = 0.03 * torch.randn(1, 5, model.hidden_size, generator=torch.Generator().manual_seed(1))
    with seen(layers[3].mlp) as clean:
        logits_of(model, PROMPT)
    with hook(layers[3].mlp, lambda output: output + noise):
        expected = logits_of(model, PROMPT)
    with model.trace(PROMPT):
        before = model.transformer.h[3].mlp.output.clone()
        model.transformer.h[3].mlp.output = before + noise
        after = model.transformer.h[3].mlp.output
        logits = model.logits
    assert torch.equal(before, clean[0])
    assert torch.equal(after, clean[0] + noise)
    assert torch.equal(logits, expected)


def test_part_of_a_tuple_is_replaced(model, layers) -> None:
    def without_last_position(output: Any) -> Any:
        return (output[0] * torch.tensor([1.0, 1, 1, 1, 0])[None, :, None], *output[1:])

    with hook(layers[2].attn, without_last_position):
        expected = logits_of(model, PROMPT)
    with model.trace(PROMPT):
        whole = model.transformer.h[2].attn.output
        model.transformer.h[2].attn.output = without_last_position(whole)
        logits = model.logits
    assert torch.equal(logits, expected)


def test_inputs_are_read_and_replaced(model, layers) -> None:
    arguments: list[Any] = []

    def halve(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        arguments.append((args, kwargs))
        return (0.5 * args[0], *args[1:]), kwargs

    handle = layers[1].register_forward_pre_hook(halve, with_kwargs=True)
    expected = logits_of(model, PROMPT)
    handle.remove()
    with model.trace(PROMPT):
        args, kwargs = model.transformer.h[1].inputs
        first = model.transformer.h[1].input
        model.transformer.h[1].input = 0.5 * first
        logits = model.logits
    assert torch.equal(args[0], arguments[0][0][0])
    assert first is args[0]
    assert kwargs.keys() == arguments[0][1].keys()
    assert torch.equal(logits, expected)


def test_modules_are_applied_out_of_order(model, layers) -> None:
    transformer, head = model.hf_model.transformer, model.hf_model.lm_head
    with seen(layers[2]) as hidden:
        expected_logits = logits_of(model, PROMPT)
    with model.trace(PROMPT):
        early = model.lm_head(model.transformer.ln_f(model.transformer.h[2].output))
        token = early[0, -1].argmax(-1)
        head_input = model.lm_head.input  # the pass's own call, not the one above
        logits = model.logits
    expected = head(transformer.ln_f(hidden[0]))
    assert torch.equal(early, expected)
    assert model.tokenizer.decode(token) == model.tokenizer.decode(expected[0, -1].argmax())
    assert torch.equal(head(head_input), logits)
    assert torch.equal(logits, expected_logits)


def test_a_module_is_skipped(model, layers) -> None:
    kept: list[Tensor] = []
    handle = layers[1].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with hook(layers[1], lambda _: kept[0]):
        expected = logits_of(model, PROMPT)
    handle.remove()
    with seen(layers[1].mlp) as calls, model.trace(PROMPT):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        logits = model.logits
    assert torch.equal(logits, expected)
    assert calls == []


def test_a_module_is_skipped_in_one_of_two_blocks(model, layers) -> None:
    kept: list[Tensor] = []
    handle = layers[1].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with hook(layers[1], lambda output: torch.cat([kept[0][:1], output[1:]])):
        expected = logits_of(model, PROMPT, OTHER)
    handle.remove()
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            model.transformer.h[1].skip(model.transformer.h[1].input)
            skipping = model.logits
        with tracer.invoke(OTHER):
            running = model.logits
    assert torch.equal(torch.cat([skipping, running]), expected)


def test_the_pass_ends_early(model, layers) -> None:
    with seen(*layers) as ran, model.trace(PROMPT):
        hidden = model.transformer.h[1].output
    assert len(ran) == 2
    with seen(*layers) as ran, model.trace(PROMPT, early_stop=False) as tracer:
        again = model.transformer.h[1].output
        tracer.stop()
        after = "this line runs"
    assert len(ran) == 2
    assert torch.equal(hidden, again)
    assert after == "this line runs"


def test_branches_loops_functions_and_printing(model, layers, capsys) -> None:
    def norm_of(layer: Any) -> float:
        return layer.output.norm().item()

    with seen(*layers) as expected:
        logits_of(model, PROMPT)
    largest = max(output.norm().item() for output in expected)
    with model.trace(PROMPT):
        norms = [norm_of(layer) for layer in model.transformer.h]
        answer = "grew" if norms[-1] > norms[0] else "shrank"
        print(answer)  # noqa: T201
    assert norms == [output.norm().item() for output in expected]
    assert max(norms) == largest
    assert capsys.readouterr().out == f"{answer}\n"


def test_modules_by_path(model, layers) -> None:
    with seen(layers[3].mlp.c_fc) as expected:
        logits_of(model, PROMPT)
    with model.trace(PROMPT):
        by_path = model["transformer.h.3.mlp.c_fc"].output
    assert torch.equal(by_path, expected[0])


def test_one_name_on_every_architecture(model, layers) -> None:
    """What `rename=` is for."""
    with seen(layers[2].attn, layers[2].mlp, layers[2]) as expected:
        logits_of(model, PROMPT)
    with model.trace(PROMPT):
        values = model.attentions_output[2], model.mlps_output[2], model.layers_output[2]
    assert model.layers[2].self_attn.module is layers[2].attn
    assert torch.equal(values[0], expected[0][0])
    assert torch.equal(values[1], expected[1])
    assert torch.equal(values[2], expected[2])


def test_token_ids_batches_and_calls_without_a_block(model) -> None:
    ids = inputs(model, PROMPT)["input_ids"]
    expected = logits_of(model, PROMPT)
    assert torch.equal(model(PROMPT).logits, expected)
    with model.trace(ids[0].tolist()):
        assert torch.equal(model.logits, expected)
    with model.trace([SHORT, PROMPT]):
        padded = model.logits
    close(padded[0, -1], logits_of(model, SHORT)[0, -1])
    close(padded[1], expected[0])


def test_shapes_without_computing(model, layers) -> None:
    with seen(layers[3]) as real:
        logits_of(model, PROMPT)
    with model.scan(PROMPT):
        shape = model.transformer.h[3].output.shape
        logits_shape = model.logits.shape
    assert shape == real[0].shape
    assert logits_shape == (1, 5, model.vocab_size)
    with pytest.raises(IndexError), model.scan(PROMPT):
        model.transformer.h[3].output[:, :, 5000]


def test_values_of_many_modules_at_once(model) -> None:
    modules = {path: module for path, module in model.hf_model.named_modules() if path.startswith("transformer.h.")}
    expected: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: expected.update({path: output}))
        for path, module in modules.items()
    ]
    logits_of(model, PROMPT)
    for handle in handles:
        handle.remove()
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(list(modules.values()), include_inputs=True)
    assert set(cache) == set(expected)
    for path, output in expected.items():
        if isinstance(output, Tensor):
            assert torch.equal(cache[path].output, output)
    args, _ = cache["transformer.h.3"].inputs
    assert torch.equal(args[0], expected["transformer.h.2"])


# Gradients.


def test_the_gradient_of_a_value_within(model, layers) -> None:
    kept: list[Tensor] = []
    with hook(layers[3], lambda output: kept.append(output)):
        loss = logits_of(model, PROMPT)[0, -1].max()
    (expected,) = torch.autograd.grad(loss, kept)
    with model.trace(PROMPT):
        hidden = model.transformer.h[3].output
        hidden.retain_grad()
        model.logits[0, -1].max().backward()
        inside = hidden.grad.clone()
    assert torch.equal(inside, expected)
    model.hf_model.zero_grad()


def test_a_gradient_is_edited_on_its_way(model, layers) -> None:
    kept: list[Tensor] = []

    def double(output: Tensor) -> None:
        output.register_hook(lambda grad: 2 * grad)

    with hook(layers[3], double), hook(layers[1], lambda output: kept.append(output)):
        loss = logits_of(model, PROMPT)[0, -1].max()
    (expected,) = torch.autograd.grad(loss, kept)
    with model.trace(PROMPT):
        early = model.transformer.h[1].output
        model.transformer.h[3].output.register_hook(lambda grad: 2 * grad)
        (grad,) = torch.autograd.grad(model.logits[0, -1].max(), early)
    assert torch.equal(grad, expected)


def test_backward_after_the_block(model, layers) -> None:
    kept: list[Tensor] = []
    with hook(layers[3], lambda output: kept.append(output)):
        loss = logits_of(model, PROMPT)[0, -1].max()
    (expected,) = torch.autograd.grad(loss, kept)
    with model.trace(PROMPT):
        hidden, logits = model.layers_output[3], model.logits
    (grad,) = torch.autograd.grad(logits[0, -1].max(), hidden)
    assert torch.equal(grad, expected)


def test_no_grad_in_the_block_is_the_blocks_own(model) -> None:
    with model.trace(PROMPT), torch.no_grad():
        logits = model.logits
        doubled = 2 * logits
    assert logits.requires_grad
    assert not doubled.requires_grad
    with torch.no_grad(), model.trace(PROMPT):
        assert not model.logits.requires_grad


# Generation.


def test_generated_tokens_are_the_result(model) -> None:
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, greedy(model, PROMPT, 3))
    assert model.tokenizer.decode(tokens[0]).startswith(PROMPT)


@pytest.mark.parametrize("bound", [5, None, 9])
def test_each_step_and_what_follows_the_loop(model, bound) -> None:
    expected = greedy(model, PROMPT, 5)[0, -5:].tolist()
    with model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False) as tracer:
        chosen = []
        for _ in tracer.iter[:bound]:
            chosen.append(int(model.output.logits[0, -1].argmax()))
        tokens = tracer.result
    assert chosen == expected
    assert tokens[0, -5:].tolist() == expected


def test_chosen_steps_and_leaving_the_loop(model, layers) -> None:
    with seen(layers[-1]) as expected:
        tokens = greedy(model, PROMPT, 4)
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        hidden = [model.transformer.h[-1].output for _ in tracer.iter[[0, 2]]]
    assert len(hidden) == 2
    assert torch.equal(hidden[0], expected[0])
    assert torch.equal(hidden[1], expected[2])
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        for step in tracer.iter[:]:
            last = model.transformer.h[-1].output
            if step == 1:
                break
        result = tracer.result
    assert torch.equal(last, expected[1])
    assert torch.equal(result, tokens)


def test_straight_line_steps_and_strides(model, layers) -> None:
    """What `.next()` was for."""
    with seen(layers[-1]) as expected:
        greedy(model, PROMPT, 4)
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        steps = tracer.iter[:]
        next(steps)
        first = model.transformer.h[-1].output
        next(steps)
        second = model.transformer.h[-1].output
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        hidden = [(step, model.transformer.h[-1].output) for step in tracer.iter[0:4:2]]
    assert [step for step, _ in hidden] == [0, 2]
    assert torch.equal(hidden[1][1], expected[2])


def test_an_edit_in_every_step(model, layers) -> None:
    push = 30 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(2))
    with hook(layers[2], lambda output: output + push):
        expected = greedy(model, PROMPT, 6)
    with model.generate(PROMPT, max_new_tokens=6, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            model.transformer.h[2].output = model.transformer.h[2].output + push
        tokens = tracer.result
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, greedy(model, PROMPT, 6))


def test_a_cache_keeps_every_step(model, layers) -> None:
    with seen(layers[4]) as expected:
        greedy(model, PROMPT, 3)
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        cache = tracer.cache([model.transformer.h[4]])
    calls = cache["transformer.h.4"]
    assert [call.step for call in calls] == [0, 1, 2]
    assert all(torch.equal(call.output, output) for call, output in zip(calls, expected, strict=True))


# Several prompts.


def test_blocks_of_one_pass_with_a_prompt_each(model, layers) -> None:
    with seen(layers[-1]) as expected:
        expected_logits = logits_of(model, PROMPT, OTHER)
    with seen(model.hf_model) as passes, model.trace() as tracer:
        with tracer.invoke(PROMPT):
            one = model.transformer.h[-1].output[:, -1]
        with tracer.invoke(OTHER):
            other = model.transformer.h[-1].output[:, -1]
        with tracer.invoke():
            everything = model.output.logits
    assert len(passes) == 1
    assert torch.equal(torch.cat([one, other]), expected[0][:, -1])
    assert torch.equal(everything, expected_logits)


def test_a_shorter_prompt_keeps_its_own_positions(model, layers) -> None:
    with seen(layers[3]) as expected:
        logits_of(model, SHORT)
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            hidden = model.transformer.h[3].output
        with tracer.invoke(PROMPT):
            model.transformer.h[3].output
    assert hidden.shape == (1, 3, model.hidden_size)
    close(hidden, expected[0])


def test_a_block_in_a_function_of_ones_own(model, layers) -> None:
    def block(tracer: Any, prompt: str) -> Callable[[], Tensor]:
        with tracer.invoke(prompt):
            hidden = model.transformer.h[1].output
        return lambda: hidden

    with seen(layers[1]) as expected:
        logits_of(model, PROMPT, OTHER)
    with model.trace() as tracer:
        one, other = block(tracer, PROMPT), block(tracer, OTHER)
    assert torch.equal(torch.cat([one(), other()]), expected[0])


@pytest.mark.parametrize("barrier", [False, True])
def test_a_value_of_one_prompt_goes_into_another(model, layers, barrier) -> None:
    def patch(output: Tensor) -> Tensor:
        return torch.cat([output[:1], output[:1]])

    with hook(layers[2], patch):
        expected = logits_of(model, PROMPT, OTHER)
    if barrier:
        with model.trace() as tracer:
            both = tracer.barrier(2)
            with tracer.invoke(PROMPT):
                source = model.transformer.h[2].output
                both()
            with tracer.invoke(OTHER):
                both()
                model.transformer.h[2].output = source
                patched = model.logits
    else:
        with model.trace() as tracer:
            with tracer.invoke(OTHER):
                model.transformer.h[2].output = donor  # noqa: F821  bound by the block below
                patched = model.logits
            with tracer.invoke(PROMPT):
                donor = model.transformer.h[2].output  # noqa: F841
    row = expected[1:]
    close(patched, row)
    assert not torch.allclose(patched, logits_of(model, OTHER), atol=1e-2)


def test_embeddings_of_one_prompt_in_the_generation_of_another(model) -> None:
    blank = " ".join(["The"] * 5)
    embedding = model.hf_model.transformer.wte
    first: list[Tensor] = []

    def swap(output: Tensor) -> Tensor | None:
        if output.shape[1] == 1:  # a later step
            return None
        first.append(output)
        return torch.cat([output[:1], output[:1]])

    with hook(embedding, swap):
        batch = inputs(model, PROMPT, blank)
        expected = model.hf_model.generate(**batch, max_new_tokens=3, do_sample=False)
    with model.generate(max_new_tokens=3, do_sample=False) as tracer:
        with tracer.invoke(PROMPT):
            embeddings = model.transformer.wte.output
            one = tracer.result
        with tracer.invoke(blank):
            model.transformer.wte.output = embeddings
            other = tracer.result
    assert torch.equal(torch.cat([one, other]), expected)
    assert torch.equal(one[0, -3:], other[0, -3:])
    assert not torch.equal(greedy(model, blank, 3), other)
    # The same with a value kept from an earlier trace.
    with model.trace(PROMPT):
        kept = model.transformer.wte.output
    with model.generate(blank, max_new_tokens=3, do_sample=False) as tracer:
        model.transformer.wte.output = kept
        again = tracer.result
    assert torch.equal(again, other)


# Lasting edits.


def test_a_lasting_edit_holds_in_traces_calls_and_every_step_of_a_generation(model, layers) -> None:
    push = 30 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(2))
    with hook(layers[2], lambda output: output + push):
        expected, expected_tokens = logits_of(model, PROMPT), greedy(model, PROMPT, 4)
    with model.edit() as edited:
        model.transformer.h[2].output = model.transformer.h[2].output + push
    with edited.trace(PROMPT):
        traced = model.logits
    with edited.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        tokens = tracer.result
    assert torch.equal(traced, expected)
    assert torch.equal(edited(PROMPT).logits, expected)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(model(PROMPT).logits, logits_of(model, PROMPT))
    assert torch.equal(edited.without_edits()(PROMPT).logits, logits_of(model, PROMPT))


# Any module.


def small() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(2, 3)


def test_a_module_of_ones_own() -> None:
    module, x = small()
    view = Traceable(module)
    with view.trace(x) as tracer:
        view[0].output[:] = 0
        out = tracer.result
    assert torch.equal(out, module[2](torch.tanh(torch.zeros(2, 6))))
    assert not torch.equal(out, module(x))


def test_two_inputs_in_blocks_of_their_own_through_any_module() -> None:
    module, x = small()
    view = Traceable(module)
    with view.trace() as tracer:
        with tracer.invoke(x):
            view[1].output = 0 * view[1].output
            one = tracer.result
        with tracer.invoke(x + 1):
            other = tracer.result
    assert torch.equal(one, module[2](torch.zeros(2, 6)))
    assert torch.equal(other, module(torch.cat([x, x + 1]))[2:])


def test_each_call_of_a_module_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.step(x))

    module, x = Twice(), small()[1]
    view = Traceable(module)
    with seen(module.step) as expected:
        module(x)
    with view.trace(x):
        outputs = [view.step.calls[k].output for k in (0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


# Mistakes.


def test_mistakes_are_told_where_they_are_made(model) -> None:
    with model.trace(PROMPT):
        model.transformer.h[3].output
        with pytest.raises(OutOfOrderError, match=r"h\.1\.output was asked for at .*test_migration\.py:\d+"):
            model.transformer.h[1].output
    with pytest.raises(NotReachedError, match="ended without coming to it"), model.trace(PROMPT):
        model.transformer.h[3].attn.attn_dropout.output  # SDPA leaves it out
