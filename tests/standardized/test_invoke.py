"""Blocks with prompts of their own: each block's values are those of its prompts alone."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, prompt_ids, shared
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import given_cache
from nnatomy.errors import InputError, NotInThisModelError, OutOfOrderError

LONG, SHORT = prompt_ids(1, 7)[0].tolist(), prompt_ids(1, 3, seed=1)[0].tolist()


def close(one: Tensor, other: Tensor) -> bool:
    assert one.shape == other.shape
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1))


def everything(model: StandardizedTransformer) -> list[Tensor]:
    """Every standard name on every layer, in the order of the forward pass where that is known."""
    values = [model.input_ids, model.attention_mask, model.token_embeddings]
    for layer in range(model.num_layers):
        values.append(model.layers_input[layer])
        values.append(model.attentions_input[layer])
        values.append(model.attention_probabilities[layer])
        values.append(model.attentions_output[layer])
        try:
            values.append(model.mlps_output[layer])
        except (NotInThisModelError, OutOfOrderError):
            pass
        values.append(model.layers_output[layer])
    return [*values, model.logits, model.next_token_probs]


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_padding_and_the_other_prompts_never_show(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(LONG):
                long = everything(model)
            with tracer.invoke(SHORT):
                short = everything(model)
            with tracer.invoke([SHORT, SHORT]):
                pair = model.layers_output[:], model.logits
        for prompt, values in ((LONG, long), (SHORT, short)):
            with model.trace(prompt):
                alone = everything(model)
            assert len(values) == len(alone)
            assert all(close(*both) for both in zip(values, alone, strict=True))
        with model.trace([SHORT, SHORT]):
            alone_pair = model.layers_output[:], model.logits
        assert all(close(*both) for both in zip(pair[0], alone_pair[0], strict=True))
        assert close(pair[1], alone_pair[1])


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "bloom", "falcon", "gpt_oss"])
def test_edits_do_what_they_do_alone(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    vector = torch.linspace(-2, 2, model.hidden_size)

    def edits() -> Tensor:
        pattern = model.attention_probabilities[0]
        model.attention_probabilities[0] = pattern.mean(1, keepdim=True).expand_as(pattern)
        model.mlps_output[0] = 2 * model.mlps_output[0]
        model.steer(1, vector, token_positions=-1)
        model.skip_layer(2)
        return model.logits

    with torch.no_grad():
        with model.trace() as tracer:
            plain = tracer.invoke(LONG, lambda: model.logits)
            edited = tracer.invoke(SHORT, edits)
        with model.trace(SHORT):
            alone = edits()
        with model.trace(LONG):
            untouched = model.logits
    assert close(edited.value, alone)
    assert close(plain.value, untouched)
    assert not close(model(SHORT).logits, alone)


def test_patching_from_one_prompt_into_the_other() -> None:
    model = StandardizedTransformer("demo:gpt2")
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke("The capital of Italy is"):
            model.layers_output[5][:, 3] = france  # noqa: F821
            answer = model.tokenizer.decode(model.logits[0, -1].argmax())
        with tracer.invoke("The capital of France is"):
            france = model.layers_output[5][:, 3]
    with model.trace("The capital of France is"):
        france_alone = model.layers_output[5][:, 3]
    assert torch.allclose(france, france_alone, atol=1e-4)
    with torch.no_grad(), model.trace("The capital of Italy is"):
        model.layers_output[5][:, 3] = france_alone
        assert answer == model.tokenizer.decode(model.logits[0, -1].argmax())


def test_a_generation_in_two_blocks() -> None:
    model = StandardizedTransformer("demo:llama")
    prompts = ["The capital of France is", "Japan is in"]
    vector = torch.ones(model.hidden_size)
    with torch.no_grad():
        with model.generate(max_new_tokens=4) as tracer:
            with tracer.invoke(prompts[0]):
                for step in tracer.iter[:]:
                    model.steer(2, vector, 0.3)
                    if step == 2:
                        pattern = model.attention_probabilities[3]
                steered = tracer.result
            with tracer.invoke(prompts[1]):
                shapes = [model.layers_output[2].shape[:2] for step in tracer.iter[:3]]
                plain = tracer.result
        assert shapes == [(1, 3), (1, 1), (1, 1)]
        assert torch.equal(plain, model.generate(prompts[1], max_new_tokens=4).run())
        with model.generate(prompts[0], max_new_tokens=4) as tracer:
            for step in tracer.iter[:]:
                model.steer(2, vector, 0.3)
                if step == 2:
                    alone = model.attention_probabilities[3]
            steered_alone = tracer.result
    assert torch.equal(steered, steered_alone)
    assert close(pattern, alone)


def test_every_kind_of_prompt_and_arguments_for_all() -> None:
    model = StandardizedTransformer(shared("llama"))
    padded = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with torch.no_grad(), model.trace(use_cache=False) as tracer:
        ids = tracer.invoke(torch.tensor([3, 4]), lambda: (model.input_ids, model.logits))
        own_padding = tracer.invoke(padded, lambda: (model.input_ids, model.logits))
        ragged = tracer.invoke([[3], [5, 6]], lambda: (model.input_ids, model.logits))
        result = tracer.invoke([5, 6], lambda: tracer.result)
    assert own_padding.value[0].tolist() == [[5, 6]]
    assert ragged.value[0].tolist() == [[0, 3], [5, 6]]
    assert close(own_padding.value[1], ragged.value[1][1:])
    assert close(ids.value[1], model([3, 4]).logits)
    assert close(result.value.logits, own_padding.value[1])
    assert given_cache(result.value) is None


def test_what_is_refused() -> None:
    model = StandardizedTransformer(shared("gpt2"))
    with pytest.raises(InputError, match="The prompt is empty"):
        with model.trace() as tracer:
            with tracer.invoke([]):
                model.logits
    with pytest.raises(InputError, match="share one call: an argument cannot be each of"):
        with model.trace() as tracer:
            tracer.invoke([3], lambda: None, use_cache=True)
            tracer.invoke([3], lambda: None, use_cache=False)
    with pytest.raises(InputError, match="There is no prompt"):
        with model.trace() as tracer:
            with tracer.invoke():
                model.logits


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_routers_and_experts_see_the_blocks_own_tokens(model_type: str) -> None:
    """They get (batch * seq, hidden): the tokens of all prompts in one axis."""
    model = StandardizedTransformer(shared(model_type))
    mlp = model.mlps[-1]
    inside = [name for name in ("gate", "router", "experts") if name in mlp.module._modules]
    assert len(inside) == 2

    def read() -> list[Tensor]:
        values = []
        for name in inside:
            values.append(mlp[name].input)
            output = mlp[name].output
            values += [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]
        return values

    with torch.no_grad():
        with model.trace() as tracer:
            blocks = [tracer.invoke(prompt, read) for prompt in (LONG, SHORT, [SHORT, LONG])]
        for block, prompt in zip(blocks, (LONG, SHORT, [SHORT, LONG]), strict=True):
            with model.trace(prompt):
                alone = read()
            assert len(block.value) == len(alone) >= 4
            for mine, other in zip(block.value, alone, strict=True):
                assert mine.shape == other.shape
                if isinstance(prompt[0], int):  # a pair has padding of its own, whose values mean nothing
                    assert close(mine.float(), other.float())
