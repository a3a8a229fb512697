"""Methods on encoder-decoders: the encoder reads the prompts, padded on the right, and the plain names are the decoder's.

The references are plain hooks on the model's own modules, and gradients through them.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoders import build
from reference import edited, first, hooked
from torch import Tensor, nn

import nnatomy.methods
from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, LayerIndexError, NotInThisModelError
from nnatomy.methods import (
    ActivationStore,
    Prompt,
    SteeringVector,
    TargetPrompt,
    TunedLens,
    ablate_direction,
    activation_patching,
    attribution_patching,
    causal_tracing,
    circuit_faithfulness,
    collect_activations,
    collect_last_token_activations_session,
    collect_token_activations_batched,
    compute_next_token_probs,
    direct_logit_attribution,
    edge_attribution,
    get_token_activations,
    head_ablation,
    head_scores,
    integrated_gradients,
    lens_statistics,
    logit_lens,
    next_token_probs_unsqueeze,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    path_patching,
    run_prompts,
)

NAMES = ("T5ForConditionalGeneration", "BartForConditionalGeneration")
START = 540  # " France"
LONG, OTHER, SHORT = "The capital of France is", "The capital of Japan is", "Japan is in"
#: What the decoder reads, where that is more than its start token.
DECODED = [[20, 21, 22], [30, 31, 32]]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}

#: Those that look at no model, or are tested where they are: results, prompts' targets, metrics.
ELSEWHERE = {
    *("Patching", "PathPatching", "LensStatistics", "TargetPromptBatch", "it_repeat_prompt", "repeat_prompt"),
    *("image_lens", "ImageLens", "picture_patching", "PicturePatching"),  # of images: tests/images/test_methods.py
    *(
        "kl_divergence",
        "log_probability",
        "logit_difference",
        "probability",
        "get_first_tokens",
        "Activations",
        "HeadAblation",
        "HeadMap",
        "LogitLens",
    ),
}


@cache
def model_of(name: str) -> StandardizedTransformer:
    hf = build(name, vocab_size=800, decoder_start_token_id=START)
    return StandardizedTransformer(hf, StandardizedTransformer("demo:gpt2", validate=False).tokenizer)


@pytest.fixture(params=NAMES)
def model(request: Any) -> StandardizedTransformer:
    return model_of(request.param)


def ids(model: StandardizedTransformer, text: str) -> list[int]:
    return list(model.tokenizer(text)["input_ids"])


def arguments(
    model: StandardizedTransformer, texts: list[str], decoded: list[list[int]] | None = None
) -> dict[str, Tensor]:
    """What the model itself is called with, padded on the right."""
    rows = [ids(model, text) for text in texts]
    seq = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [1] * (seq - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (seq - len(row)) for row in rows]),
        "decoder_input_ids": torch.tensor(decoded or [[START]] * len(rows)),
    }


def given(model: StandardizedTransformer, texts: list[str], decoded: list[list[int]]) -> dict[str, Any]:
    """The same as a user writes it."""
    return {"input_ids": [ids(model, text) for text in texts], "decoder_input_ids": decoded}


def stack(model: StandardizedTransformer, of_encoder: bool) -> list[nn.Module]:
    hf, part = model.hf_model, "encoder" if of_encoder else "decoder"
    return [*(getattr(hf.model, part).layers if hasattr(hf, "model") else getattr(hf, part).block)]


def module(model: StandardizedTransformer, point: str, layer: int) -> tuple[nn.Module, str]:
    """Where a point is, by hand."""
    plain = point.removeprefix("encoder_")
    own = stack(model, point != plain)[layer]
    bart = hasattr(own, "self_attn")
    place = {
        "layers_input": (own, "input"),
        "layers_output": (own, "output"),
        "attentions_input": (own.self_attn if bart else own.layer[0].SelfAttention, "input"),
        "attentions_output": (own.self_attn if bart else own.layer[0].SelfAttention, "output"),
        "cross_attentions_output": (
            (getattr(own, "encoder_attn", None) if bart else own.layer[1]._modules.get("EncDecAttention")),
            "output",
        ),
    }[plain]
    return place


def seen(model: StandardizedTransformer, point: str, layer: int, **inputs: Any) -> Tensor:
    hf = model.hf_model
    return hooked(hf, lambda: hf(**inputs), {"it": module(model, point, layer)})["it"]


def logits_with(
    model: StandardizedTransformer, point: str, layer: int, change: Callable[[Tensor], Tensor], **inputs: Any
) -> Tensor:
    """The last position's logits, with a point's value changed by a hook."""
    return edited(lambda: model.hf_model(**inputs).logits, *module(model, point, layer), change)[:, -1]


def with_output(output: Any, value: Tensor) -> Any:
    return value if isinstance(output, Tensor) else (value, *output[1:])


def metric(logits: Tensor) -> Tensor:
    return logits[:, 30] - logits[:, 31]


def at_the_users_line(call: Callable[[], Any]) -> None:
    """Assert that of the library's own frames only the method that was called is shown."""
    try:
        call()
    except (InputError, LayerIndexError, NotInThisModelError) as error:
        frames = [one.filename for one in traceback.extract_tb(error.__traceback__)]
        assert frames[0] == __file__
        assert len([one for one in frames if f"nnatomy{'/'}methods" in one]) == 1


def refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
    at_the_users_line(call)


def test_every_public_method_is_here() -> None:
    _, text = Path(__file__).read_text().rsplit("\n# Reading.\n", 1)
    public = {name for name, one in vars(nnatomy.methods).items() if callable(one) and not inspect.ismodule(one)}
    assert {name for name in public - ELSEWHERE if name not in re.findall(r"\w+", text)} == set()


# Reading.


def test_heads_of_one_prompt_are_refused(model: StandardizedTransformer) -> None:
    for call in (
        lambda: head_scores(model, LONG),
        lambda: head_ablation(model, LONG, metric=lambda logits: logits[:, 0]),
    ):
        refused(call, NotInThisModelError, "has an encoder and a decoder")


@pytest.mark.parametrize("point", ["encoder_layers_output", "encoder_attentions_input"])
def test_activations_of_the_encoder_are_by_its_own_tokens(model: StandardizedTransformer, point: str) -> None:
    encoding = dict(model.tokenizer(LONG))
    for prompts in ([LONG, SHORT], [ids(model, LONG), ids(model, SHORT)], [encoding, {"text": SHORT}]):
        found = collect_activations(model, prompts, points={point: [1, 2]}, positions="all", progress=False)
        assert found.token_ids.tolist() == [*ids(model, LONG), *ids(model, SHORT)]
        assert found.offsets.tolist() == [0, 5, 8]
        for i, text in enumerate((LONG, SHORT)):
            for layer in (1, 2):
                expected = seen(model, point, layer, **arguments(model, [text]))[0]
                torch.testing.assert_close(found.of_prompt(i)[point, layer], expected, **CLOSE)
    last = collect_activations(model, [SHORT, LONG], points={point: [1]}, progress=False)
    expected = seen(model, point, 1, **arguments(model, [SHORT]))[0, -1]
    torch.testing.assert_close(last[point, 1][0], expected, **CLOSE)


@pytest.mark.parametrize("point", ["layers_output", "cross_attentions_output"])
def test_activations_of_the_decoder_are_by_what_it_reads(model: StandardizedTransformer, point: str) -> None:
    decoded = [[20, 21, 22], [30, 31], [40, 41, 42]]
    texts = [LONG, SHORT, SHORT]
    prompts = [
        {"input_ids": ids(model, LONG), "decoder_input_ids": decoded[0]},
        {"text": SHORT, "decoder_input_ids": [decoded[1]]},
        {"input_ids": torch.tensor([ids(model, SHORT)]), "decoder_input_ids": torch.tensor([decoded[2]])},
    ]
    found = collect_activations(model, prompts, points={point: [2]}, positions="all", progress=False)
    assert found.token_ids.tolist() == [token for one in decoded for token in one]
    for i, text in enumerate(texts):
        expected = seen(model, point, 2, **arguments(model, [text], [decoded[i]]))[0]
        torch.testing.assert_close(found.of_prompt(i)[point, 2], expected, **CLOSE)
    alone = collect_activations(model, [LONG, SHORT], points={point: [2]}, positions="all", progress=False)
    assert alone.token_ids.tolist() == [START, START]
    for i, text in enumerate((LONG, SHORT)):
        expected = seen(model, point, 2, **arguments(model, [text]))[0]
        torch.testing.assert_close(alone.of_prompt(i)[point, 2], expected, **CLOSE)


def test_what_cannot_be_collected_is_refused(model: StandardizedTransformer) -> None:
    for points, positions, text in (
        (
            ["encoder_layers_output", "layers_output"],
            "all",
            "Collect names of the one and of the other in two calls",
        ),
        ("layers_output", 1, r"prompts\[0\] has 1 token in the decoder: there is no position 1"),
        ("encoder_layers_output", 5, r"prompts\[0\] has 5 tokens: there is no position 5"),
        (
            "encoder_cross_attentions_output",
            "all",
            "is no name with values by position.*encoder_layers_output",
        ),
    ):
        refused(
            lambda: collect_activations(model, [LONG], points=points, positions=positions, progress=False),  # noqa: B023
            InputError,
            text,
        )
    plain = StandardizedTransformer("demo:gpt2", validate=False)
    refused(
        lambda: collect_activations(plain, [LONG], points="encoder_layers_output", progress=False),
        NotInThisModelError,
        "encoder_layers_output: there is none: the model is no encoder-decoder",
    )


def test_a_folder_is_of_what_the_decoder_reads_too(model: StandardizedTransformer, tmp_path: Path) -> None:
    def collect(decoded: list[int]) -> Any:
        prompts = [{"text": LONG, "decoder_input_ids": decoded}]
        return collect_activations(model, prompts, points={"layers_output": [1]}, folder=tmp_path, progress=False)

    store = collect([20, 21])
    assert isinstance(store, ActivationStore)
    expected = seen(model, "layers_output", 1, **arguments(model, [LONG], [[20, 21]]))[0, -1:]
    torch.testing.assert_close(collect([20, 21]).load()["layers_output", 1], expected, **CLOSE)
    with pytest.raises(InputError):
        collect([23, 21])


def test_token_activations(model: StandardizedTransformer) -> None:
    inputs = arguments(model, [LONG, SHORT], DECODED)
    expected = seen(model, "layers_output", 2, **inputs)
    prompts = given(model, [LONG, SHORT], DECODED)
    for idx in (-1, 1):
        found = get_token_activations(model, prompts, layers=[2], idx=idx)
        torch.testing.assert_close(found[0], expected[:, idx], **CLOSE)
    alone = seen(model, "layers_output", 2, **arguments(model, [LONG, SHORT, OTHER]))[:, -1]
    for collect in (collect_token_activations_batched, collect_last_token_activations_session):
        found = collect(model, [LONG, SHORT, OTHER], batch_size=2, layers=[2])
        torch.testing.assert_close(found[0], alone, **CLOSE)
    # What the user reads of the encoder has the encoder's positions.
    of_encoder = seen(model, "encoder_layers_output", 2, **inputs)
    found = get_token_activations(
        model, prompts, layers=2, get_activations=lambda model, layer: model.encoder_layers_output[layer]
    )
    torch.testing.assert_close(found[0], torch.stack([of_encoder[0, 4], of_encoder[1, 2]]), **CLOSE)
    as_long = given(model, [LONG, SHORT], [[20] * 5, [21] * 5])
    refused(
        lambda: get_token_activations(
            model, as_long, layers=2, get_activations=lambda model, layer: model.encoder_layers_output[layer]
        ),
        InputError,
        "not padded alike, so that nothing says which of them get_activations gave values of",
    )
    expected = seen(model, "layers_output", 2, **arguments(model, [LONG, SHORT], [[20] * 5, [21] * 5]))
    torch.testing.assert_close(get_token_activations(model, as_long, layers=2)[0], expected[:, -1], **CLOSE)


# Steering, ablation.


@pytest.mark.parametrize("point", ["layers_output", "encoder_layers_output"])
def test_steering_vectors(model: StandardizedTransformer, point: str) -> None:
    found = SteeringVector.from_pairs(model, [(LONG, SHORT), (OTHER, SHORT)], layers=[1], point=point, progress=False)
    value = {text: seen(model, point, 1, **arguments(model, [text]))[0] for text in (LONG, OTHER, SHORT)}
    expected = (value[LONG][-1] + value[OTHER][-1]) / 2 - value[SHORT][-1]
    torch.testing.assert_close(found.directions[1], expected, **CLOSE)
    along = found.projections(model, LONG)
    torch.testing.assert_close(along[0], value[LONG] @ (expected / expected.norm()), **CLOSE)
    tokens = ["·France"] if point == "layers_output" else ["The", "·capital", "·of", "·France", "·is"]
    assert list(found.plot(model, LONG).layout.xaxis.ticktext) == tokens

    inputs = arguments(model, [LONG, SHORT], DECODED)
    last = (4, 2) if point == "encoder_layers_output" else (2, 2)

    def steered(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for row, column in enumerate(last):
            hidden[row, column] += 3 * expected
        return hidden

    with torch.no_grad(), model.trace(given(model, [LONG, SHORT], DECODED)):
        found.apply(model, 3, positions=-1)
        logits = model.logits[:, -1]
    torch.testing.assert_close(logits, logits_with(model, point, 1, steered, **inputs), **CLOSE)
    with torch.no_grad():
        assert not torch.allclose(logits, model.hf_model(**inputs).logits[:, -1], atol=1e-2)


def test_a_vector_of_another_width_is_refused(model: StandardizedTransformer) -> None:
    vector = SteeringVector({1: torch.ones(3)}, "encoder_layers_output", "t5", "by hand")
    with pytest.raises(InputError, match="The vector is of width 3"), model.trace(LONG):
        vector.apply(model)
    with pytest.raises(InputError, match="at each position, the residual stream of"):
        SteeringVector.from_prompts(model, [LONG], [SHORT], point="encoder_heads_output", progress=False)


def test_an_encoder_in_a_generation_is_steered_before_the_first_step(model: StandardizedTransformer) -> None:
    vector = SteeringVector({1: torch.linspace(-9, 9, 32)}, "encoder_layers_output", "t5", "by hand")
    inputs = arguments(model, [LONG, SHORT])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def steered(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, 4] += vector.directions[1]
        hidden[1, 2] += vector.directions[1]
        return hidden

    own = module(model, "encoder_layers_output", 1)
    expected = edited(lambda: model.hf_model.generate(**inputs, **options), *own, steered)
    with torch.no_grad(), model.generate([LONG, SHORT], **options) as tracer:
        vector.apply(model, positions=-1)
        tokens = tracer.result
    assert torch.equal(tokens, expected)


def test_a_direction_is_taken_out_of_both_streams(model: StandardizedTransformer) -> None:
    direction = torch.linspace(-1, 2, 32)
    unit = direction / direction.norm()

    def without(hidden: Tensor) -> Tensor:
        return hidden - (hidden @ unit)[..., None] * unit

    inputs = arguments(model, [LONG, SHORT], DECODED)
    points = ["layers_output", "encoder_layers_output"]  # in the order in which they run, whatever is given
    call = lambda: model.hf_model(**inputs).logits  # noqa: E731
    for point in points:
        for layer in (0, 2):
            call = partial(edited, call, *module(model, point, layer), without)
    with torch.no_grad(), model.trace(given(model, [LONG, SHORT], DECODED)):
        ablate_direction(model, direction, layers=[2, 0], points=points)
        logits = model.logits
    torch.testing.assert_close(logits, call(), **CLOSE)
    with pytest.raises(LayerIndexError, match=r"encoder_layers_input\[4\]: the model has 4 layers"):
        with model.trace(LONG):
            ablate_direction(model, direction, layers=4, points="encoder_layers_output")


# Patching.


def test_patching_the_encoder_is_by_its_positions(model: StandardizedTransformer) -> None:
    found = activation_patching(
        model,
        clean=LONG,
        corrupted=OTHER,
        metric=metric,
        point="encoder_layers_output",
        layers=[0, 2],
        progress=False,
    )
    inputs = arguments(model, [OTHER])
    assert found.tokens[0][3] == " France| Japan"
    assert found.positions == (0, 1, 2, 3, 4)
    for row, layer in enumerate((0, 2)):
        clean = seen(model, "encoder_layers_output", layer, **arguments(model, [LONG]))
        for position in range(5):

            def patched(hidden: Tensor, position: int = position, clean: Tensor = clean) -> Tensor:
                hidden = hidden.clone()
                hidden[:, position] = clean[:, position]
                return hidden

            logits = logits_with(model, "encoder_layers_output", layer, patched, **inputs)
            torch.testing.assert_close(found.effect[row, position], metric(logits)[0], **CLOSE)
    assert not found.shortcut
    with torch.no_grad():
        for text, value in ((LONG, found.clean), (OTHER, found.corrupted)):
            own = metric(model.hf_model(**arguments(model, [text])).logits[:, -1])[0]
            torch.testing.assert_close(value, own, **CLOSE)
    heads = activation_patching(
        model,
        clean=LONG,
        corrupted=OTHER,
        metric=metric,
        point="encoder_heads_output",
        heads="each",
        layers=1,
        progress=False,
    )
    assert heads.effect.shape == (1, 4)
    assert heads.effect.std() > 1e-4


@pytest.mark.parametrize("point", ["layers_output", "cross_attentions_output"])
def test_patching_the_decoder_is_by_what_it_reads(model: StandardizedTransformer, point: str) -> None:
    """Pairs of several lengths in the encoder, too."""
    clean, corrupted = (
        given(model, [LONG, SHORT], DECODED),
        given(model, [OTHER, LONG], [[20, 24, 22], [30, 31, 35]]),
    )
    found = activation_patching(
        model, clean=clean, corrupted=corrupted, metric=metric, point=point, layers=[1, 3], progress=False
    )
    assert found.effect.shape == (2, 2, 3)
    for pair, (texts, decoded) in enumerate(
        (((LONG, OTHER), (DECODED[0], [20, 24, 22])), ((SHORT, LONG), (DECODED[1], [30, 31, 35])))
    ):
        source, base = (arguments(model, [one], [read]) for one, read in zip(texts, decoded, strict=True))
        for row, layer in enumerate((1, 3)):
            value = seen(model, point, layer, **source)
            for position in range(3):

                def patched(hidden: Tensor, position: int = position, value: Tensor = value) -> Tensor:
                    hidden = hidden.clone()
                    hidden[:, position] = value[:, position]
                    return hidden

                logits = logits_with(model, point, layer, patched, **base)
                torch.testing.assert_close(found.effect[pair, row, position], metric(logits)[0], **CLOSE)
    alone = activation_patching(
        model, clean=LONG, corrupted=OTHER, metric=metric, point=point, layers=[3], progress=False
    )
    assert alone.effect.shape == (1, 1)
    value = seen(model, point, 3, **arguments(model, [LONG]))
    logits = logits_with(model, point, 3, lambda _: value, **arguments(model, [OTHER]))
    torch.testing.assert_close(alone.effect[0, 0], metric(logits)[0], **CLOSE)


def test_pairs_that_cannot_be_patched_are_refused(model: StandardizedTransformer) -> None:
    def patch(clean: Any, corrupted: Any, point: str, **options: Any) -> Callable[[], Any]:
        return lambda: activation_patching(
            model, clean=clean, corrupted=corrupted, metric=metric, point=point, progress=False, **options
        )

    refused(
        patch([LONG, SHORT], [OTHER, "Italy is in"], "encoder_layers_output"),
        InputError,
        r"The pairs have \[5, 3\] tokens in the encoder, which reads them padded on the right.*each pair by itself",
    )
    for point in ("encoder_layers_output", "cross_attention_probabilities"):
        refused(patch(LONG, SHORT, point), InputError, "pair 0 has 5 and 3 tokens")
    refused(
        patch(LONG, OTHER, "layers_output", positions=[3]),
        InputError,
        "the prompts have 1 tokens",
    )
    refused(
        patch(given(model, [LONG], [[20, 21]]), given(model, [OTHER], [[20]]), "layers_output"),
        InputError,
        "pair 0 has 2 and 1 tokens",
    )
    refused(patch(LONG, LONG, "encoder_layers_output"), InputError, "are the same, so that there is nothing")


# Gradients.


def by_gradient(
    model: StandardizedTransformer,
    point: str,
    layers: list[int],
    clean: dict[str, Tensor],
    corrupted: dict[str, Tensor],
    drop: int | None = None,
) -> list[Tensor]:
    """(clean - corrupted) . gradient at the corrupted run, summed over entries: (prompt, position) of each layer."""
    hf, values, kept = model.hf_model, [], []

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        value = first(output)
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        value.retain_grad()
        kept.append(value)
        return with_output(output, value)

    def dropped(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        value = first(output).detach() + before - before.detach()
        return with_output(output, value)

    for layer in layers:
        values.append(seen(model, point, layer, **clean) - seen(model, point, layer, **corrupted))
    handles = []
    if drop is not None:
        own, _ = module(model, "encoder_" * point.startswith("encoder_") + "layers_output", drop)
        handles.append(own.register_forward_hook(dropped, with_kwargs=True))
    for layer in layers:
        handles.append(module(model, point, layer)[0].register_forward_hook(keep))
    try:
        metric(hf(**corrupted).logits[:, -1]).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        hf.zero_grad()
    return [
        (value * (0 if one.grad is None else one.grad)).sum(-1).detach()
        for value, one in zip(values, kept, strict=True)
    ]


@pytest.mark.parametrize(
    "point",
    ["layers_output", "cross_attentions_output", "encoder_layers_output", "encoder_attentions_output"],
)
def test_attributions_are_gradients_through_hooks(model: StandardizedTransformer, point: str) -> None:
    texts = ["Italy is in", LONG], [SHORT, OTHER]  # one is padded
    clean, corrupted = (given(model, each, DECODED) for each in texts)
    one, other = (arguments(model, each, DECODED) for each in texts)
    found = attribution_patching(model, clean, corrupted, metric=metric, point=point, layers=[1, 3])
    mask = other["attention_mask"] if point.startswith("encoder_") else torch.ones(2, 3)
    for i, expected in enumerate(by_gradient(model, point, [1, 3], one, other)):
        torch.testing.assert_close(found.effect[:, i], expected * mask, **CLOSE)
        assert expected.abs().max() > 1e-3
    assert found.effect.shape[2] == len(found.tokens) == mask.shape[1]
    read = other["input_ids"] if point.startswith("encoder_") else other["decoder_input_ids"]
    assert found.tokens == tuple(model.tokenizer.decode([token]) for token in read[0])
    with torch.no_grad():
        torch.testing.assert_close(found.clean, metric(model.hf_model(**one).logits[:, -1]), **CLOSE)
    dropped = attribution_patching(model, clean, corrupted, metric=metric, point=point, layers=[1], grad_drop=True)
    each = torch.stack([by_gradient(model, point, [1], one, other, drop)[0] for drop in range(4)])
    count = 4 if point.endswith("layers_output") else 3
    torch.testing.assert_close(dropped.effect[:, 0], each.abs().sum(0) / count * mask, **CLOSE)


@pytest.mark.parametrize("point", ["layers_output", "encoder_layers_output"])
def test_integrated_gradients_are_those_on_the_way(model: StandardizedTransformer, point: str) -> None:
    texts = [["Italy is in", LONG], [SHORT, OTHER]]
    one, other = (arguments(model, each, DECODED) for each in texts)
    both = (given(model, each, DECODED) for each in texts)
    found = integrated_gradients(model, *both, metric=metric, point=point, layers=2, steps=2)
    own, _ = module(model, point, 2)
    start, change = (
        seen(model, point, 2, **other),
        seen(model, point, 2, **one) - seen(model, point, 2, **other),
    )
    gradients = []
    for part in (0.25, 0.75):
        at = (start + part * change).requires_grad_()
        handle = own.register_forward_hook(lambda _, __, output, at=at: with_output(output, at))
        (gradient,) = torch.autograd.grad(metric(model.hf_model(**other).logits[:, -1]).sum(), at)
        handle.remove()
        gradients.append(gradient)
    expected = (change * (gradients[0] + gradients[1]) / 2).sum(-1)
    expected *= other["attention_mask"] if point == "encoder_layers_output" else 1
    torch.testing.assert_close(found.effect[:, 0], expected, **CLOSE)
    assert expected.abs().max() > 1e-2


def test_attributions_refuse_what_does_not_fit(model: StandardizedTransformer) -> None:
    for point in ("encoder_layers_output", "cross_attention_probabilities"):
        refused(
            lambda: attribution_patching(model, LONG, SHORT, metric=metric, point=point),  # noqa: B023
            InputError,
            r"compared token by token, but have \[5\] and \[3\] tokens",
        )
    found = attribution_patching(model, LONG, SHORT, metric=metric, point="layers_output", layers=2)
    (expected,) = by_gradient(model, "layers_output", [2], arguments(model, [LONG]), arguments(model, [SHORT]))
    torch.testing.assert_close(found.effect[:, 0], expected, **CLOSE)


# The head.


def head(model: StandardizedTransformer, hidden: Tensor) -> Tensor:
    """By hand: T5's final norm, scale and matrix; Bart's matrix and bias."""
    hf = model.hf_model
    with torch.no_grad():
        if hasattr(hf, "final_logits_bias"):
            return hf.lm_head(hidden) + hf.final_logits_bias
        hidden = hf.decoder.final_layer_norm(hidden)
        tied = getattr(hf.config, "scale_decoder_outputs", hf.config.tie_word_embeddings)
        return hf.lm_head(hidden * hf.model_dim**-0.5 if tied else hidden)


def test_the_lens_reads_the_decoders_positions(model: StandardizedTransformer) -> None:
    inputs = arguments(model, [LONG, SHORT], DECODED)
    hidden = seen(model, "layers_output", 1, **inputs)
    expected = head(model, hidden)
    prompts = given(model, [LONG, SHORT], DECODED)
    for size in (None, 1):
        found = logit_lens(model, prompts, positions="all", output="logits", batch_size=size)
        for row in (0, 1):
            torch.testing.assert_close(found[row][1], expected[row], **CLOSE)
    with torch.no_grad():
        own = model.hf_model(**inputs).logits
        torch.testing.assert_close(found[1][-1], own[1], **CLOSE)
    one = logit_lens(model, prompts, positions=1, output="logits")
    torch.testing.assert_close(one[:, 1], expected[:, 1], **CLOSE)
    alone = logit_lens(model, [LONG, SHORT], output="logits")
    hidden = seen(model, "layers_output", 1, **arguments(model, [LONG, SHORT]))
    torch.testing.assert_close(alone[:, 1], head(model, hidden)[:, -1], **CLOSE)


def test_what_pads_the_encoder_is_not_cut_off_the_decoder(model: StandardizedTransformer) -> None:
    """Both are of one shape, and the encoder's mask is the caller's, on the left."""
    row = ids(model, SHORT)
    inputs = {
        "input_ids": torch.tensor([[1, 1, *row]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "decoder_input_ids": torch.tensor([[20, 21, 22, 23, 24]]),
    }
    expected = head(model, seen(model, "layers_output", 1, **inputs))
    for size in (None, 1):
        found = logit_lens(model, inputs, positions="all", output="logits", batch_size=size)
        torch.testing.assert_close(found[0][1], expected[0], **CLOSE)


def test_the_negated_lens(model: StandardizedTransformer) -> None:
    if hasattr(model.hf_model, "model"):
        refused(
            lambda: logit_lens(model, LONG, return_inv_logits=True),
            NotInThisModelError,
            "no norm reads what the last layer gives",
        )
        return
    _, found = logit_lens(model, LONG, output="logits", return_inv_logits=True)
    hidden = seen(model, "layers_output", 1, **arguments(model, [LONG]))[:, -1]
    torch.testing.assert_close(found[:, 1], -head(model, hidden), **CLOSE)  # without a bias


def test_statistics_name_the_decoders_tokens(model: StandardizedTransformer) -> None:
    found = lens_statistics(model, given(model, [LONG, SHORT], DECODED), next_tokens=True)
    assert found.tokens == [[model.tokenizer.decode([token]) for token in row] for row in DECODED]
    assert found.target_tokens.tolist() == [[21, 22, -1], [31, 32, -1]]
    hidden = seen(model, "layers_output", 1, **arguments(model, [LONG, SHORT], DECODED))
    probs = head(model, hidden).softmax(-1)
    expected = torch.stack([probs[row, [0, 1], DECODED[row][1:]] for row in (0, 1)])
    torch.testing.assert_close(found.target_probability[:, 1, :2], expected, **CLOSE)
    alone = lens_statistics(model, [LONG, SHORT])
    assert alone.tokens == [[model.tokenizer.decode([START])]] * 2


def test_a_lens_is_trained_on_the_decoders_positions(model: StandardizedTransformer) -> None:
    texts = [given(model, [LONG], DECODED[:1]), given(model, [SHORT], DECODED[1:])]
    lens = TunedLens.train(model, [LONG, SHORT], steps=1, batch_size=2)
    assert lens.history is not None
    inputs = arguments(model, [LONG, SHORT])
    with torch.no_grad():
        target = model.hf_model(**inputs).logits.log_softmax(-1)
    own = head(model, seen(model, "layers_output", 1, **inputs)).log_softmax(-1)
    expected = (target.exp() * (target - own)).sum(-1).mean()
    torch.testing.assert_close(lens.history[0, 1], expected, **CLOSE)
    text = r"list is no prompt: give a string"  # a batch of mappings is none, as in `trace`
    with pytest.raises(InputError, match=text):
        TunedLens.train(model, texts, steps=1)


def test_parts_of_a_logit_are_at_the_decoders_position(model: StandardizedTransformer) -> None:
    inputs, prompts = arguments(model, [LONG, SHORT], DECODED), given(model, [LONG, SHORT], DECODED)
    with torch.no_grad():
        logits = model.hf_model(**inputs).logits
    for position in (-1, 1):
        found = direct_logit_attribution(model, prompts, answer=30, by="layer", position=position)
        torch.testing.assert_close(found.logits, logits[:, position, 30], **CLOSE)
        last = seen(model, "layers_output", 3, **inputs)[:, position]
        for layer in (1, 3):
            added = seen(model, "layers_output", layer, **inputs) - seen(model, "layers_input", layer, **inputs)
            # Linear once the norm's scale is held fixed.
            along = head_direction(model, last)
            torch.testing.assert_close(
                found.effect[:, found.parts.index(f"L{layer}")], (added[:, position] * along).sum(-1), **CLOSE
            )
    if hasattr(model.hf_model, "model"):
        refused(
            lambda: direct_logit_attribution(model, prompts, answer=30),
            NotInThisModelError,
            r"mixers_contribution\[0\]: this layer has none: the stream is normalised",
        )
        return
    found = direct_logit_attribution(model, prompts, answer=30, by="component")
    crossing = seen(model, "cross_attentions_output", 2, **inputs)[:, -1]
    last = seen(model, "layers_output", 3, **inputs)[:, -1]
    expected = (crossing * head_direction(model, last)).sum(-1)
    torch.testing.assert_close(found.effect[:, found.parts.index("L2 cross-attention")], expected, **CLOSE)
    heads = direct_logit_attribution(model, prompts, answer=30, by="head")
    torch.testing.assert_close(heads.effect.sum(-1), logits[:, -1, 30], **CLOSE)


def head_direction(model: StandardizedTransformer, last: Tensor) -> Tensor:
    """What token 30's logit is of the stream, with the norm's scale held fixed: (prompt, hidden)."""
    hf = model.hf_model
    with torch.no_grad():
        matrix = hf.lm_head.weight[30]
        if hasattr(hf, "final_logits_bias"):
            return matrix.expand_as(last)
        norm = hf.decoder.final_layer_norm
        scale = (last.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        unit = torch.ones_like(last)
        ratio = (head(model, last) / hf.lm_head(norm(last)))[:, :1]  # T5's own factor
        return matrix * norm.weight * scale * ratio * unit


def test_next_token_probabilities(model: StandardizedTransformer) -> None:
    with torch.no_grad():
        expected = model.hf_model(**arguments(model, [LONG, SHORT])).logits[:, -1].softmax(-1)
    torch.testing.assert_close(compute_next_token_probs(model, [LONG, SHORT]), expected, **CLOSE)
    torch.testing.assert_close(next_token_probs_unsqueeze(model, [LONG, SHORT])[:, 0], expected, **CLOSE)
    prompts = [Prompt(LONG, {"it": [30, 31]}), Prompt(SHORT, {"it": [40]})]
    found = run_prompts(model, prompts, tqdm=None)["it"][:, 0]
    torch.testing.assert_close(found, torch.stack([expected[0, [30, 31]].sum(), expected[1, 40]]), **CLOSE)
    one = prompts[0].run(model, logit_lens)["it"][0, -1]
    torch.testing.assert_close(one, expected[0, [30, 31]].sum(), **CLOSE)


# Other prompts' states.


def test_an_encoder_decoder_is_a_source_of_patchscopes_and_no_target(model: StandardizedTransformer) -> None:
    target = TargetPrompt("The capital of Spain is", index_to_patch=3)
    text = "puts hidden states into a target prompt, which the encoder of .* reads, .* may be the source"
    refused(lambda: patchscope_lens(model, [LONG], target), NotInThisModelError, text)
    refused(lambda: patchscope_generate(model, [LONG], target), NotInThisModelError, text)
    reader = StandardizedTransformer("demo:gpt2", validate=False)
    mapping = nn.Linear(32, reader.hidden_size)
    found = patchscope_lens(
        reader,
        given(model, [LONG, SHORT], DECODED),
        target,
        layers=[2],
        source_position=1,
        source_model=model,
        mapping=mapping,
    )
    with torch.no_grad():
        states = mapping(seen(model, "layers_output", 2, **arguments(model, [LONG, SHORT], DECODED))[:, 1])
    for row in (0, 1):

        def put(hidden: Tensor, row: int = row) -> Tensor:
            hidden = hidden.clone()
            hidden[:, 3] = states[row]
            return hidden

        prompt = torch.tensor([reader.tokenizer(target.prompt)["input_ids"]])
        own = reader.hf_model.transformer.h[2]
        logits = edited(lambda: reader.hf_model(prompt).logits, own, "output", put)  # noqa: B023
        torch.testing.assert_close(found[row, 0], logits[0, -1].softmax(-1), **CLOSE)


def test_what_the_decoders_attention_is_given_is_put_at_the_decoders_position(
    model: StandardizedTransformer,
) -> None:
    source = given(model, [SHORT], [[50, 51]])
    found = patch_object_attn_lens(model, source, given(model, [LONG, SHORT], DECODED), attn_idx_patch=1, num_patches=1)
    inputs = arguments(model, [LONG, SHORT], DECODED)
    for layer in (0, 2):
        state = seen(model, "attentions_input", layer, **arguments(model, [SHORT], [[50, 51]]))[:, -1]

        def put(hidden: Tensor, state: Tensor = state) -> Tensor:
            hidden = hidden.clone()
            hidden[:, 1] = state
            return hidden

        logits = logits_with(model, "attentions_input", layer, put, **inputs)
        torch.testing.assert_close(found[:, layer], logits.softmax(-1), **CLOSE)
    refused(
        lambda: patch_object_attn_lens(model, SHORT, LONG, attn_idx_patch=3),
        InputError,
        "prompt 0 has 1 token,",
    )


# What takes a model apart that has no cross-attention.


def test_methods_that_know_no_encoder_say_so(model: StandardizedTransformer) -> None:
    crossing = (
        "cross-attention, too: cross_attentions_contribution"
        if not hasattr(model.hf_model, "model")
        else "the stream is normalised on its way through the layer"
    )
    refused(
        lambda: path_patching(
            model,
            clean=LONG,
            corrupted=OTHER,
            sender="mlps_contribution[0]",
            receivers="logits",
            metric=metric,
        ),
        NotInThisModelError,
        crossing,
    )
    refused(lambda: edge_attribution(model, LONG, OTHER, metric=metric), NotInThisModelError, crossing)
    plain = StandardizedTransformer("demo:gpt2", validate=False)
    edges = edge_attribution(plain, LONG, OTHER, metric=metric)
    refused(
        lambda: circuit_faithfulness(model, LONG, OTHER, metric=metric, attribution=edges),
        NotInThisModelError,
        crossing,
    )
    for subject in ("France", 3):
        refused(
            lambda: causal_tracing(model, LONG, subject=subject, progress=False),  # noqa: B023
            NotInThisModelError,
            r"its decoder's, while its encoder reads the prompt\. Patch from another prompt: activation_patching",
        )
