"""Layers left out, of every kind and with every kind of cache, held against a plain hook.

The reference is the model's own code, in which a hook of PyTorch's puts a layer's input in the place of the hidden states that
it gives: what the layer leaves in caches, and for other layers, is its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.standardized.hidden import input_of, with_output

#: Shared attention, and layers that give later ones something: keys and values (Gemma 3n, 4), a choice of keys (GLM, Hy), a
#: router's state (Zaya), a state of their own (RWKV, xLSTM).
LEAVING = (
    "llama",
    "jamba",
    "zamba2",
    "gemma3n_text",
    "gemma4_text",
    "glm_moe_dsa",
    "hy_v4",
    "zaya",
    "rwkv",
    "xlstm",
)
#: What a generation keeps what it has computed in, and types with a kind of layer each: windows, latent attention, other value
#: heads, states of recurrences and convolutions, compressed and indexed keys.
STATIC = {"cache_implementation": "static"}
IN_CHUNKS = {"prefill_chunk_size": 4}
CACHES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in ("deepseek_v3", "zamba2", "minimax", "deepseek_v4", "rwkv", "hy_v4")),
    *((model_type, STATIC) for model_type in ("llama", "gemma2", "deepseek_v3", "jamba", "lfm2", "gemma4_text")),
    *((model_type, IN_CHUNKS) for model_type in ("llama", "gemma2")),
]
each_cache = pytest.mark.parametrize(
    ("model_type", "how"), CACHES, ids=[f"{model_type}-{'-'.join(how)}" for model_type, how in CACHES]
)
GENERATE: dict[str, Any] = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "use_cache": True,
}


@functools.cache
def loaded(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo.shared(model_type), validate=False)


@contextmanager
def left_out(layer: nn.Module) -> Iterator[None]:
    """The layer runs, and its input takes the place of the hidden states that it gives."""
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, output: with_output(output, input_of((args, kwargs))), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def logits_of_steps(model: StandardizedTransformer, generate: Callable[[], Any]) -> Tensor:
    steps: list[Tensor] = []
    handle = model.hf_model.register_forward_hook(lambda _, __, output: steps.append(output.logits[:, -1]))
    try:
        with torch.no_grad():
            generate()
    finally:
        handle.remove()
    return torch.stack(steps)


def skip_once(model: StandardizedTransformer, layer: int) -> None:
    """What is looked up about a layer at its first skip runs the model: before its passes are counted."""
    with torch.no_grad(), model.trace(zoo.ids(model.hf_model)):
        model.skip_layer(layer)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("model_type", LEAVING)
def test_in_a_trace(model_type: str, use_cache: bool) -> None:
    model = loaded(model_type)
    ids = zoo.ids(model.hf_model)
    for layer in range(model.num_layers):
        with torch.no_grad(), left_out(model.layers[layer].module):
            expected = model(ids, use_cache=use_cache).logits
        with torch.no_grad(), model.trace(ids, use_cache=use_cache):
            model.skip_layer(layer)
            logits = model.logits
        assert torch.equal(logits, expected), layer


@each_cache
def test_in_every_step(model_type: str, how: dict[str, Any]) -> None:
    """Of the first layer, from whose cache positions are counted, and of another."""
    model = loaded(model_type)
    ids, how = zoo.ids(model.hf_model, seq=6), {**GENERATE, **how}
    plain = logits_of_steps(model, lambda: model.hf_model.generate(ids, **how))
    for layer in (0, 1):
        skip_once(model, layer)
        view = model.edit(lambda layer=layer: model.skip_layer(layer))
        with left_out(model.layers[layer].module):
            expected = logits_of_steps(model, lambda: model.hf_model.generate(ids, **how))
        logits = logits_of_steps(model, lambda view=view: view.generate(ids, **how).run())
        assert torch.equal(logits, expected), layer
        assert not torch.allclose(logits, plain, atol=1e-2)


@each_cache
def test_a_layer_that_was_left_out_and_runs_later_shows_it(model_type: str, how: dict[str, Any]) -> None:
    """Where later layers go by its keys, or its choice of keys, these are its own all the time."""
    model = loaded(model_type)
    ids, how = zoo.ids(model.hf_model, seq=6), {**GENERATE, **how}
    chunks = -(-6 // how.get("prefill_chunk_size", 6))
    with torch.no_grad(), model.generate(ids, **how) as tracer:
        for step in tracer.iter[: chunks + 1]:
            if step < chunks:
                model.skip_layer(1)
            later = model.layers_output[1]
    assert later.isnan().all(-1).any() != (model_type in ("gemma4_text", "hy_v4"))
