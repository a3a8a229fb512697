"""Checks of models in the hands of FSDP2, in one process: `sharded_models.py` prints, by check, how it failed ("" if it held)."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from architectures import PLACES, build, prompt_ids
from reference import edited, hooked
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, ModelChangedError
from nnatomy.methods import (
    attribution_patching,
    collect_activations,
    direct_logit_attribution,
    edge_attribution,
    logit_difference,
    logit_lens,
)

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
CHECKS: dict[str, Callable[[], None]] = {}
#: By architecture; Gemma 2's head has a cap, so that the whole model is run for it, and OPT projects.
TYPES = ("gpt2", "llama", "gemma2", "opt", "mixtral")


def shard(model: Any, layers: Any, **options: Any) -> Any:
    """The model with each layer in FSDP's hands, and the rest in those of the root."""
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def both(model_type: str, **options: Any) -> tuple[Any, Any]:
    """A model and the same sharded."""
    plain = build(model_type)
    sharded = copy.deepcopy(plain)
    return plain, shard(sharded, sharded.get_submodule(PLACES[model_type][0]), **options)


def for_each(*cases: Any) -> Any:
    def add(check: Any) -> Any:
        for case in cases:
            CHECKS[f"{check.__name__}[{case}]"] = partial(check, case)
        return check

    return add


def once(check: Any) -> Any:
    CHECKS[check.__name__] = check
    return check


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape, (one.shape, other.shape)
    assert torch.equal(one, other), float((one - other).abs().max())


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@for_each(*TYPES)
def reads_edits_and_steps(model_type: str) -> None:
    plain, sharded = both(model_type)
    reference = StandardizedTransformer(plain).validation.counts
    model, ids = StandardizedTransformer(sharded), prompt_ids()
    assert model.validation.counts == reference, (model.validation.counts, reference)
    path, attention, _ = PLACES[model_type]
    points: dict[Any, Any] = {}
    for i, layer in enumerate(plain.get_submodule(path)):
        points |= {("layers_input", i): (layer, "input"), ("layers_output", i): (layer, "output")}
        points["attentions_output", i] = layer.get_submodule(attention), "output"
    expected = hooked(plain, lambda: plain(ids), points)
    order = sorted(
        expected,
        key=lambda point: (point[1], ["layers_input", "attentions_output", "layers_output"].index(point[0])),
    )
    with torch.no_grad():
        with model.trace(ids):
            seen = {(name, i): getattr(model, name)[i] for name, i in order}
            logits = model.logits
        for point, value in expected.items():
            same(seen[point], value)
        same(logits, plain(ids).logits)
        layer = plain.get_submodule(path)[1]
        with model.trace(ids):
            model.layers_output[1] = -model.layers_output[1]
            changed = model.logits
        same(changed, edited(lambda: plain(ids).logits, layer, "output", lambda out: -out))
        with model.generate(ids, **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                model.layers_output[1] = -model.layers_output[1]
            tokens = tracer.result
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
        same(tokens, edited(lambda: plain.generate(**asked), layer, "output", lambda out: -out))


@for_each(*TYPES)
def the_head_is_the_models(model_type: str) -> None:
    plain, sharded = both(model_type, reshard_after_forward=True)
    model, ids = StandardizedTransformer(sharded), prompt_ids()
    with torch.no_grad():
        expected = plain(ids).logits
        with model.trace(ids):
            last = model.layers_output[-1]
            inside = model.project_on_vocab(last)
            same(model.logits, expected)  # what the call within has let go is there again
        near(inside, expected)
        near(model.project_on_vocab(last), expected)
    assert all(map(is_sharded, sharded.parameters()))
    hidden, known = (last.clone().requires_grad_() for _ in range(2))
    model.project_on_vocab(hidden)[0, 0, 3].backward()
    StandardizedTransformer(plain).project_on_vocab(known)[0, 0, 3].backward()
    near(hidden.grad, known.grad)
    near(logit_lens(model, ids.tolist()), logit_lens(StandardizedTransformer(plain), ids.tolist()))


@for_each("gpt2", "llama")
def what_is_left_early_is_in_order(model_type: str) -> None:
    plain, sharded = both(model_type)
    model, ids = StandardizedTransformer(sharded), prompt_ids()
    layers = sharded.get_submodule(PLACES[model_type][0])
    with torch.no_grad():
        with model.trace(ids):
            inside = model.mlps_input[1]
            assert not any(map(is_sharded, layers[1].parameters()))
        assert all(is_sharded(one) for layer in layers for one in layer.parameters())
        with StandardizedTransformer(plain).trace(ids):
            pass
    assert inside.isfinite().all()
    try:
        with torch.no_grad(), model.trace(ids):
            model.mlps_input[1]
            raise KeyError
    except KeyError:
        pass
    assert all(is_sharded(one) for layer in layers for one in layer.parameters())
    # Other weights, as after a step of training: nothing old goes on.
    with torch.no_grad():
        for one in layers[1].parameters():
            one.mul_(1.5)
        for one in plain.get_submodule(PLACES[model_type][0])[1].parameters():
            one.mul_(1.5)
        with model.trace(ids):
            same(model.logits, plain(ids).logits)


@for_each("gpt2", "llama")
def gradients_reach_every_shard(model_type: str) -> None:
    plain, sharded = both(model_type)
    model, ids = StandardizedTransformer(sharded), prompt_ids()
    kept: list[Tensor] = []
    layer = plain.get_submodule(PLACES[model_type][0])[1]
    handle = layer.register_forward_hook(
        lambda *args: kept.append(args[-1] if isinstance(args[-1], Tensor) else args[-1][0])
    )
    plain(ids)
    handle.remove()
    kept[0].square().sum().backward()
    with model.trace(ids):
        hidden = model.layers_output[1]
    hidden.square().sum().backward()
    grads = {name: one.grad for name, one in plain.named_parameters()}
    found = dict(sharded.named_parameters())
    assert sum(grad is not None for grad in grads.values()) > 5
    for name, grad in grads.items():
        if grad is not None:
            near(whole(found[name].grad), grad)


@for_each("gpt2", "llama")
def methods_and_modules_of_ones_own(model_type: str) -> None:
    plain, sharded = both(model_type)
    one, other, ids = StandardizedTransformer(plain), StandardizedTransformer(sharded), prompt_ids()
    prompts = ids.tolist()
    expected, found = (direct_logit_attribution(model, prompts, answer=3) for model in (one, other))
    near(found.effect, expected.effect)
    effects = [
        attribution_patching(model, prompts[:1], prompts[1:], metric=logit_difference(3, 4)).effect
        for model in (one, other)
    ]
    near(effects[1], effects[0])
    for name, call in {
        "direct_logit_attribution(by='head')": lambda: direct_logit_attribution(other, prompts, answer=3, by="head"),
        "A graph of edges": lambda: edge_attribution(other, prompts[:1], prompts[1:], metric=logit_difference(3, 4)),
    }.items():
        try:
            call()
        except InputError as error:
            assert str(error) == (
                f"{name} takes gradients from inside of a layer, where the parameters of a model in the hands of FSDP2 are not "
                "gathered for a backward pass. Take the model as it is before fully_shard."
            )
        else:
            raise AssertionError(name)
    sae = nn.Sequential(nn.Linear(one.hidden_size, 16), nn.ReLU(), nn.Linear(16, one.hidden_size))
    results = []
    for model in (one, other):
        spliced = model.attach("layers_output[1]", sae, name="sae")
        with torch.no_grad(), spliced.trace(ids):
            features = spliced.sae[1].output
            spliced.skip_layer(2)
            results.append((features, spliced.logits))
    for first, second in zip(*results, strict=True):
        same(first, second)
    for first, second in zip(*([edit(model) for edit in (steered, patched)] for model in (one, other)), strict=True):
        same(first, second)
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            collect_activations(model, prompts, points={"layers_output": [1]}, folder=Path(folder) / str(i))
            for i, model in enumerate((one, other))
        ]
        first, second = (torch.stack([kept["layers_output", 1] for kept in store]) for store in stores)
    near(first, second)


def steered(model: Any) -> Tensor:
    with torch.no_grad(), model.trace(prompt_ids()):
        model.steer(1, torch.linspace(-1, 1, model.hidden_size))
        return model.logits


def patched(model: Any) -> Tensor:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(prompt_ids()[:1]):
            state = model.layers_output[1]
        with tracer.invoke(prompt_ids()[1:]):
            model.layers_output[1] = state
            logits = model.logits
    return logits


@once
def shapes_alone() -> None:
    _, sharded = both("llama")
    model = StandardizedTransformer(sharded)
    with model.scan(prompt_ids()):
        assert model.layers_output[1].shape == (*prompt_ids().shape, model.hidden_size)


@once
def sharded_after_loading() -> None:
    model = StandardizedTransformer(build("llama"))
    shard(model.hf_model, model.hf_model.model.layers)
    try:
        model.trace(prompt_ids())
    except ModelChangedError as error:
        assert "FSDPLlama" in str(error), error
    else:
        raise AssertionError("it was not noticed")
    model.refresh()
    with torch.no_grad(), model.trace(prompt_ids()):
        same(model.logits, build("llama")(prompt_ids()).logits)


@once
def in_a_wrapper_that_is_the_root() -> None:
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]
    )
    plain = peft.get_peft_model(build("llama"), config).eval()
    sharded = copy.deepcopy(plain)
    shard(sharded, sharded.get_base_model().model.layers, reshard_after_forward=True)
    model, ids = StandardizedTransformer(sharded), prompt_ids()
    assert model.validation.counts == StandardizedTransformer(plain).validation.counts
    with torch.no_grad(), model.trace(ids):
        last = model.layers_output[-1]
        near(model.project_on_vocab(last), plain(ids).logits)
        same(model.logits, plain(ids).logits)
    with torch.no_grad():
        near(model.project_on_vocab(last), plain(ids).logits)


@for_each("T5ForConditionalGeneration", "BartForConditionalGeneration")
def encoder_decoders(name: str) -> None:
    import encoder_decoders as made

    plain = made.build(name)
    sharded = copy.deepcopy(plain)
    blocks = [*StandardizedTransformer(sharded)._anatomy.layers]
    encoder = sharded.get_encoder()
    shard(
        sharded,
        [*blocks, *getattr(encoder, "block", getattr(encoder, "layers", []))],
        reshard_after_forward=True,
    )
    one, other, inputs = (
        StandardizedTransformer(plain),
        StandardizedTransformer(sharded),
        made.inputs_of(plain),
    )
    assert other.validation.counts == one.validation.counts
    results = []
    for model in (one, other):
        with torch.no_grad(), model.trace(**inputs):
            encoded, hidden = model.encoder_layers_output[1], model.layers_output[-1]
            results.append((encoded, hidden, model.logits, model.project_on_vocab(hidden)))
    for first, second in zip(*results, strict=True):
        same(first, second)


@once
def mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    _, sharded = both("llama", mp_policy=policy)
    model, ids = StandardizedTransformer(sharded), prompt_ids()
    with torch.no_grad():
        with model.trace(ids):
            hidden, logits = model.layers_output[1], model.logits
        same(logits, sharded(ids).logits)
    assert hidden.dtype == torch.bfloat16
    assert all(one.dtype == torch.float32 for one in sharded.model.layers.parameters())


@once
def split_over_processes() -> None:
    """Of two, by hand, and by no plan: a process has a slice of the heads."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model = build("llama")
    projection = model.model.layers[1].self_attn.q_proj
    mesh = init_device_mesh("cpu", (2,))
    projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))
    try:
        StandardizedTransformer(model)
    except InputError as error:
        assert str(error) == (
            "model.layers.1.self_attn.q_proj.weight is split over 2 processes, each of which computes with its own heads and "
            "neurons, and not by a plan that Transformers knows of: what a name gave would be a slice of what it means. Split the "
            "model by from_pretrained(..., distributed_config=DistributedConfig(tp_plan='auto')), or with "
            "torch.distributed.fsdp.fully_shard, which gathers parameters for each call."
        ), error
    else:
        raise AssertionError("it was not noticed")


def main() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = {}
    for name, check in CHECKS.items():
        if len(sys.argv) > 1 and not name.startswith(sys.argv[1]):
            continue
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
