"""Every standard name on every layer of every causal-LM type, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import releases
import torch
from reference import edited, hooked
from torch import Tensor, nn

import zoo
from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError
from zoo import support

#: Where the modules are, for three types whose places nobody could guess by the usual names: written by hand.
BY_HAND = {
    "dbrx": ("transformer.blocks.1", "norm_attn_norm.attn", "ffn"),
    "recurrent_gemma": ("model.layers.2", "temporal_block", "mlp_block"),
    "gpt_neo": ("transformer.h.1", "attn", "mlp"),
    "jetmoe": ("model.layers.1", "self_attention", "mlp"),
    "modernbert-decoder": ("model.layers.1", "attn", "mlp"),
    "nemotron_h": ("model.layers.2", "mixer", None),
    "xlstm": ("backbone.blocks.1", None, "ffn"),
}
MODULES = support.MODULES


@pytest.mark.parametrize("model_type", [t for t in zoo.TYPES if t not in zoo.REASONS])
def test_a_type(model_type: str) -> None:
    model = zoo.loaded(model_type)
    hf = model.hf_model
    assert support.rows()[model_type] == support.row(model_type, model), "python tests/zoo/support.py"
    states = support.rows(support.STATES, support.STATES_HEAD)
    assert states.get(model_type) == support.states_row(model_type, model), "python tests/zoo/support.py"
    ids = zoo.ids(hf)
    with torch.no_grad():
        plain = hf(input_ids=ids).logits
    reads_are_what_hooks_see(model, ids, plain)
    writes_are_what_hooks_do(model, ids, plain)
    patterns_can_be_edited(model, ids, plain)
    if model._head.refused == "":
        with torch.no_grad(), model.trace(ids):
            last = model.layers_output[-1]
        with torch.no_grad():
            assert close(model.project_on_vocab(last), plain)
    generates_with_an_edit(model, ids)


def there(model: StandardizedTransformer, name: str) -> list[int]:
    return [i for i, module in enumerate(getattr(model, name).modules) if module is not None]


def place(model: StandardizedTransformer, name: str, i: int) -> tuple[nn.Module, str]:
    return getattr(model, name).modules[i], name.rpartition("_")[2]


def reads_are_what_hooks_see(model: StandardizedTransformer, ids: Tensor, plain: Tensor) -> None:
    points = {(name, i): place(model, name, i) for name in MODULES for i in there(model, name)}
    expected = hooked(model.hf_model, lambda: model.hf_model(input_ids=ids), points)
    for name in support.NAMES:
        with torch.no_grad(), model.trace(input_ids=ids):
            values = {i: getattr(model, name)[i] for i in there(model, name)}
            assert torch.equal(model.logits, plain), name
        for i, value in values.items():
            assert name not in MODULES or torch.equal(value, expected[name, i]), (name, i)
        for i in {*range(model.num_layers)} - values.keys():
            with pytest.raises(NotInThisModelError, match="this layer has none: .."), model.trace(ids):
                getattr(model, name)[i]


def writes_are_what_hooks_do(model: StandardizedTransformer, ids: Tensor, plain: Tensor) -> None:
    def change(value: Tensor) -> Tensor:
        return 0.5 * value + torch.linspace(-1, 1, value.shape[-1])

    for name in MODULES:
        for i in there(model, name)[1:2]:
            expected = edited(lambda: model.hf_model(input_ids=ids).logits, *place(model, name, i), change)
            with torch.no_grad(), model.trace(input_ids=ids):
                getattr(model, name)[i] = change(getattr(model, name)[i])
                logits = model.logits
            assert torch.equal(logits, expected), (name, i)
            assert not close(logits, plain), (name, i)


def patterns_can_be_edited(model: StandardizedTransformer, ids: Tensor, plain: Tensor) -> None:
    for i in there(model, "attention_probabilities"):
        with torch.no_grad(), model.trace(input_ids=ids):
            pattern = model.attention_probabilities[i]
            model.attention_probabilities[i] = pattern.flip(-1)
            assert not close(model.logits, plain), i


def generates_with_an_edit(model: StandardizedTransformer, ids: Tensor) -> None:
    """Three tokens, with one layer's output changed in each step."""
    if not (layers := there(model, "layers_output")):
        return
    i = layers[:2][-1]  # not layer 1 on rwkv, which refuses it; the one that blt has
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    options |= {"decoder_start_token_id": 1, "num_return_sequences": 1}  # musicgen has no defaults for these
    module, kind = place(model, "layers_output", i)

    def change(hidden: Tensor) -> Tensor:
        return hidden + 3 * torch.linspace(-1, 1, hidden.shape[-1])

    generate: Callable[[], Any] = lambda: model.hf_model.generate(input_ids=ids, **options)  # noqa: E731
    expected = edited(generate, module, kind, change)
    with torch.no_grad(), model.generate(input_ids=ids, **options) as tracer:
        for _ in tracer.iter[:]:
            model.layers_output[i] = change(model.layers_output[i])
        assert torch.equal(tracer.result, expected)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


@pytest.mark.parametrize("model_type", BY_HAND)
def test_what_is_inferred_is_what_one_would_say(model_type: str) -> None:
    model = zoo.loaded(model_type)
    path, attention, mlp = BY_HAND[model_type]
    i = int(path.rpartition(".")[2])
    layer = model.hf_model.get_submodule(path)
    assert model.layers[i].module is layer
    for name, found in (("attentions_output", attention), ("mlps_output", mlp)):
        assert getattr(model, name).modules[i] is (None if found is None else layer.get_submodule(found))


def test_the_table_is_of_all_types() -> None:
    there = set(support.rows())
    new, gone = sorted(set(zoo.TYPES) - there), sorted(releases.missing(there, zoo.TYPES))
    assert (new, gone) == ([], []), f"not in the table: {new}; not in this release of transformers: {gone}"
