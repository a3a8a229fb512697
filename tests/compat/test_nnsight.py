"""nnsight's calls on models of this library, each against plain hooks or the model's own methods."""

from __future__ import annotations

import gc
import re
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import hooked
from remote_server import served
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nnatomy.compat import nnsight
from nnatomy.compat.nnsight import CONFIG, LanguageModel, NNsight
from nnatomy.compat.nnsight.intervention.envoy import Envoy
from nnatomy.compat.nnsight.intervention.interleaver import Mediator
from nnatomy.compat.nnsight.util import WrapperModule
from nnatomy.errors import InputError, NoSuchModuleError, OutOfOrderError, UsageError

PROMPT = "The capital of Peru is"
OTHER = "The capital of Cuba is"
PAGE = Path(__file__).parent.parent.parent / "docs" / "from_nnsight.md"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("demo:gpt2", device_map="auto", dispatch=True)


@pytest.fixture
def net() -> NNsight:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def ids(model: LanguageModel, *prompts: str) -> Tensor:
    return model.tokenizer(list(prompts), return_tensors="pt")["input_ids"]


def run(model: LanguageModel, *prompts: str) -> Callable[[], Any]:
    return lambda: model._model(ids(model, *prompts))


def values(model: LanguageModel, call: Callable[[], Any], **modules: nn.Module) -> dict[str, Any]:
    return hooked(model._model, call, {name: (module, "output") for name, module in modules.items()})


def edited(model: Any, call: Callable[[], Any], edits: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Any:
    """What the call gives with plain hooks that put other outputs in the place of modules'."""
    handles = [module.register_forward_hook(lambda _, __, out, e=edit: e(out)) for module, edit in edits.items()]
    try:
        with torch.no_grad():
            return call()
    finally:
        for handle in handles:
            handle.remove()


# Saving.


def test_everything_has_save_in_a_trace_and_not_after_it(net: NNsight) -> None:
    x = torch.ones(1, 4)
    with net.trace(x):
        hidden = nnsight.save(net[0].output)
        kept = [hidden].save()  # type: ignore[attr-defined]
        pair = (hidden, 3).save()  # type: ignore[attr-defined]
        width = hidden.shape[-1].save()  # type: ignore[attr-defined]
        unsaved = net[2].output
        assert "save" in object.__dict__
    assert torch.equal(hidden, net._model[0](x))
    assert kept[0] is hidden
    assert pair == (hidden, 3)
    assert width == 8
    assert torch.equal(unsaved, net._model(x))
    assert not hasattr([], "save")
    assert "save" not in object.__dict__
    assert torch.Tensor.grad is torch._C.TensorBase.grad


def test_it_is_taken_off_behind_an_error_and_around_several_traces(net: NNsight) -> None:
    x = torch.ones(1, 4)
    with pytest.raises(ZeroDivisionError), net.trace(x):
        1 / 0
    assert "save" not in object.__dict__
    with net.session():
        found = list().save()  # type: ignore[attr-defined]  # noqa: C408
        for scale in (1, 2):
            with net.trace(scale * x):
                found.append(net.output)
        assert "save" in object.__dict__
    assert "save" not in object.__dict__
    assert torch.equal(found[1], net._model(2 * x))
    with nnsight.session():
        assert "save" in object.__dict__


# Values.


def test_reads_and_edits(model: LanguageModel) -> None:
    h = model._model.transformer.h
    seen = values(model, run(model, PROMPT), two=h[2], attention=h[3].attn)
    with torch.no_grad(), model.trace(PROMPT):
        two = model.transformer.h[2].output.save()
        attention = model.transformer.h[3].attn.output[0].save()
        model.transformer.h[4].mlp.output[:] = 0
        logits = model.lm_head.output.save()
        whole = model.output.save()
    assert torch.equal(two, seen["two"])
    assert torch.equal(attention, seen["attention"])
    expected = edited(model._model, run(model, PROMPT), {h[4].mlp: lambda value: 0 * value})
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    assert torch.equal(whole.logits, logits)


def test_inputs_and_skips(model: LanguageModel) -> None:
    h = model._model.transformer.h
    with torch.no_grad(), model.trace(PROMPT):
        before = model.transformer.h[1].output
        model.transformer.h[2].inputs = (torch.zeros_like(before), model.transformer.h[2].inputs[1])
        assert not model.transformer.h[2].input.any()
        model.transformer.h[3].skip(before)
        skipped = model.transformer.h[3].output.save()
        logits = model.output.logits.save()
    assert torch.equal(skipped, before)
    expected = edited(model._model, run(model, PROMPT), {h[3]: lambda _: before})
    assert torch.allclose(logits, expected.logits, atol=1e-5)


def test_stop_leaves_the_block(net: NNsight) -> None:
    after = []
    with net.trace(torch.ones(1, 4)) as tracer:
        hidden = net[0].output.save()
        tracer.stop()
        after.append(1)
    assert torch.equal(hidden, net._model[0](torch.ones(1, 4)))
    assert not after
    with net.trace() as tracer:
        with tracer.invoke(torch.ones(1, 4)):
            first = net[0].output
            tracer.stop()
            after.append(2)
    assert torch.equal(first, hidden)
    assert not after


def test_blocks_with_prompts_of_their_own(model: LanguageModel) -> None:
    seen = values(model, run(model, PROMPT), embeddings=model._model.transformer.wte)
    with torch.no_grad(), model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(PROMPT) as invoker:
            tokens = invoker.inputs[1]["input_ids"].save()
            embeddings = model.transformer.wte.output
            barrier()
            one = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            barrier()
            model.transformer.wte.output = embeddings
            two = model.lm_head.output.save()
        with tracer.invoke():
            both = model.lm_head.output.save()
    assert torch.equal(tokens, ids(model, PROMPT))
    assert torch.equal(embeddings, seen["embeddings"])
    assert torch.allclose(one, two, atol=1e-5)
    assert torch.equal(both, torch.cat([one, two]))
    with pytest.raises(ValueError, match=r"^tracer.invoke has to come before the first value"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            with tracer.invoke(OTHER):
                model.lm_head.output


# Gradients.


def test_gradients_in_a_block_around_backward(net: NNsight) -> None:
    x, module = torch.ones(1, 4), net._model
    first = module[0](x)
    first.retain_grad()
    middle = module[1](first)
    middle.retain_grad()
    module[2](middle).sum().backward()
    weight = module[2].weight.grad.clone()
    module.zero_grad()
    with net.trace(x):
        one, two, loss = net[0].output, net[1].output, net.output.sum()
        with loss.backward():
            of_one = one.grad.save()  # in any order
            of_two = two.grad.clone().save()
            two.grad = 3 * two.grad
            assert torch.equal(two.grad, 3 * of_two)
        assert net._model[0].bias.grad is not None  # outside it is torch's own
    assert torch.equal(of_one, first.grad)
    assert torch.equal(of_two, middle.grad)
    assert torch.equal(module[2].weight.grad, weight)
    assert torch.allclose(module[0].bias.grad, 3 * first.grad.sum(0))


def test_several_backward_passes_and_one_without_a_block(net: NNsight) -> None:
    x = torch.ones(1, 4)
    with net.trace(x):
        hidden, loss = net[0].output, net.output.sum()
        with loss.backward(retain_graph=True):
            one = hidden.grad
        with (2 * loss).backward():
            two = hidden.grad
            two[:] = 7
            assert torch.equal(hidden.grad, torch.full_like(two, 7))
    assert net._model[0].bias.grad is not None
    net._model.zero_grad()
    with net.trace(x):
        again = net[0].output
        again.retain_grad()
        net.output.sum().backward()
    assert torch.equal(again.grad, one)
    with (
        pytest.raises(UsageError, match=r"^\.grad of a tensor of shape \(1,\), in a `with \.\.\.backward\(\):`: "),
        net.trace(x),
    ):
        with net.output.sum().backward():
            torch.ones(1).grad


# Generation.


def test_what_is_generated(model: LanguageModel) -> None:
    expected = model._model.generate(ids(model, PROMPT), max_new_tokens=3, do_sample=False)
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        logits = list().save()  # type: ignore[attr-defined]  # noqa: C408
        for _ in tracer.iter[:]:
            logits.append(model.lm_head.output[0, -1].argmax(-1))
        tokens = model.generator.output.save()
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.stack(logits), expected[0, -3:])
    with model.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(PROMPT):
            one = model.generator.output.save()
        with tracer.invoke([OTHER, OTHER]):
            two = model.generator.output.save()
    assert torch.equal(one, expected)
    assert two.shape == (2, *expected.shape[1:])


def test_with_blocks_of_steps(model: LanguageModel) -> None:
    expected = model._model.generate(ids(model, PROMPT), max_new_tokens=4, do_sample=False)[0, -4:]
    with model.generate(PROMPT, max_new_tokens=4) as tracer:
        tokens = list().save()  # type: ignore[attr-defined]  # noqa: C408
        with tracer.iter[0:3]:
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
            last = tokens[-1]
        with tracer.iter[3] as step:
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
            steps = step
    assert torch.equal(torch.stack(tokens), expected)
    assert torch.equal(last, expected[2])
    assert steps == 3
    with model.generate(max_new_tokens=4) as tracer:
        with tracer.invoke(PROMPT):
            every = []
            with tracer.all():
                every.append(model.lm_head.output[0, -1].argmax(-1))
    assert torch.equal(torch.stack(every), expected)


def test_tokens_as_they_come(model: LanguageModel) -> None:
    expected = model._model.generate(ids(model, PROMPT), max_new_tokens=4, do_sample=False)
    with model.generate(PROMPT, max_new_tokens=4) as tracer:
        prompt = model.generator.streamer.output
        tokens = []
        for _ in tracer.iter[1:3]:
            model.transformer.h[-1].output
            tokens.append(model.generator.streamer.output)
    assert torch.equal(prompt, ids(model, PROMPT))
    assert torch.equal(torch.cat(tokens), expected[0, -3:-1])


def test_steps_of_one_pass_are_calls() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(self.linear(x)))

    model, x = NNsight(Thrice()), torch.ones(1, 4)
    linear = model._model.linear
    with model.trace(x) as tracer:
        found = [model.linear.output.clone() for _ in tracer.iter[:2]]
        for _ in tracer.iter[2]:
            model.linear.output[:] = 0
        result = model.output.save()
    assert torch.equal(found[0], linear(x))
    assert torch.equal(found[1], linear(linear(x)))
    assert not result.any()


# Names.


def test_cache_by_path_and_as_a_tree(model: LanguageModel) -> None:
    h = model._model.transformer.h
    seen = values(model, run(model, PROMPT), one=h[1], mlp=h[3].mlp)
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert torch.equal(cache["model.transformer.h.1"].output, seen["one"])
    assert not cache["model.transformer.h.1"].output.requires_grad
    assert torch.equal(cache.model.transformer.h[3].mlp.output, seen["mlp"])
    assert torch.equal(cache["model.transformer.h.2"].input, seen["one"])
    assert torch.equal(cache["model.transformer.h.2"].inputs[0][0], seen["one"])
    assert {"model", "model.lm_head"} <= {*cache}
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        cache = tracer.cache(modules=["model.transformer.h.1", model.lm_head])
    assert [*cache] == ["model.transformer.h.1", "model.lm_head"]
    assert [entry.output.shape[1] for entry in cache["model.transformer.h.1"]] == [5, 1, 1]
    assert len(cache["model.transformer.h.1"].output) == 3
    assert cache.transformer.h[1][0].input is None
    with pytest.raises(KeyError, match=r"^'model.transformer.h.2' is not in the cache"):
        cache["model.transformer.h.2"]
    with pytest.raises(IndexError):
        cache.model.transformer.h[9]
    with pytest.raises(AttributeError):
        cache.model.transformer.h[1].mlp


def test_aliases(model: LanguageModel) -> None:
    renamed = LanguageModel(
        model._model,
        tokenizer=model.tokenizer,
        rename={
            "transformer.h": "blocks",
            "mlp": ["feed", "forward_part"],
            "h.0": "first",
            ".ln_f": "norm",
            "1": "second",
        },
        validate=False,
    )
    h = model._model.transformer.h
    seen = values(model, run(model, PROMPT), zero=h[0], mlp=h[1].mlp, norm=model._model.transformer.ln_f)
    with torch.no_grad(), renamed.trace(PROMPT) as tracer:
        cache = tracer.cache()
        zero = renamed.transformer.first.output.save()
        mlp = renamed.blocks[1].feed.output.save()
        norm = renamed.transformer.norm.output.save()
    assert torch.equal(zero, seen["zero"])
    assert torch.equal(mlp, seen["mlp"])
    assert torch.equal(norm, seen["norm"])
    assert renamed.transformer.h[1].forward_part.module is h[1].mlp
    assert torch.equal(cache.model.blocks[1].feed.output, seen["mlp"])
    assert torch.equal(cache["model.transformer.h.second.mlp"].output, seen["mlp"])


def test_modules_and_what_they_have(model: LanguageModel, net: NNsight) -> None:
    assert model.transformer.h[0].path == "model.transformer.h.0"
    assert model.transformer.h[0].attn.num_heads == model._model.transformer.h[0].attn.num_heads
    assert net[0].weight is net._model[0].weight
    assert net.get("2").module is net._model[2]
    assert [envoy.path for envoy in net.modules()] == ["model", "model.0", "model.1", "model.2"]
    assert net.to("cpu") is net
    assert net.device == torch.device("cpu")
    assert next(iter(net.parameters())) is net._model[0].weight
    assert model.dispatched
    with pytest.raises(IndexError):
        model.transformer.h[99]
    with pytest.raises(NoSuchModuleError, match=r"^model.transformer \(GPT2Model\) has no submodule 'layer'"):
        model.transformer.layer


def test_classes_of_envoys() -> None:
    class Linear(Envoy):
        def double(self) -> Tensor:
            return 2 * self.output

    class Model(NNsight):
        envoys: Any = {nn.Linear: Linear}  # noqa: RUF012

    net = Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert type(net[0]) is Linear
    assert type(net[1]) is Envoy
    with net.trace(torch.ones(1, 4)):
        doubled = net[0].double()  # type: ignore[attr-defined]
    assert torch.equal(doubled, 2 * net._model[0](torch.ones(1, 4)))
    assert type(NNsight(net._model, envoys={"0": Linear})[0]) is Linear


def test_a_child_called_output() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.output(x)

    with pytest.warns(UserWarning, match=r"^In a Layer some modules have a child called `output`"):
        model = NNsight(Layer())
    x = torch.ones(1, 4)
    with model.trace(x):
        inner = model.output.output.save()
        outer = model.nns_output.save()
    assert torch.equal(inner, model._model.output(x))
    assert torch.equal(outer, 2 * inner)


# Operations.


def test_operations_of_a_forward(model: LanguageModel) -> None:
    attention = model.transformer.h[1].attn
    projected = values(model, run(model, PROMPT), c_attn=attention.module.c_attn, c_proj=attention.module.c_proj)
    with torch.no_grad(), model.trace(PROMPT):
        query, key, value = attention.source.split_1.output.save()
        args, _ = attention.source.attention_interface_0.inputs.save()
        inner = attention.source.attention_interface_0.source.torch_nn_functional_scaled_dot_product_attention_0.output
        heads = attention.source.attention_interface_0.output[0].save()
        out = attention.source.self_c_proj_0.output.save()
    assert torch.equal(torch.cat([query, key, value], -1), projected["c_attn"])
    assert torch.equal(args[1], query.unflatten(-1, (model.num_heads, -1)).transpose(1, 2))
    expected = scaled_dot_product_attention(*args[1:4], is_causal=True)
    assert torch.allclose(inner, expected, atol=1e-6)
    assert torch.allclose(heads, expected.transpose(1, 2), atol=1e-6)
    assert torch.equal(out, projected["c_proj"])
    assert "forward" not in vars(attention.module)
    assert "attention_interface_0" in str(attention.source)
    with pytest.raises(
        AttributeError, match=r"^model.transformer.h.1.attn.source has no operation 'nothing_0'. It has: "
    ):
        attention.source.nothing_0


def test_edits_of_operations_and_their_steps(model: LanguageModel) -> None:
    attention = model._model.transformer.h[2].attn
    expected = edited(model._model, run(model, PROMPT), {attention.c_proj: lambda value: 2 * value})
    source = model.transformer.h[2].attn.source
    with torch.no_grad(), model.trace(PROMPT):
        source.self_c_proj_0.output = 2 * source.self_c_proj_0.output
        logits = model.output.logits.save()
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    with model.generate(PROMPT, max_new_tokens=3) as tracer:
        lengths = [source.split_1.output[0].shape[1] for _ in tracer.iter[:]]
    assert lengths == [5, 1, 1]
    with torch.no_grad(), model.trace(PROMPT):
        model.transformer.h[2].attn.c_attn.output  # the forward is at work, and has been seen from its start
        assert len(source.split_1.output) == 3
    assert torch.equal(run(model, PROMPT)().logits, run(model, PROMPT)().logits)


def test_operations_of_functions_and_assigned_values() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x) + 1
            return self.double(y) + self.double(x)

        def double(self, x: Tensor) -> Tensor:
            return 2 * x

    model, x = NNsight(Twice()), torch.tensor([[-1.0, 2.0]])
    with model.trace(x):
        assert torch.equal(model.source.torch_relu_0.output, x.relu())
        assert torch.equal(model.source.y_0.output, x.relu() + 1)
        model.source.self_double_0.skip(torch.zeros_like(x))
        args, _ = model.source.self_double_1.inputs
        result = model.output.save()
    assert torch.equal(args[0], x)
    assert torch.equal(result, 2 * x)

    scale = torch.tensor(3.0)

    class Scaled(nn.Linear):
        __bias = 5.0

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            def add(y: Tensor) -> Tensor:
                return torch.add(y, self.__bias)

            return add(super().forward(x) * scale)

    scaled, y = NNsight(Scaled(2, 2)), torch.ones(1, 2)
    with scaled.trace(y):
        added = scaled.source.torch_add_0.inputs[0]
        scaled.source.torch_add_0.output = torch.zeros(1, 2)
        result = scaled.output.save()
    assert torch.equal(added[0], 3 * nn.Linear.forward(scaled._model, y))
    assert added[1] == 5
    assert not result.any()
    assert not result.requires_grad

    class Looped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.mul(x, 2)
            return x

    looped = NNsight(Looped())
    with looped.trace(x) as tracer:
        for _ in tracer.iter[1]:
            looped.source.torch_mul_0.output[:] = 1
        result = looped.output.save()
    assert torch.equal(result, torch.full_like(x, 2))


# Edits.


def test_lasting_edits(model: LanguageModel) -> None:
    h = model._model.transformer.h
    plain = run(model, PROMPT)().logits
    expected = edited(model._model, run(model, PROMPT), {h[1]: lambda value: 0 * value}).logits
    with model.edit() as one:
        model.transformer.h[1].output[:] = 0
    with model.edit() as (tracer, two):
        for _ in tracer.iter[:]:
            model.transformer.h[1].output[:] = 0
    with torch.no_grad():
        for edited_model in (one, two):
            with edited_model.trace(PROMPT):
                logits = edited_model.output.logits.save()
            assert torch.allclose(logits, expected, atol=1e-5)
        with model.trace(PROMPT):
            untouched = model.output.logits.save()
        assert torch.equal(untouched, plain)
        with model.edit(inplace=True) as inplace:
            for _ in inplace.iter[:]:
                model.transformer.h[1].output[:] = 0
        with model.trace(PROMPT):
            logits = model.output.logits.save()
        model.clear_edits()
        with model.trace(PROMPT):
            cleared = model.output.logits.save()
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(cleared, plain)


def test_modules_of_ones_own(model: LanguageModel) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = WrapperModule()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.one(x)

    h = model._model.transformer.h
    layer = model.transformer.h[1]
    layer.doubled = Doubled()
    with model.edit() as with_module:
        layer.output = layer.doubled(layer.output, hook=True)
    with torch.no_grad(), with_module.trace(PROMPT):
        inner = layer.doubled.one.output.clone().save()
        layer.doubled.output += 1
        logits = with_module.output.logits.save()
    assert torch.equal(inner, values(model, run(model, PROMPT), one=h[1])["one"])
    expected = edited(model._model, run(model, PROMPT), {h[1]: lambda value: 2 * value + 1})
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    assert "doubled" not in h[1]._modules
    with pytest.raises(UsageError, match=r"hook=True\): a module is called as a part of the forward pass"):
        with model.trace() as tracer:
            with tracer.invoke(PROMPT):
                layer.doubled(layer.output, hook=True)


# What is refused, and what is let go.


def test_scan_and_what_is_no_trace(model: LanguageModel) -> None:
    with model.scan(PROMPT):
        width = nnsight.save(model.transformer.h[0].output.shape[-1])
    assert width == 96
    assert torch.equal(model.trace(PROMPT, trace=False).logits, run(model, PROMPT)().logits)


def test_refusals(model: LanguageModel, net: NNsight) -> None:
    with torch.no_grad(), model.trace(PROMPT, remote="local"):
        hidden = model.transformer.h[1].output
    assert torch.equal(hidden, values(model, run(model, PROMPT), one=model._model.transformer.h[1])["one"])
    with pytest.raises(InputError, match=r"^NNsight: remote=True: there is no NDIF here\."):
        net.trace(torch.ones(1, 4), remote=True)
    with pytest.raises(UsageError, match=r"^CONFIG.set_default_api_key: traces are sent to a server of nnatomy's own"):
        CONFIG.set_default_api_key("key")
    with pytest.raises(ValueError, match=r"^Cannot access a value: the trace has no input"), net.trace():
        net.output
    with pytest.raises(ValueError, match=r"^Prompt 0 is empty"):
        model.trace("")
    with pytest.raises(UsageError, match=r"^\.next\(\) is gone from nnsight"), net.trace(torch.ones(1, 4)) as tracer:
        tracer.next()
    with pytest.raises(Mediator.MissedProviderError), net.trace(torch.ones(1, 4)):
        net[2].output
        net[0].output
    assert Mediator.OutOfOrderError is OutOfOrderError
    with pytest.warns(UserWarning, match=r"a trace is one forward pass"):
        trace = model.trace(PROMPT, max_new_tokens=3)
    with trace:
        pass


def test_traces_at_a_server(model: LanguageModel) -> None:
    h = model._model.transformer.h
    seen = values(model, run(model, PROMPT), two=h[2])
    expected = edited(model._model, run(model, PROMPT), {h[3]: lambda value: 0 * value}).logits
    tokens = model._model.generate(ids(model, PROMPT), max_new_tokens=3, do_sample=False)
    sent = LanguageModel("demo:gpt2")
    with served("demo:gpt2") as server:
        sent.server = server.address
        with torch.no_grad(), sent.trace(PROMPT, remote=True):
            two = sent.transformer.h[2].output.save()
            sent.transformer.h[3].output[:] = 0
            kept = [sent.output.logits].save()  # type: ignore[attr-defined]
        with sent.generate(PROMPT, max_new_tokens=3, remote=True):
            generated = sent.generator.output.save()
        sent._sender.connection.close()
    assert torch.equal(two, seen["two"])
    assert torch.allclose(kept[0], expected, atol=1e-5)
    assert torch.equal(generated, tokens)


def test_nothing_is_kept() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    net = NNsight(module)
    with torch.no_grad(), net.trace(torch.ones(1, 4)) as tracer:
        hidden = net[0].output.save()
        net[0].source.F_linear_0
        cache = tracer.cache()
    gone = weakref.ref(module), weakref.ref(hidden), weakref.ref(tracer)
    del module, net, hidden, tracer, cache
    gc.collect()
    assert [one() for one in gone] == [None, None, None]


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGE.read_text().split("## Scripts as they stand")[1].split("## ")[0]
    script = tmp_path / "script.py"
    script.write_text("\n".join(re.findall(r"(?s)```python\n(.*?)```", section)))
    names = runpy.run_path(str(script))
    assert capsys.readouterr().out == "torch.Size([1, 5, 96]) torch.Size([1, 5, 96])\n"
    assert names["gradient"].shape == (1, 5, 96)
    assert names["attention"].shape == (1, 1, 6, 16)
    assert names["tokens"].shape == (1, 8)
