"""Activation patching against one forward pass for each patch, with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from architectures import PLACES, TYPES, VOCAB, prompt_ids, shared
from reference import edited, hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import activation_patching, logit_difference
from nnatomy.methods.patched_runs import is_close

FEW = ("gpt2", "llama", "gemma2", "cohere", "granite", "gpt_oss", "bloom", "mixtral", "mpt")
HYBRIDS = ("falcon_h1", "jamba", "lfm2", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2")
SHARING = ("gemma4_text", "zaya")  # layers that need what earlier ones have left beside the stream
CLEAN, CORRUPTED = prompt_ids(seed=1), prompt_ids(seed=2)
METRIC = logit_difference([20, 30], [40, 50])


def one_by_one(hf: nn.Module, modules: list[nn.Module], kind: str, source: Tensor, base: Tensor) -> Tensor:
    """The naive way: a forward pass for each (layer, position)."""
    values = hooked(hf, lambda: hf(source), {i: (module, kind) for i, module in enumerate(modules)})
    effect = torch.zeros(len(base), len(modules), base.shape[1])
    for i, module in enumerate(modules):
        for position in range(base.shape[1]):

            def put(value: Tensor, i: int = i, position: int = position) -> Tensor:
                value = value.clone()
                value[:, position] = values[i][:, position]
                return value

            effect[:, i, position] = METRIC(edited(lambda: hf(base), module, kind, put).logits[:, -1])
    return effect


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def patched(hf: Any, **options: Any) -> Any:
    options = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "progress": False, **options}
    return activation_patching(StandardizedTransformer(hf), **options)


def modules_of(hf: nn.Module, part: int, model_type: str) -> list[nn.Module]:
    layers = list(hf.get_submodule(PLACES[model_type][0]))
    inner = PLACES[model_type][part]
    return [layer.get_submodule(inner) for layer in layers] if part and inner else layers


@pytest.mark.parametrize("model_type", TYPES)
def test_each_cell_is_one_forward_pass_with_that_value_put_in(model_type: str) -> None:
    hf = shared(model_type)
    found = patched(hf)
    expected = one_by_one(hf, modules_of(hf, 0, model_type), "output", CLEAN, CORRUPTED)
    assert same(found.effect, expected)
    assert not same(found.effect, expected.flip(1)), "the layers have to differ"
    assert found.shortcut
    assert torch.allclose(found.clean, METRIC(hf(CLEAN).logits[:, -1]), rtol=1e-4)
    assert torch.allclose(found.corrupted, METRIC(hf(CORRUPTED).logits[:, -1]), rtol=1e-4)
    assert (found.layers, found.heads) == (tuple(range(hf.config.num_hidden_layers)), None)


@pytest.mark.parametrize("model_type", FEW)
@pytest.mark.parametrize(("point", "part"), [("layers_input", 0), ("attentions_output", 1), ("mlps_output", 2)])
def test_at_any_point(model_type: str, point: str, part: int) -> None:
    hf = shared(model_type)
    modules, kind = modules_of(hf, part, model_type), point.split("_")[1]
    found = patched(hf, point=point, mode="noising", batch_size=5)
    assert same(found.effect, one_by_one(hf, modules, kind, CORRUPTED, CLEAN))
    assert found.shortcut


@pytest.mark.parametrize("model_type", HYBRIDS + SHARING)
def test_layers_of_any_kind(model_type: str) -> None:
    hf = zoo.build(model_type)
    clean, corrupted = zoo.ids(hf, seed=1), zoo.ids(hf, seed=2)
    model = StandardizedTransformer(hf)
    found = activation_patching(model, clean=clean, corrupted=corrupted, metric=METRIC, progress=False)
    modules = [model.layers[i].module for i in found.layers]
    assert len(modules) == model.num_layers - (model_type == "rwkv")  # which halves the stream behind a layer
    expected = one_by_one(hf, modules, "output", clean, corrupted)
    assert same(found.effect, expected)
    assert found.shortcut == (model_type not in SHARING)


@pytest.mark.parametrize("model_type", FEW)
@pytest.mark.parametrize(
    "point", ["queries", "keys", "values", "heads_output", "attention_probabilities", "mlps_contribution"]
)
def test_inside_a_layer(model_type: str, point: str) -> None:
    """The naive way, by traces of the whole model: the accessors have tests of their own."""
    model = StandardizedTransformer(shared(model_type))
    accessor = getattr(model, point)
    with torch.no_grad(), model.trace(CLEAN):
        values = accessor[1]
    by_head = {"mlps_contribution": None, "heads_output": 2}.get(point, 1)
    if by_head is None:
        cells: list[tuple[Any, ...]] = [(slice(None), p) for p in range(9)]
    elif by_head == 2:
        cells = [(slice(None), slice(None), head) for head in range(values.shape[2])]
    else:
        cells = [(slice(None), head) for head in range(values.shape[1])]
    expected = []
    for cell in cells:
        with torch.no_grad(), model.trace(CORRUPTED):
            value = accessor[1].clone()
            value[cell] = values[cell]
            accessor[1] = value
            expected.append(METRIC(model.logits[:, -1]))
    heads = None if by_head is None else "each"
    found = patched(model.hf_model, point=point, layers=[1], heads=heads)
    assert same(found.effect, torch.stack(expected, 1)[:, None])
    assert found.shortcut


def test_heads_by_positions() -> None:
    hf = shared("llama")
    values = hooked(hf, lambda: hf(CLEAN), {0: (hf.model.layers[2].self_attn.o_proj, "input")})[0]

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 4, 16:24] = values[:, 4, 16:24]  # of four heads of 8 the third
        return value

    out = edited(lambda: hf(CORRUPTED), hf.model.layers[2].self_attn.o_proj, "input", put)
    found = patched(hf, point="heads_output", layers=[-1], heads=[2, -4], positions=[-1, 4, -9])
    assert found.effect.shape == (2, 1, 2, 3)
    assert (found.layers, found.heads, found.positions) == ((2,), (2, 0), (8, 4, 0))
    assert torch.allclose(found.effect[:, 0, 0, 1], METRIC(out.logits[:, -1]), rtol=1e-4)


@pytest.mark.parametrize("model_type", [*FEW, "gpt_neo", "opt"])
def test_padding_does_not_show(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    long, short = (
        [ids.tolist() for ids in prompt_ids(seed=3)],
        [ids.tolist() for ids in prompt_ids(seq=6, seed=4)],
    )
    metric = logit_difference(20, 30)
    both = activation_patching(
        model, clean=[long[0], short[0]], corrupted=[long[1], short[1]], metric=metric, progress=False
    )
    for pair, (clean, corrupted) in enumerate([long, short]):
        alone = activation_patching(model, clean=clean, corrupted=corrupted, metric=metric, progress=False)
        assert alone.effect.shape == (model.num_layers, len(clean))
        assert same(both.effect[pair, :, 9 - len(clean) :], alone.effect)
        assert both.normalized[pair, -1, -1].item() == pytest.approx(1, abs=1e-3)
    assert both.effect[1, :, :3].isnan().all()
    assert not both.effect[0].isnan().any()
    assert both.tokens[1][:3] == ("", "", "")


def test_a_view_with_edits_is_patched_as_it_is_edited() -> None:
    hf = shared("llama")
    model = StandardizedTransformer(hf)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    steered = model.edit(lambda: model.steer(1, vector, factor=3.0))
    found = activation_patching(steered, clean=CLEAN, corrupted=CORRUPTED, metric=METRIC, progress=False)
    handle = hf.model.layers[1].register_forward_hook(lambda _, __, out: out + 3 * vector)
    try:
        expected = one_by_one(hf, list(hf.model.layers), "output", CLEAN, CORRUPTED)
    finally:
        handle.remove()
    assert same(found.effect, expected)


def test_what_a_skipped_layer_has_not_left_is_noticed() -> None:
    tensor = torch.tensor([1.0, -torch.inf, 1000.0, -1.0])
    assert is_close(tensor + 1e-2, tensor)
    assert not is_close(tensor + torch.tensor([0.3, 0, 0, 0]), tensor)
    assert not is_close(tensor[:2], tensor)
    assert not is_close(torch.full((4,), torch.nan), tensor)


@pytest.mark.parametrize("name", ["demo:gpt2", "demo:llama"])
def test_a_fact_is_read_at_the_country_and_said_at_the_end(name: str) -> None:
    model = StandardizedTransformer(name)
    found = activation_patching(
        model,
        clean=["The capital of France is", "The capital of Japan is"],
        corrupted=["The capital of Italy is", "The capital of Egypt is"],
        metric=logit_difference([" Paris", " Tokyo"], [" Rome", " Cairo"], model),
        progress=False,
    )
    country = [i for i, text in enumerate(found.tokens[0]) if "|" in text]
    assert len(country) == 1
    effect = found.normalized
    assert (effect[:, 0, country] > 0.8).all(), "early, all is at the country"
    assert torch.allclose(effect[:, -1, -1], torch.ones(2), atol=1e-3), "after the last layer, at the last token"
    assert (effect[:, :, : country[0]].abs() < 1e-5).all(), "what comes before the country does not know of it"
    assert (effect[:, 0, -1] < 0.2).all()


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (2, 3, 9)), ({"point": "heads_output", "heads": "each"}, (2, 3, 4))],
)
def test_the_plot_shows_each_number(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    found = patched(shared("gpt2"), **options)
    assert found.effect.shape == shape
    ends = [one[:, None, None] for one in (found.clean, found.corrupted)]
    assert torch.allclose(found.normalized, (found.effect - ends[1]) / (ends[0] - ends[1]))
    figure = found.plot()
    assert torch.allclose(torch.tensor(figure.data[0].z).float(), found.normalized.mean(0), atol=1e-5)
    one = found.plot(pair=1, normalized=False)
    assert torch.allclose(torch.tensor(one.data[0].z).float(), found.effect[1], atol=1e-5)


def test_plots_of_other_axes() -> None:
    by_both = patched(shared("gpt2"), point="values", heads="each", positions="each")
    assert by_both.effect.shape == (2, 3, 4, 9)
    assert torch.tensor(by_both.plot().data[0].z).shape == (12, 9)
    by_layer = patched(
        shared("gpt2"), positions="all", clean=CLEAN[0], corrupted=CORRUPTED[0], metric=logit_difference(3, 4)
    )
    assert by_layer.effect.shape == (3,)
    assert torch.allclose(by_layer.normalized, torch.ones(3), atol=1e-3), "the whole stream is everything"
    assert len(by_layer.plot().data) >= 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"clean": CLEAN[:, 1:]}, InputError, "pair 0 has 8 and 9 tokens:\n  clean:     ['"),
        ({"clean": CLEAN[:1]}, InputError, "1 clean and 2 corrupted prompts: give pairs."),
        (
            {"point": "layer_output"},
            InputError,
            "'layer_output' is no standard name of layers: give one of layers_input, ",
        ),
        ({"point": "device"}, InputError, "'device' is no standard name of layers"),
        ({"mode": "both"}, InputError, "mode='both': give 'denoising' or 'noising'."),
        ({"positions": [9]}, InputError, "positions=[9]: the prompts have 9 tokens."),
        ({"positions": "last"}, InputError, "positions='last': give 'each', 'all', or a list of positions."),
        ({"heads": "each"}, InputError, "heads='each': layers_output has no axis of heads;"),
        ({"heads": [4], "point": "queries"}, InputError, "heads=[4]: queries has 4 heads, 0 to 3."),
        ({"heads": "all", "point": "queries"}, InputError, "heads='all': give 'each', or a list of heads."),
        ({"heads": [], "point": "queries"}, InputError, "heads: give at least one."),
        ({"positions": []}, InputError, "positions: give at least one."),
        ({"layers": []}, InputError, "layers=[]: give at least one."),
        ({"layers": [3]}, LayerIndexError, "layers_output[3]: the model has 3 layers, 0 to 2."),
        ({"metric": lambda logits: logits}, InputError, f"of shape (2,); this one gave (2, {VOCAB})."),
        ({"metric": lambda logits: 1.0}, InputError, "of shape (2,); this one gave float."),
    ],
)
def test_what_cannot_be_patched_is_said(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        patched(shared("llama"), **options)
    assert text in str(raised.value)


def test_positions_of_pairs_of_several_lengths_count_from_the_end() -> None:
    model = StandardizedTransformer(shared("llama"))
    ids, others = ([prompt_ids(1, seq, seed=seed)[0].tolist() for seq in (9, 6)] for seed in (0, 1))
    call: Callable[..., Any] = lambda at: activation_patching(  # noqa: E731
        model, clean=ids, corrupted=others, metric=METRIC, positions=at, progress=False
    )
    with pytest.raises(InputError, match=r"positions=\[0\]: the pairs have \[9, 6\] tokens, so that positions mean"):
        call([0])
    assert call([-2]).positions == (7,)


def test_a_layer_that_has_no_such_value_is_left_out_or_an_error() -> None:
    hf = zoo.build("jamba")
    model = StandardizedTransformer(hf)
    ids = zoo.ids(hf)
    options: dict[str, Any] = {"clean": ids, "corrupted": ids.flip(0), "metric": METRIC, "progress": False}
    found = activation_patching(model, point="attentions_output", **options)
    assert found.layers == model.attention_layers
    without = next(i for i in range(model.num_layers) if i not in model.attention_layers)
    with pytest.raises(NotInThisModelError):
        activation_patching(model, point="attentions_output", layers=[without], **options)


def test_layers_whose_streams_are_several_are_run_from_the_first() -> None:
    hf = zoo.build("deepseek_v4")
    model = StandardizedTransformer(hf)
    clean, corrupted = zoo.ids(hf, seed=1), zoo.ids(hf, seed=2)
    options: dict[str, Any] = {"clean": clean, "corrupted": corrupted, "metric": METRIC, "progress": False}
    found = activation_patching(model, point="attentions_output", **options)
    modules = [model.layers[i].self_attn.module for i in range(model.num_layers)]
    assert same(found.effect, one_by_one(hf, modules, "output", clean, corrupted))
    assert not found.shortcut
    with pytest.raises(
        NotInThisModelError, match=r"cannot be patched by prompt and position: its shape is \(4, 1, 11, 16\)"
    ):
        # Validation refuses such keys.
        activation_patching(StandardizedTransformer(hf, validate=False), point="keys", layers=[1], **options)


def test_layers_of_several_numbers_of_heads_are_no_one_grid() -> None:
    hf = zoo.build("mimo_v2_flash")
    model = StandardizedTransformer(hf)
    options: dict[str, Any] = {
        "clean": zoo.ids(hf, seed=1),
        "corrupted": zoo.ids(hf, seed=2),
        "metric": METRIC,
    }
    options |= {"point": "keys", "heads": "each", "progress": False}
    with pytest.raises(InputError, match=r"keys has as many heads as \{0: 2, 1: 4, 2: 2, 3: 4\} \(by layer\)"):
        activation_patching(model, **options)
    assert activation_patching(model, layers=[1, 3], **options).effect.shape == (2, 2, 4)


def test_one_layer_may_be_given_as_a_number() -> None:
    options: dict[str, Any] = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "progress": False}
    model = StandardizedTransformer(shared("llama"))
    one, several = (activation_patching(model, layers=layers, **options) for layers in (-1, [2]))
    assert one.layers == several.layers == (2,)
    assert torch.equal(one.effect, several.effect)
