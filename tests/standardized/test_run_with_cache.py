"""`run_with_cache` and `read`: what plain hooks see, what a trace reads name by name, and the model's own logits."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import encoder_decoders
import peft
import pytest
import torch
import zoo
from architectures import PLACES, build, prompt_ids, shared
from reference import hooked
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, QuantoConfig

from nnatomy import StandardizedTransformer
from nnatomy.errors import (
    CacheError,
    InputError,
    LayerIndexError,
    NoSuchModuleError,
    NotInThisModelError,
    OutOfOrderError,
    OutsideTraceError,
)
from nnatomy.methods import direct_logit_attribution
from nnatomy.names import ROWS
from nnatomy.standardized import ActivationCache, LayerAccessor

TYPES = ("gpt2", "llama", "gemma2", "mixtral", "gpt_neox", "falcon")  # falcon changes an output in place
LENGTHS = (4, 9, 6)
#: Prompts of several lengths; of each, where its first token stands in the batch.
PROMPTS = [prompt_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
PADDED = [max(LENGTHS) - length for length in LENGTHS]


def wrapped(model_type: str, **options: Any) -> StandardizedTransformer:
    return StandardizedTransformer(shared(model_type), **options)


def points(model_type: str, hf: nn.Module) -> dict[Any, tuple[nn.Module, str]]:
    path, attention, mlp = PLACES[model_type]
    found: dict[Any, tuple[nn.Module, str]] = {}
    for i, layer in enumerate(hf.get_submodule(path)):
        found["layers_input", i] = layer, "input"
        found["layers_output", i] = layer, "output"
        found["attentions_output", i] = layer.get_submodule(attention), "output"
        if mlp is not None and model_type != "mixtral":
            found["mlps_output", i] = layer.get_submodule(mlp), "output"
    return found


def accessors(model: StandardizedTransformer) -> dict[str, LayerAccessor]:
    return {name: one for name, one in vars(model).items() if isinstance(one, LayerAccessor)}


def there(model: StandardizedTransformer) -> set[tuple[str, int]]:
    """The names and layers that a model has."""
    rows = {(name, i) for name, one in accessors(model).items() for i, mod in enumerate(one.modules) if mod is not None}
    return {(name, i) for name, i in rows if not name.endswith("values_weighted")}


def read_one_by_one(model: StandardizedTransformer, keys: Any, prompts: Any, **kwargs: Any) -> dict[Any, Tensor]:
    """Each name in a trace of its own."""
    found = {}
    for name in dict.fromkeys(name for name, _ in keys):
        layers = [layer for other, layer in keys if other == name]
        with model.trace(prompts, **kwargs):
            for layer in layers:
                found[name, layer] = getattr(model, name)[layer]
    return found


def same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def at_end(values: Tensor, name: str, kept: int) -> Tensor:
    """The last positions of a batch that is padded on the left."""
    axis = 2 if ROWS[name].axes[2] in ("query", "key") else 1
    return values.narrow(axis, values.shape[axis] - kept, kept)


# What is in it.


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_all_names_are_what_hooks_and_traces_see(model_type: str) -> None:
    model, hf, ids = wrapped(model_type), shared(model_type), prompt_ids()
    plain = hf(ids).logits
    logits, cache = model.run_with_cache(ids)
    assert torch.equal(logits, plain)
    assert cache.tensors.keys() == there(model)
    assert {name for name, _ in cache.tensors} == {*cache}
    assert same(cache.tensors, read_one_by_one(model, cache.tensors, ids))
    for (name, layer), expected in hooked(hf, lambda: hf(ids), points(model_type, hf)).items():
        assert torch.equal(cache[name, layer], expected), (name, layer)
    eager = build(model_type, attn_implementation="eager")
    for layer, pattern in enumerate(eager(ids, output_attentions=True).attentions):
        assert torch.allclose(cache.attention_probabilities[layer], pattern, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("class_name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_both_parts_of_an_encoder_decoder(class_name: str) -> None:
    hf: Any = encoder_decoders.build(class_name)
    model, given = StandardizedTransformer(hf), encoder_decoders.inputs_of(hf)
    plain = hf(**given).logits
    logits, cache = model.run_with_cache(given)
    assert torch.equal(logits, plain)
    assert cache.tensors.keys() == there(model)
    assert {"encoder_layers_output", "encoder_queries", "cross_attention_probabilities"} <= {*cache}
    assert same(cache.tensors, read_one_by_one(model, cache.tensors, given))
    parts = {"encoder_layers_output": hf.get_encoder(), "layers_output": hf.get_decoder()}
    blocks = {name: part.block if hasattr(part, "block") else part.layers for name, part in parts.items()}
    where = {(name, i): (layer, "output") for name, layers in blocks.items() for i, layer in enumerate(layers)}
    for (name, layer), expected in hooked(hf, lambda: hf(**given), where).items():
        assert torch.equal(cache[name, layer], expected), (name, layer)


@torch.no_grad()
def test_layers_of_several_kinds() -> None:
    model = zoo.loaded("jamba")
    ids = zoo.ids(model.hf_model)
    logits, cache = model.run_with_cache(ids)
    assert torch.equal(logits, model.hf_model(ids).logits)
    assert cache.tensors.keys() == there(model)
    assert cache.queries.layers == tuple(model.attention_layers)
    assert 0 < len(cache.queries) < model.num_layers
    assert same(cache.tensors, read_one_by_one(model, cache.tensors, ids))
    one = next(i for i in range(model.num_layers) if i not in model.attention_layers)
    with pytest.raises(CacheError, match=rf"^queries\[{one}\] is not in the cache: of that name it has layers "):
        cache.queries[one]
    both = [one, model.attention_layers[0]]
    found = model.run_with_cache(ids, layers=both)[1]
    assert found.tensors.keys() == {key for key in cache.tensors if key[1] in both}
    with pytest.raises(NotInThisModelError, match=rf"queries\[{one}\]: this layer has none"):
        model.run_with_cache(ids, "queries", layers=[one])


@torch.no_grad()
def test_edits_of_a_view_act() -> None:
    base, ids = wrapped("llama"), prompt_ids()
    vector = torch.ones(base.hidden_size)
    model = base.edit(lambda: base.steer(1, vector, factor=3.0))
    logits, cache = model.run_with_cache(ids)
    assert torch.equal(logits, model(ids).logits)
    assert same(cache.tensors, read_one_by_one(model, cache.tensors, ids))
    _, plain = base.run_with_cache(ids)
    assert torch.equal(cache.layers_output[0], plain.layers_output[0])
    assert torch.equal(cache.layers_output[1], plain.layers_output[1] + 3.0 * vector)
    assert not torch.equal(cache.attention_probabilities[2], plain.attention_probabilities[2])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_half_precision(model_type: str) -> None:
    model, ids = StandardizedTransformer(build(model_type).to(torch.bfloat16)), prompt_ids()
    logits, cache = model.run_with_cache(ids)
    assert torch.equal(logits, model.hf_model(ids).logits)
    assert same(cache.tensors, read_one_by_one(model, cache.tensors, ids))
    assert cache.layers_output[0].dtype == torch.bfloat16


@torch.no_grad()
def test_quantized(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    model, ids = StandardizedTransformer(hf), prompt_ids()
    logits, cache = model.run_with_cache(ids)
    assert torch.equal(logits, hf(ids).logits)
    assert same(cache.tensors, read_one_by_one(model, cache.tensors, ids))


@torch.no_grad()
def test_prompts_of_every_kind_and_arguments_of_the_model() -> None:
    model = StandardizedTransformer("demo:gpt2")
    texts = ["The capital of France is", "Japan is in"]
    encoded = model.prepare(texts)
    for prompts in (texts, encoded, [model.to_tokens(text)[0] for text in texts]):
        logits, cache = model.run_with_cache(prompts)
        assert torch.equal(logits, model.hf_model(**encoded).logits)
        assert torch.equal(cache.layers_output[2], model.run_with_cache(texts)[1].layers_output[2])
    logits, _ = model.run_with_cache(texts[0], "layers_output", logits_to_keep=1)
    assert logits.shape == (1, 1, model.vocab_size)
    with pytest.raises(InputError, match="logits_to_kep"):
        model.run_with_cache(texts, logits_to_kep=1)
    right = model.run_with_cache(texts, "layers_output", positions=-1, padding_side="right")[1]
    left = model.run_with_cache(texts, "layers_output", positions=-1)[1]
    assert torch.allclose(right.stack("layers_output"), left.stack("layers_output"), atol=1e-4)


@torch.no_grad()
def test_a_model_without_a_head() -> None:
    model = StandardizedTransformer(shared("llama").model)
    logits, cache = model.run_with_cache(prompt_ids())
    assert logits is None
    assert torch.equal(cache.layers_output[0], wrapped("llama").run_with_cache(prompt_ids())[1].layers_output[0])


# What of it is kept.


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES[:5])
def test_positions_are_the_prompts_own(model_type: str) -> None:
    model = wrapped(model_type)
    whole = model.run_with_cache(PROMPTS)[1].tensors
    for positions in (-1, [-1], torch.tensor([-1]), slice(-1, None)):
        cut = model.run_with_cache(PROMPTS, positions=positions)[1].tensors
        assert same(cut, {key: at_end(value, key[0], 1) for key, value in whole.items()})
    cut = model.run_with_cache(PROMPTS, positions=slice(-3, None))[1].tensors
    assert same(cut, {key: at_end(value, key[0], 3) for key, value in whole.items()})
    wanted = [1, -2]
    cut = model.run_with_cache(PROMPTS, ["layers_output", "attention_probabilities", "keys"], positions=wanted)[
        1
    ].tensors
    for (name, layer), value in cut.items():
        for row, (length, pad) in enumerate(zip(LENGTHS, PADDED, strict=True)):
            columns = [pad + 1, pad + length - 2]
            expected = whole[name, layer][row]
            expected = expected[columns] if name == "layers_output" else expected[:, columns]
            assert torch.equal(value[row], expected)


@torch.no_grad()
def test_positions_of_an_encoder_are_its_own() -> None:
    hf: Any = encoder_decoders.build("T5ForConditionalGeneration")
    model = StandardizedTransformer(hf)
    given = {
        "input_ids": PROMPTS,
        "decoder_input_ids": encoder_decoders.inputs_of(hf)["decoder_input_ids"][:1].expand(3, -1),
    }
    whole, cut = (model.run_with_cache(given, positions=one)[1] for one in (None, -1))
    for row, length in enumerate(LENGTHS):  # padded on the right
        assert torch.equal(cut.encoder_layers_output[1][row, 0], whole.encoder_layers_output[1][row, length - 1])
        assert torch.equal(
            cut.encoder_attention_scores[1][row, :, 0], whole.encoder_attention_scores[1][row, :, length - 1]
        )
        assert torch.equal(cut.layers_output[1][row, 0], whole.layers_output[1][row, -1])
        pattern = cut.cross_attention_probabilities[1]
        assert torch.equal(pattern[row, :, 0], whole.cross_attention_probabilities[1][row, :, -1])


@torch.no_grad()
def test_names_layers_dtype_and_device() -> None:
    model, ids = wrapped("mixtral"), prompt_ids()
    whole = model.run_with_cache(ids)[1].tensors
    _, cache = model.run_with_cache(ids, ["routers_experts", "layers_output"], layers=[0, -1], dtype=torch.float16)
    assert [*cache.tensors] == [
        ("routers_experts", 0),
        ("routers_experts", 2),
        ("layers_output", 0),
        ("layers_output", 2),
    ]
    for key, value in cache.tensors.items():
        assert torch.equal(value, whole[key] if key[0] == "routers_experts" else whole[key].half())
    assert model.run_with_cache(ids, layers=slice(1, None))[1].tensors.keys() == {key for key in whole if key[1] >= 1}
    assert model.run_with_cache(ids, layers=1)[1].tensors.keys() == {key for key in whole if key[1] == 1}
    assert model.run_with_cache(ids, "layers_output", device="meta")[1].layers_output[0].device.type == "meta"
    assert same(model.run_with_cache(ids, device="cpu")[1].tensors, whole)
    assert "values_weighted" in model.run_with_cache(ids, "values_weighted")[1]


@torch.no_grad()
@pytest.mark.parametrize("options", [{"positions": -1}, {"dtype": torch.bfloat16}, {"names": "mlps_output"}])
def test_it_is_cut_while_the_model_runs(options: dict[str, Any]) -> None:
    model = wrapped("llama")
    layers: Any = model.hf_model.model.layers
    outputs, alive = [], []
    handles = [
        layers[0].register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output))),
        layers[2].register_forward_pre_hook(lambda *_: alive.append(outputs[-1]() is not None)),
    ]
    model.run_with_cache(prompt_ids(), "layers_output")
    _, cache = model.run_with_cache(prompt_ids(), **{"names": "layers_output", **options})
    for handle in handles:
        handle.remove()
    assert alive == [True, False]
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in cache.tensors.values())


def test_values_hold_on_to_the_graph_where_gradients_are_on() -> None:
    model, ids = wrapped("gpt2"), prompt_ids()
    logits, cache = model.run_with_cache(ids, positions=slice(0, None))
    (found,) = torch.autograd.grad(
        logits[:, -1, 5].sum(), model.run_with_cache(ids)[1].layers_output[0], allow_unused=True
    )
    assert found is None  # of another pass
    logits, cache = model.run_with_cache(ids)
    (found,) = torch.autograd.grad(logits[:, -1, 5].sum(), cache.layers_output[0])
    with model.trace(ids):
        hidden = model.layers_output[0]
        target = model.logits[:, -1, 5].sum()
    assert torch.equal(found, torch.autograd.grad(target, hidden)[0])
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids)
    assert not logits.requires_grad
    assert not any(value.requires_grad for value in cache.tensors.values())


# In a trace.


@torch.no_grad()
def test_two_slices_are_one_read() -> None:
    model, ids = wrapped("llama"), prompt_ids()
    expected = read_one_by_one(
        model, [(n, i) for n in ("layers_output", "attention_probabilities") for i in range(3)], ids
    )
    with pytest.raises(OutOfOrderError, match=re.escape('model.read("layers_output", "attention_probabilities")')):
        with model.trace(ids):
            model.layers_output[:]
            model.attention_probabilities[:]
    with model.trace(ids):
        found = model.read("layers_output", "attention_probabilities")
        logits = model.logits
    assert same(found.tensors, expected)
    assert torch.equal(logits, shared("llama")(ids).logits)
    with pytest.raises(
        OutOfOrderError, match=r"layers_output\[0\] was asked for at .*, but the forward pass is already past it"
    ):
        with model.trace(ids):
            model.layers_output[1]
            model.read("layers_output", "queries")
    with pytest.raises(OutsideTraceError):
        model.read("layers_output")


@torch.no_grad()
def test_each_block_reads_its_own_rows() -> None:
    model = wrapped("gpt2")
    found: dict[int, Any] = {}
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            found[0] = model.read("layers_output", "attention_probabilities", positions=-1)
        with tracer.invoke(PROMPTS[1]):
            found[1] = model.read("layers_output", "attention_probabilities", positions=-1)
    whole = model.run_with_cache(PROMPTS[:2])[1]
    for row in (0, 1):
        expected = whole.layers_output[2][row : row + 1, -1:]
        assert torch.equal(found[row].layers_output[2], expected)
        pattern = whole.attention_probabilities[1][row : row + 1, :, -1:, PADDED[row] :]
        assert torch.equal(found[row].attention_probabilities[1], pattern)


@torch.no_grad()
def test_in_the_steps_of_a_generation() -> None:
    model = wrapped("gpt2")
    steps = []
    with model.generate(PROMPTS, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            steps.append(model.read("layers_output", "queries", positions=-1))
        tokens = tracer.result
    mask = (torch.arange(tokens.shape[1] - 1) >= torch.tensor(PADDED)[:, None]).long()
    whole = model.run_with_cache({"input_ids": tokens[:, :-1], "attention_mask": mask})[1]
    assert len(steps) == 3
    for step, cache in enumerate(steps):
        column = max(LENGTHS) - 1 + step
        assert torch.allclose(cache.layers_output[2], whole.layers_output[2][:, column : column + 1], atol=1e-4)
        assert torch.allclose(cache.queries[2], whole.queries[2][:, :, column : column + 1], atol=1e-4)


@torch.no_grad()
def test_in_the_first_step_of_an_encoder_decoder() -> None:
    hf: Any = encoder_decoders.build("T5ForConditionalGeneration")
    hf.generation_config.decoder_start_token_id = 0
    model = StandardizedTransformer(hf)
    whole = model.run_with_cache(PROMPTS)[1]  # the decoder reads its start alone
    for positions in (None, -1):
        with model.generate(PROMPTS, max_new_tokens=3):
            found = model.read(positions=positions)
        expected = whole if positions is None else model.run_with_cache(PROMPTS, positions=positions)[1]
        assert found.tensors.keys() == expected.tensors.keys()
        for key, value in expected.tensors.items():
            assert torch.allclose(found.tensors[key], value, atol=1e-4), key


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # peft, by a cache's name before 5.24
def test_what_a_wrapper_puts_before_prompts_has_no_position(kind: str) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    hf = peft.get_peft_model(build("llama"), config).eval()
    model, ids = StandardizedTransformer(hf), prompt_ids()
    logits, whole = model.run_with_cache(ids)
    assert torch.equal(logits, hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    names = ["layers_output", "attention_probabilities"]
    _, cut = model.run_with_cache(ids, names, positions=[0, -1])
    columns = [whole.layers_output[0].shape[1] - ids.shape[1], -1]
    assert torch.equal(cut.layers_output[1], whole.layers_output[1][:, columns])
    assert torch.equal(cut.attention_probabilities[1], whole.attention_probabilities[1][:, :, columns])
    if kind == "PrefixTuningConfig":  # whose keys come before those that the step computes
        with pytest.raises(
            InputError, match="keys: the values are of 2 rows and 12 positions, and the step computes 2 and 9"
        ):
            model.run_with_cache(ids, "keys", positions=-1)


# What is refused.


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"names": "blocks.5.hook_q"},
            InputError,
            "'blocks.5.hook_q' is no standard name of layers: give one of layers_input,",
        ),
        ({"names": "routers_logits"}, NotInThisModelError, "routers_logits[0]: this layer has none:"),
        (
            {"names": "cross_attentions_output"},
            NotInThisModelError,
            "cross_attentions_output: there is none: no layer attends",
        ),
        (
            {"names": "encoder_queries"},
            NotInThisModelError,
            "encoder_queries: there is none: the model is no encoder-decoder",
        ),
        ({"names": []}, InputError, "names=[]: give one standard name or several, or None for all."),
        ({"layers": 3}, LayerIndexError, "layers=3: the model has 3 layers, 0 to 2; none is 3."),
        ({"layers": [0, 7]}, LayerIndexError, "layers=[0, 7]: the model has 3 layers"),
        ({"layers": slice(3, None)}, InputError, "layers: give at least one."),
        ({"names": "layers_output", "layers": 3}, LayerIndexError, "layers_output[3]: the model has 3 layers, 0 to 2."),
        ({"device": "gpu"}, InputError, "device='gpu': "),
        ({"positions": 4}, InputError, "prompt 0 has 4 tokens, at 0 to 3 (or -4 to -1); there is no position 4."),
        (
            {"positions": slice(1, None)},
            InputError,
            "the prompts have 3, 8, 5 such positions. Of all prompts there have to be",
        ),
        ({"positions": slice(9, None)}, InputError, "the prompts have 0, 0, 0 such positions."),
    ],
)
def test_what_cannot_be_had_is_refused(options: Any, error: type[Exception], text: str) -> None:
    model, calls = wrapped("gpt2"), []
    handle = model.hf_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=re.escape(text)):
        model.run_with_cache(PROMPTS, **options)
    handle.remove()
    assert not calls or "positions" in options  # before anything is run


@torch.no_grad()
def test_the_reasons_are_the_names_own() -> None:
    model = wrapped("mixtral")
    for name, one in accessors(model).items():
        if not any(module is not None for module in one.modules):
            with pytest.raises(NotInThisModelError) as own:
                one.module(0)
            with pytest.raises(NotInThisModelError) as ours:
                model.run_with_cache(PROMPTS, name)
            assert str(own.value) == str(ours.value)


# The cache itself.


@torch.no_grad()
def test_it_is_read_by_name_and_layer() -> None:
    model, ids = wrapped("llama"), prompt_ids()
    _, cache = model.run_with_cache(ids, layers=[0, 2])
    assert torch.equal(cache.layers_output[-1], cache["layers_output", 2])
    assert torch.equal(cache["layers_output"].stack(), torch.stack([cache.layers_output[0], cache.layers_output[2]]))
    assert cache.stack("queries").shape == (2, *cache.queries[0].shape)
    assert cache.attention_probabilities.axes == ("batch", "head", "query", "key")
    assert [id(one) for one in cache.queries] == [id(cache.queries[i]) for i in (0, 2)]
    assert ("queries", 2) in cache
    assert "queries" in cache
    assert ("queries", 1) not in cache
    assert "layers_output" in dir(cache)
    assert repr(cache).startswith(f"<ActivationCache of {len(cache.tensors)} values, ")
    assert not hasattr(cache, "routers_logits")
    with pytest.raises(CacheError, match=r"^queries\[1\] is not in the cache: of that name it has layers 0, 2\.$"):
        cache.queries[:]
    with pytest.raises(CacheError, match="^'hook_q' is not in the cache, which has layers_input, "):
        cache["hook_q", 1]
    with pytest.raises(NoSuchModuleError, match="^'routers_logits' is not in the cache"):
        cache.routers_logits
    odd = ActivationCache({("keys", 0): torch.ones(1, 2), ("keys", 1): torch.ones(1, 3)}, {"keys": 2})
    with pytest.raises(CacheError, match=r"keys: the layers' values are of different shapes, \(1, "):
        odd.stack("keys")


@torch.no_grad()
def test_axes_are_named() -> None:
    _, cache = wrapped("llama").run_with_cache(prompt_ids(), layers=[0, 2])
    for name, axes in (
        ("layers_output", ("layer", "batch", "seq", "hidden")),
        ("attention_probabilities", ("layer", "batch", "head", "query", "key")),
    ):
        found = cache.to_xarray(name)
        assert (found.name, found.dims) == (name, axes)
        for layer in (0, 2):
            assert torch.equal(torch.tensor(found.sel(layer=layer).values), cache[name, layer])
    assert found.identical(cache[name].to_xarray())
    half = ActivationCache({("layers_output", 1): torch.ones(1, 2, 3).bfloat16()}, {"layers_output": 2})
    assert half.to_xarray("layers_output").sel(layer=1, seq=1).values.tolist() == [[1.0] * 3]
    with pytest.raises(CacheError, match="'queries' is not in the cache"):
        half.to_xarray("queries")


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_it_is_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    model, path = wrapped(model_type), tmp_path / "cache.safetensors"
    _, cache = model.run_with_cache(PROMPTS)
    cache.save(path)
    loaded = ActivationCache.load(path, model)
    assert [*loaded.tensors] == [*cache.tensors]
    assert same(loaded.tensors, cache.tensors)
    assert [*loaded] == [*cache]
    assert torch.equal(loaded.layers_output[-1], cache.layers_output[2])
    assert path.stat().st_size < sum(
        value.nbytes for value in cache.tensors.values()
    )  # what two names share is there once
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    for by in ("layer", "head") if model_type == "mixtral" else ("layer", "component", "head"):
        one, other = (each.logit_attribution(20, 31, by=by) for each in (cache, loaded))
        assert torch.equal(one.effect, other.effect)
    with pytest.raises(InputError, match=r"was loaded without its model: ActivationCache\.load\(path, model\)"):
        ActivationCache.load(path).logit_attribution(20)
    with pytest.raises(OSError, match="none"):
        cache.save(tmp_path / "none" / "cache.safetensors")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"was not written by ActivationCache\.save"):
        ActivationCache.load(path)


@torch.no_grad()
def test_a_cut_cache_with_a_graph_is_saved(tmp_path: Path) -> None:
    with torch.enable_grad():
        _, cache = wrapped("llama").run_with_cache(
            PROMPTS, ["queries", "layers_output"], positions=[0, -1], dtype=torch.bfloat16
        )
    cache.save(tmp_path / "cut")
    loaded = ActivationCache.load(tmp_path / "cut")
    assert same(loaded.tensors, cache.tensors)
    assert not loaded.queries[0].requires_grad


# Decompositions.


@pytest.mark.parametrize("model_type", TYPES[:5])
@pytest.mark.parametrize("by", ["layer", "component", "head"])
def test_a_logit_is_taken_apart_as_the_method_does(model_type: str, by: str) -> None:
    model = wrapped(model_type)
    with torch.no_grad():
        plain, cache = model.run_with_cache(PROMPTS)
    for position in (-1, 1):
        found = cache.logit_attribution(20, 31, by=by, position=position)
        expected = direct_logit_attribution(model, PROMPTS, answer=20, wrong=31, by=by, position=position)
        assert found.parts == expected.parts
        assert torch.equal(found.effect, expected.effect)
        columns = [pad + position % length for pad, length in zip(PADDED, LENGTHS, strict=True)]
        logits = plain[range(3), columns]
        assert torch.allclose(found.logits, logits[:, 20] - logits[:, 31], atol=1e-4)
        assert torch.allclose(found.effect.sum(-1), found.logits, atol=1e-4)


@torch.no_grad()
def test_it_is_taken_apart_where_positions_are_cut() -> None:
    model = wrapped("llama")
    whole = model.run_with_cache(PROMPTS)[1]
    cut = model.run_with_cache(PROMPTS, positions=[0, -1])[1]
    for position in (0, -1):
        one, other = (each.logit_attribution(20, position=position) for each in (whole, cut))
        assert one.parts == other.parts
        assert torch.allclose(one.effect, other.effect, atol=1e-6)
    with pytest.raises(InputError, match=r"position=1: of prompt 0 it is not in the cache\."):
        cut.logit_attribution(20, position=1)
    with model.trace(PROMPTS):
        read = model.read("layers_input", "layers_output")
    assert torch.equal(read.logit_attribution(20, by="layer").effect, whole.logit_attribution(20, by="layer").effect)
    with pytest.raises(
        CacheError, match="'mixers_contribution' is not in the cache, which has layers_input, layers_output: name it"
    ):
        read.logit_attribution(20)
    with pytest.raises(
        InputError, match="by='head' runs the model on the prompts once more, and this cache does not have them"
    ):
        read.logit_attribution(20, by="head")
    with pytest.raises(InputError, match="by='neuron': take 'layer', 'component' or 'head'"):
        whole.logit_attribution(20, by="neuron")


def test_of_an_edited_view_and_an_encoder_decoder() -> None:
    base = wrapped("gpt2")
    model = base.edit(lambda: base.steer(1, torch.ones(base.hidden_size), factor=3.0))
    t5 = StandardizedTransformer(encoder_decoders.build("T5ForConditionalGeneration"))
    for one, prompts in ((model, PROMPTS), (t5, encoder_decoders.inputs_of(t5.hf_model))):
        with torch.no_grad():
            _, cache = one.run_with_cache(prompts)
        for by in ("layer", "component", "head"):
            expected = direct_logit_attribution(one, prompts, answer=20, by=by)
            assert torch.equal(cache.logit_attribution(20, by=by).effect, expected.effect)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "roberta"])
@pytest.mark.parametrize("by", ["layer", "component"])
def test_where_the_stream_is_no_sum_the_method_says_why(model_type: str, by: str) -> None:
    model = zoo.loaded(model_type)
    ids = zoo.ids(model.hf_model)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    try:
        expected = direct_logit_attribution(model, ids, answer=5, by=by)
    except NotInThisModelError as error:
        with pytest.raises(NotInThisModelError) as found:
            cache.logit_attribution(5, by=by)
        assert str(found.value) == str(error)
    else:
        assert (model_type, by) == ("roberta", "layer")
        assert torch.equal(cache.logit_attribution(5, by=by).effect, expected.effect)


def test_a_model_of_which_no_layer_has_a_name_says_why() -> None:
    model = zoo.loaded("reformer")
    with pytest.raises(NotInThisModelError, match=r"^layers_output\[0\]: this layer has none: "):
        model.run_with_cache(zoo.ids(model.hf_model))


@torch.no_grad()
def test_a_kv_cache_of_the_callers_is_run_on_from() -> None:
    model, ids = wrapped("gpt2"), prompt_ids()
    past = model.hf_model(ids[:, :5], use_cache=True).past_key_values
    whole = model.run_with_cache(ids, "layers_output")[1]
    logits, cache = model.run_with_cache(ids[:, 5:], "layers_output", past_key_values=past)
    assert torch.allclose(cache.layers_output[2], whole.layers_output[2][:, 5:], atol=1e-4)
    assert logits.shape[1] == 4
    with pytest.raises(InputError, match="this cache does not have them"):
        cache.logit_attribution(20, by="head")


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "run_with_cache.md").read_text()
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"<run_with_cache.md, block {number}>", "exec"), names)
    (table,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out.endswith(table)
