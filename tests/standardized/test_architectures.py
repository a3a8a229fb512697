"""Every name on every layer of every architecture, against plain hooks and the model's own outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import LONG_HEAD, PLACES, TYPES, build, prompt_ids, shared
from reference import edited, hooked, in_memory_of_its_own
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError

ACCESSORS = (
    "layers_input",
    "attentions_input",
    "attentions_output",
    "mlps_input",
    "mlps_output",
    "layers_output",
)
pytestmark = pytest.mark.parametrize("model_type", TYPES)
_loaded: dict[str, StandardizedTransformer] = {}


@pytest.fixture
def model(model_type: str) -> StandardizedTransformer:
    if model_type not in _loaded:
        _loaded[model_type] = StandardizedTransformer(shared(model_type))
    return _loaded[model_type]


def places(model_type: str, hf: nn.Module) -> dict[tuple[str, int], tuple[nn.Module, str]]:
    """(accessor, layer) -> (module, "input" or "output"), from the table written by hand."""
    layers, attention, mlp = PLACES[model_type]
    found: dict[tuple[str, int], tuple[nn.Module, str]] = {}
    for i, layer in enumerate(hf.get_submodule(layers)):
        for name in ACCESSORS:
            what, kind = name.split("_")
            child = {"layers": "", "attentions": attention, "mlps": mlp}[what]
            if child is not None:
                found[name, i] = (layer.get_submodule(child), kind)
    return found


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def plain_logits(model: StandardizedTransformer, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model.hf_model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits


def in_order(model: StandardizedTransformer, model_type: str) -> list[tuple[str, int]]:
    """The points in the order in which this model comes to them, seen by plain hooks."""
    ids = prompt_ids()
    return list(hooked(model.hf_model, lambda: model.hf_model(ids), places(model_type, model.hf_model)))


def test_loads_from_a_saved_folder_and_validates(model_type: str, tmp_path: Any) -> None:
    hf = shared(model_type)
    hf.save_pretrained(tmp_path)
    model = StandardizedTransformer(tmp_path, attn_implementation=hf.config._attn_implementation)
    config = model.config.get_text_config()
    assert (model.num_layers, model.hidden_size) == (config.num_hidden_layers, 32)
    assert model._head.short == (model_type not in LONG_HEAD)
    in_memory_of_its_own(model.hf_model)
    ids = prompt_ids()
    assert torch.equal(plain_logits(model, ids), plain_logits(StandardizedTransformer(shared(model_type)), ids))


def test_reading_everything_is_what_hooks_see_and_leaves_the_logits_bit_identical(
    model: StandardizedTransformer, model_type: str
) -> None:
    ids = prompt_ids()
    plain = plain_logits(model, ids)
    found = places(model_type, model.hf_model)
    expected = hooked(model.hf_model, lambda: model.hf_model(input_ids=ids), found)
    with torch.no_grad(), model.trace(ids):
        values = {}
        for name, i in in_order(model, model_type):
            if name == "attentions_output":
                values["attention_probabilities", i] = model.attention_probabilities[i]
            values[name, i] = getattr(model, name)[i]
        logits = model.logits
    assert torch.equal(logits, plain)
    for point, value in expected.items():
        assert torch.equal(values[point], value), point
    assert len(values) == len(expected) + model.num_layers


def test_slices_and_negative_indices_read_the_same(model: StandardizedTransformer, model_type: str) -> None:
    ids = prompt_ids()
    expected = hooked(model.hf_model, lambda: model.hf_model(input_ids=ids), places(model_type, model.hf_model))
    for name in ACCESSORS:
        if (name, 0) not in expected:
            continue
        layers = range(model.num_layers)
        with torch.no_grad(), model.trace(ids):
            some = getattr(model, name)[1:]
        with torch.no_grad(), model.trace(ids):
            last = getattr(model, name)[-1]
        assert all(torch.equal(value, expected[name, i]) for value, i in zip(some, layers[1:], strict=True)), name
        assert torch.equal(last, expected[name, layers[-1]])


def test_writing_is_what_a_hook_returning_the_same_does(model: StandardizedTransformer, model_type: str) -> None:
    ids = prompt_ids()
    plain = plain_logits(model, ids)
    ramp = torch.linspace(-1, 1, model.hidden_size)
    for (name, i), (module, kind) in places(model_type, model.hf_model).items():
        with torch.no_grad(), model.trace(ids):
            accessor = getattr(model, name)
            accessor[i] = accessor[i] * 0.5 + ramp
            logits = model.logits
        expected = edited(lambda: model.hf_model(input_ids=ids), module, kind, lambda h: h * 0.5 + ramp).logits
        assert torch.equal(logits, expected), (name, i)
        assert not torch.equal(logits, plain), (name, i)


def test_a_standard_name_of_what_is_not_there_refuses(model: StandardizedTransformer, model_type: str) -> None:
    if PLACES[model_type][2] is None:
        with model.trace(prompt_ids()), pytest.raises(NotInThisModelError, match="fc1"):
            model.mlps_output[0]
        with pytest.raises(NotInThisModelError, match="two linears"):
            model.layers[0].mlp
    else:
        assert model.layers[0].mlp.module is places(model_type, model.hf_model)["mlps_input", 0][0]
    assert model.layers[1].self_attn.module is places(model_type, model.hf_model)["attentions_input", 1][0]


def test_attention_probabilities_are_the_models_own(model: StandardizedTransformer, model_type: str) -> None:
    """Against `output_attentions` of the same weights in eager mode, on every implementation there is."""
    ids = prompt_ids()
    eager = build(model_type, attn_implementation="eager")
    eager.load_state_dict(shared(model_type).state_dict())
    with torch.no_grad():
        expected = eager(input_ids=ids, output_attentions=True).attentions
    for checked in (model, StandardizedTransformer(eager)):
        with torch.no_grad(), checked.trace(ids):
            patterns = checked.attention_probabilities[:]
        for pattern, own in zip(patterns, expected, strict=True):
            assert pattern.shape == (2, model.num_heads, 9, 9)
            assert close(pattern, own.view_as(pattern))


def test_writing_a_pattern_does_what_that_pattern_means(model: StandardizedTransformer, model_type: str) -> None:
    """The pattern as it was gives the logits as they were; halved, it halves what the heads bring."""
    ids = prompt_ids()
    plain = plain_logits(model, ids)
    for layer in range(model.num_layers):
        with torch.no_grad(), model.trace(ids):
            model.attention_probabilities[layer] = model.attention_probabilities[layer].clone()
            same = model.logits
        assert close(same, plain, 1e-4), layer
        with torch.no_grad(), model.trace(ids):
            model.attention_probabilities[layer] = model.attention_probabilities[layer] * 0
            assigned = model.logits
        with torch.no_grad(), model.trace(ids):
            model.attention_probabilities[layer][:] = 0
            in_place = model.logits
        assert torch.equal(assigned, in_place)
        assert not close(assigned, plain, 1e-3), layer


def test_the_head_is_exact(model: StandardizedTransformer, model_type: str) -> None:
    ids = prompt_ids(seed=3)
    with torch.no_grad(), model.trace(ids):
        last = model.layers_output[-1]
        logits = model.logits
    with torch.no_grad():
        for mine in (model.project_on_vocab(last), model._head.long_way(last)):
            assert close(mine, logits)
        assert close(model.project_on_vocab(last[0, -1]), logits[0, -1])
        if model_type in LONG_HEAD:  # else this test could not fail
            naive = model._head.short_way(last) if model_type != "opt" else last @ torch.ones(32, logits.shape[-1])
            assert not close(naive, logits, 1e-2)


def test_a_prompt_gives_the_same_alone_and_in_a_batch(model: StandardizedTransformer, model_type: str) -> None:
    long, short = prompt_ids(1, 9, 1)[0].tolist(), prompt_ids(1, 4, 2)[0].tolist()
    with torch.no_grad(), model.trace([long, short]):
        last_layer = model.layers_output[-1]
        together = model.logits
    for row, prompt in ((0, long), (1, short)):
        with torch.no_grad(), model.trace(prompt):
            alone_layer = model.layers_output[-1]
            alone = model.logits
        assert close(together[row, -len(prompt) :], alone[0], 1e-4)
        assert close(last_layer[row, -len(prompt) :], alone_layer[0], 1e-4)


def test_skipping_a_layer_is_that_layer_giving_its_input(model: StandardizedTransformer, model_type: str) -> None:
    ids = prompt_ids()
    layer = places(model_type, model.hf_model)["layers_input", 1][0]
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        seen["more"] = [] if isinstance(output, Tensor) else [one for one in output[1:] if one is not None]
        return seen["input"] if isinstance(output, Tensor) else (seen["input"], *output[1:])

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True), layer.register_forward_hook(replace)]
    expected = plain_logits(model, ids)
    without_cache = plain_logits(model, ids, use_cache=False)  # whose keys lie and are rounded otherwise
    for handle in handles:
        handle.remove()
    with torch.no_grad(), model.trace(ids):
        model.skip_layer(1)
        logits = model.logits
    assert torch.equal(logits, expected)
    # With no KV cache to leave keys in, nothing of the layer is computed, but for what it returns beside hidden states.
    calls = []
    handle = next(layer.children()).register_forward_hook(lambda *_: calls.append(1) and None)
    with torch.no_grad(), model.trace(ids, use_cache=False):
        model.skip_layer(1)
        logits = model.logits
    handle.remove()
    assert torch.equal(logits, without_cache)
    assert bool(calls) == bool(seen["more"])


def test_generation_with_an_edit_in_one_step(model: StandardizedTransformer, model_type: str) -> None:
    """Three tokens; the edit of step 1 against a hook that counts the calls."""
    ids = prompt_ids(2, 6)
    layer = places(model_type, model.hf_model)["layers_output", 1][0]
    arguments: dict[str, Any] = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    count = 0

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count != 2:
            return None
        return output * -1 if isinstance(output, Tensor) else (output[0] * -1, *output[1:])

    handle = layer.register_forward_hook(hook)
    expected_sizes: list[tuple[int, ...]] = []

    def keep_size(_: nn.Module, __: Any, kwargs: Any) -> None:
        expected_sizes.append(tuple(kwargs["input_ids"].shape))

    sizes_handle = model.hf_model.register_forward_pre_hook(keep_size, with_kwargs=True)
    expected = model.hf_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    handle.remove()
    sizes_handle.remove()
    sizes = []
    with model.generate(ids, **arguments) as tracer:
        for step in tracer.iter[:]:
            sizes.append(tuple(model.input_size))
            if step == 1:
                model.layers_output[1] = -1 * model.layers_output[1]
        result = tracer.result
    assert torch.equal(result.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(result.logits, expected.logits, strict=True))
    assert sizes == expected_sizes
    assert len(sizes) == 3
    with torch.no_grad():
        untouched = model.hf_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    assert not torch.equal(untouched.logits[1], result.logits[1])
