"""What a model records beside its logits (hidden states, patterns, router logits) is what an edited pass went on with.

The reference is PyTorch's own hooks, on a fresh model: put there before Transformers puts the hooks that it records by, they
are called first, so that what they return is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from architectures import build, prompt_ids
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.standardized.hidden import with_output

LAYER = 1


def hooked(hf: Any, module: nn.Module, change: Callable[[Any], Any], **kwargs: Any) -> Any:
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    with torch.no_grad():
        result = hf(**kwargs)
    handle.remove()
    return result


def edit_of(hf: Any) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*prompt_ids().shape, hf.config.hidden_size)


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(
        torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "bloom", "falcon"])
def test_hidden_states_are_those_that_went_on(model_type: str) -> None:
    """By the standard name, by the module's own, in a block of `invoke`, as a lasting edit, in a generation, attached."""
    hf, ids = build(model_type), prompt_ids()
    new = edit_of(hf)
    model = StandardizedTransformer(build(model_type))
    path = next(path for path, one in model.hf_model.named_modules() if one is model.layers[LAYER].module)
    layer = hf.get_submodule(path)
    inputs: dict[str, Any] = {"input_ids": ids, "output_hidden_states": True}
    expected = hooked(hf, layer, lambda output: with_output(output, new), **inputs)
    with torch.no_grad():
        plain = model.hf_model(**inputs)
    assert torch.equal(expected.hidden_states[LAYER + 1], new)
    assert not same(plain.hidden_states, expected.hidden_states)

    def edit() -> None:
        model.layers_output[LAYER] = new

    results = []
    with torch.no_grad(), model.trace(ids, output_hidden_states=True) as tracer:
        edit()
        results.append(tracer.result)
    with torch.no_grad(), model.trace(ids, output_hidden_states=True) as tracer:
        view = model.layers[LAYER]
        view.output = with_output(view.output, new)
        results.append(tracer.result)
    with torch.no_grad(), model.trace(output_hidden_states=True) as tracer:
        with tracer.invoke(ids):
            edit()
        results.append(tracer.result)
    results.append(model.edit(edit)(ids, output_hidden_states=True))
    put = model.attach(f"layers_output[{LAYER}]", _Constant(new))
    results.append(put(ids, output_hidden_states=True))
    how: dict[str, Any] = {"max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True}
    with torch.no_grad(), model.generate(ids, **how, output_hidden_states=True) as tracer:
        edit()
        generated = tracer.result
    for result in results:
        assert same(result.hidden_states, expected.hidden_states)
        assert torch.allclose(result.logits, expected.logits, atol=1e-4)
    assert same(generated.hidden_states[0], expected.hidden_states)
    with torch.no_grad(), model.trace(ids, output_hidden_states=True) as tracer:  # a read is none
        model.layers_output[LAYER]
        result = tracer.result
    assert all(map(torch.equal, result.hidden_states, plain.hidden_states))


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_of_one_prompt_of_two() -> None:
    model = StandardizedTransformer(build("llama"))
    ids, new = prompt_ids()[:1], edit_of(model.hf_model)[:1]
    with torch.no_grad():
        plain = model.hf_model(ids, output_hidden_states=True).hidden_states
    with torch.no_grad(), model.trace(output_hidden_states=True) as tracer:
        with tracer.invoke(ids):
            pass
        with tracer.invoke(ids):
            model.layers_output[LAYER] = new
        states = tracer.result.hidden_states
    assert torch.allclose(states[LAYER + 1][:1], plain[LAYER + 1], atol=1e-5)
    assert torch.equal(states[LAYER + 1][1:], new)


def test_a_layer_that_runs_for_others_alone() -> None:
    """One prompt of two skips it by the module's own name: what it made of that prompt's rows is not what went on."""
    hf, ids = build("llama"), prompt_ids()[:1]
    model = StandardizedTransformer(build("llama"))
    with torch.no_grad():
        plain = model.hf_model(ids, output_hidden_states=True).hidden_states
    layer = hf.model.layers[LAYER]
    expected = hooked(hf, layer, lambda _: plain[LAYER], input_ids=ids, output_hidden_states=True).hidden_states
    assert not same(plain, expected)
    attached = model.attach(f"layers_output[{LAYER + 1}]", nn.Identity())
    for view in (model, attached):
        with torch.no_grad(), view.trace(output_hidden_states=True) as tracer:
            with tracer.invoke(ids):
                view.model.layers[LAYER].skip(view.layers_input[LAYER])
                skipped = view.output.hidden_states
            with tracer.invoke(ids):
                kept = view.output.hidden_states
        assert same(skipped, expected)
        assert same(kept, plain)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_patterns_are_those_that_went_on(model_type: str) -> None:
    hf = build(model_type)
    hf.set_attn_implementation("eager")
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad():
        plain = hf(ids, output_attentions=True).attentions
    new = torch.full_like(plain[LAYER], 1 / ids.shape[1])
    with torch.no_grad(), model.trace(ids, output_attentions=True) as tracer:
        model.attention_probabilities[LAYER] = new
        output = model.layers_output[LAYER]
        result = tracer.result
    with torch.no_grad(), model.trace(ids):
        model.attention_probabilities[LAYER] = new
        expected = model.layers_output[LAYER]
        later = model.attention_probabilities[LAYER + 1]
        logits = model.logits
    assert torch.equal(output, expected)
    assert torch.equal(result.logits, logits)
    assert torch.equal(result.attentions[LAYER], new)
    assert torch.equal(result.attentions[0], plain[0])
    assert len(result.attentions) == len(plain)
    assert not torch.allclose(result.attentions[LAYER + 1], plain[LAYER + 1])
    assert torch.equal(result.attentions[LAYER + 1], later)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_logits_are_those_that_went_on(model_type: str) -> None:
    model = StandardizedTransformer(zoo.shared(model_type))
    ids = zoo.ids(model.hf_model)
    layer = max(i for i, one in enumerate(model.routers_logits.modules) if one is not None)
    assert model.num_layers > layer > 0
    with torch.no_grad():
        plain = model.hf_model(ids, output_router_logits=True).router_logits
    with torch.no_grad(), model.trace(ids, output_router_logits=True) as tracer:
        logits = model.routers_logits[layer]
        new = logits.flip(-1)
        model.routers_logits[layer] = new
        found = tracer.result.router_logits
    assert not torch.equal(new, logits)
    assert torch.equal(plain[-1].flatten(), logits.flatten())
    assert torch.equal(found[-1].flatten(), new.flatten())
    assert torch.equal(found[0], plain[0])
    assert len(found) == len(plain)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_a_skipped_layer_is_refused(name: str, by: str) -> None:
    """It would leave no record, and all later ones would be taken for those of the layer before."""
    hf = build("llama")
    hf.set_attn_implementation("eager")
    if by == "config":
        setattr(hf.config, name, True)
    given = {name: True} if by == "argument" else {}
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad():
        states = hf(ids, **{name: True})
    assert len(states.get(name.removeprefix("output_"))) >= model.num_layers
    text = (
        rf"with {name}=True the model returns a list with something of each layer that has run\. It would be one short, and all "
        rf"later ones would be taken for those of the layer before\. Leave {name} out, and read what you need by its name\.$"
    )
    with pytest.raises(InputError, match="^skip_layers of layer 1: " + text):
        with torch.no_grad(), model.trace(ids, **given):
            model.skip_layer(LAYER)
    with pytest.raises(InputError, match="^skip of a LlamaDecoderLayer: " + text):  # by the module's own name
        with torch.no_grad(), model.trace(ids, **given) as tracer:
            model.model.layers[LAYER].skip(model.layers_input[LAYER])
            tracer.result
    with torch.no_grad(), model.trace(ids, **{name: False}):
        model.skip_layer(LAYER)


def test_a_pattern_that_is_recorded_as_another_tensor_is_not_assigned() -> None:
    """Where a module returns a copy of the pattern that it goes on with, the record would stay what it was."""
    hf = build("llama")
    hf.set_attn_implementation("eager")
    hf.model.layers[LAYER].self_attn.__class__ = _ReturnsACopy
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad():
        plain = hf(ids, output_attentions=True)
    new = torch.full_like(plain.attentions[LAYER], 1 / ids.shape[1])
    text = (
        r"^output_attentions=True: what was assigned inside of a _ReturnsACopy would not be in what the model records of it, "
        r"which is another tensor than the one that was read\. Leave output_attentions out, and read what you need by its name\.$"
    )
    with pytest.raises(InputError, match=text), torch.no_grad():
        with model.trace(ids, output_attentions=True) as tracer:
            model.attention_probabilities[LAYER] = new
            tracer.result
    with torch.no_grad(), model.trace(ids):  # without the argument it is an edit like any other
        model.attention_probabilities[LAYER] = new
        logits = model.logits
    assert not torch.allclose(logits, plain.logits, atol=1e-2)
    with (
        torch.no_grad(),
        model.trace(ids, output_attentions=True) as tracer,
    ):  # the copy is of what it has become
        model.attention_probabilities[LAYER].copy_(new)
        result = tracer.result
    assert torch.equal(result.attentions[LAYER], new)
    assert torch.equal(result.logits, logits)
    with torch.no_grad(), model.trace(ids, output_attentions=True) as tracer:
        read = model.attention_probabilities[LAYER]
        result = tracer.result
    assert torch.equal(read, plain.attentions[LAYER])
    assert all(map(torch.equal, result.attentions, plain.attentions))


class _ReturnsACopy(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, pattern = super().forward(*args, **kwargs)
        return output, pattern.clone()
