"""Encoder-decoders: the decoder under the plain names, the encoder under `encoder_*`, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from encoder_decoders import build, inputs_of
from reference import edited, hooked
from torch import Tensor, nn

from nnatomy import ArchConfig, StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError, ValidationError

_BART = ("model.decoder.layers", "self_attn", None, "model.encoder.layers", "self_attn")
_T5 = (
    "decoder.block",
    "layer.0.SelfAttention",
    "layer.2.DenseReluDense",
    "encoder.block",
    "layer.0.SelfAttention",
)
#: Class -> where its modules are, by hand: decoder layers, self-attention, MLP; encoder layers, attention.
CLASSES: dict[str, tuple[str, str, str | None, str, str]] = {
    "T5ForConditionalGeneration": _T5,
    "UMT5ForConditionalGeneration": _T5,
    "BartForConditionalGeneration": _BART,
    "MarianMTModel": _BART,
    "PegasusForConditionalGeneration": _BART,
    "MBartForConditionalGeneration": _BART,
    "M2M100ForConditionalGeneration": _BART,
    "MvpForConditionalGeneration": _BART,  # the softmax of its attentions has three axes
    "WhisperForConditionalGeneration": _BART,
    "BartModel": ("decoder.layers", "self_attn", None, "encoder.layers", "self_attn"),
}
LANGUAGE = [name for name in CLASSES if name not in ("WhisperForConditionalGeneration", "BartModel")]


def given(result: Any) -> Tensor:
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("name", CLASSES)
def test_names_are_what_hooks_see_and_reading_changes_nothing(name: str) -> None:
    hf = build(name)
    model = StandardizedTransformer(hf)
    inputs = inputs_of(hf)
    layers, attention, mlp, encoder_layers, encoder_attention = CLASSES[name]
    points: dict[str, list[nn.Module]] = {
        "encoder_layers": [*hf.get_submodule(encoder_layers)],
        "encoder_attentions": [one.get_submodule(encoder_attention) for one in hf.get_submodule(encoder_layers)],
        "layers": [*hf.get_submodule(layers)],
        "attentions": [one.get_submodule(attention) for one in hf.get_submodule(layers)],
    }
    if mlp is not None:
        points["mlps"] = [one.get_submodule(mlp) for one in hf.get_submodule(layers)]
    where = {
        (f"{part}_{side}", i): (module, side)
        for part, modules in points.items()
        for i, module in enumerate(modules)
        for side in ("input", "output")
    }
    seen = hooked(hf, lambda: hf(**inputs), where)
    with torch.no_grad():
        plain = given(hf(**inputs))
    for accessor in dict.fromkeys(one for one, _ in where):
        with torch.no_grad(), model.trace(**inputs) as tracer:
            values = getattr(model, accessor)[:]
            result = tracer.result
        assert torch.equal(given(result), plain)
        assert len(values) == model.num_layers == 4
        assert all(torch.equal(value, seen[accessor, i]) for i, value in enumerate(values)), accessor


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_patterns_are_those_that_the_model_returns(name: str) -> None:
    hf = build(name, attn_implementation="eager")
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    with torch.no_grad():
        own = hf(**inputs, output_attentions=True)
    with torch.no_grad(), model.trace(**inputs):
        encoders = model.encoder_attention_probabilities[:]
        decoders = model.attention_probabilities[:]
    for mine, theirs in ((encoders, own.encoder_attentions), (decoders, own.decoder_attentions)):
        assert len(mine) == len(theirs) == 4
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_second_attention_is_cross_attention_and_no_mlp(name: str) -> None:
    hf = build(name)
    model = StandardizedTransformer(hf)
    assert model.layer_kinds == ("attention + cross-attention",) * 4
    assert model.causal
    own = hf.get_submodule(CLASSES[name][0])[1]
    assert model.cross_attentions_output.module(1) is own.get_submodule(
        "encoder_attn" if hasattr(own, "encoder_attn") else "layer.1.EncDecAttention"
    )
    assert model.mixers_output.module(1) is model.attentions_output.module(1)


def change(hidden: Tensor) -> Tensor:
    return 0.5 * hidden + torch.linspace(-1, 1, hidden.shape[-1])


@pytest.mark.parametrize(
    "name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"]
)
@pytest.mark.parametrize(
    "accessor", ["encoder_layers_output", "encoder_attentions_output", "layers_output", "attentions_output"]
)
def test_writing_is_what_a_hook_does(name: str, accessor: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    module = getattr(model, accessor).module(1)
    expected = edited(lambda: hf(**inputs).logits, module, "output", change)
    with torch.no_grad(), model.trace(**inputs):
        getattr(model, accessor)[1] = change(getattr(model, accessor)[1])
        logits = model.logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, hf(**inputs).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_steps_of_a_generation_are_the_decoders(name: str) -> None:
    hf = build(name)
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 5}
    generate: Callable[[], Any] = lambda: hf.generate(input_ids=ids, **options)  # noqa: E731
    expected = edited(generate, model.layers_output.module(1), "output", change)
    widths = []
    with torch.no_grad(), model.generate(ids, **options) as tracer:
        for _ in tracer.iter[:]:
            model.layers_output[1] = change(model.layers_output[1])
            widths.append(model.layers_output[1].shape[1])
        tokens = tracer.result
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, generate())
    assert widths == [1] * 4


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_lasting_edit_of_the_encoder_acts_in_a_generation(name: str) -> None:
    """The encoder runs before the first step and in none after it; the decoder in each."""
    hf = build(name)
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 5}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    generate: Callable[[], Tensor] = lambda: torch.stack(hf.generate(input_ids=ids, **options).logits)  # noqa: E731
    encoder, decoder = model.encoder_layers_output.module(1), model.layers_output.module(1)
    expected = edited(generate, encoder, "output", change)
    both = edited(lambda: edited(generate, decoder, "output", change), encoder, "output", change)

    def edit(accessor: str) -> Callable[[], None]:
        return lambda: getattr(model, accessor).__setitem__(1, change(getattr(model, accessor)[1]))

    once = model.edit(edit("encoder_layers_output"))
    twice = once.edit(edit("layers_output"))
    with torch.no_grad():
        assert torch.equal(torch.stack(once.generate(ids, **options).run().logits), expected)
        assert torch.equal(torch.stack(twice.generate(ids, **options).run().logits), both)
    assert not torch.allclose(expected, generate(), atol=1e-2)
    assert not torch.allclose(both, expected, atol=1e-2)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_head_is_exact(name: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    with torch.no_grad(), model.trace(**inputs):
        last, logits = model.layers_output[-1], model.logits
    with torch.no_grad():
        torch.testing.assert_close(model.project_on_vocab(last), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model._head.long_way(last), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_of_the_encoders_prompts_does_not_show(name: str) -> None:
    hf = build(name)
    model = StandardizedTransformer(hf)
    long, short = zoo.ids(hf)[0].tolist(), zoo.ids(hf)[1, :5].tolist()
    decoder = zoo.ids(hf, seq=6, seed=1)
    assert model.takes_padding
    with torch.no_grad():
        alone = hf(input_ids=torch.tensor([short]), decoder_input_ids=decoder[1:]).logits
        both = model([long, short], decoder_input_ids=decoder).logits
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_without_decoder_prompts_it_begins_with_its_start_token() -> None:
    hf = build("BartForConditionalGeneration", decoder_start_token_id=5)
    model, ids = StandardizedTransformer(hf), zoo.ids(hf)
    assert torch.equal(model.prepare(ids)["decoder_input_ids"], torch.tensor([[5], [5]]))
    with torch.no_grad(), model.trace(ids):
        logits = model.logits
    with torch.no_grad():
        assert torch.equal(logits, hf(input_ids=ids, decoder_input_ids=torch.tensor([[5], [5]])).logits)


def test_what_cannot_be_run_is_refused() -> None:
    model = StandardizedTransformer(build("BartForConditionalGeneration"))
    with pytest.raises(InputError, match="of several lengths: give decoder_input_ids of one"):
        model.prepare([[20, 21], [22, 23]], decoder_input_ids=[[20], [21, 22]])
    with pytest.raises(InputError, match="trace one batch and take rows of it"), model.trace() as tracer:
        with tracer.invoke([20, 21, 22]):
            model.layers_output[0]
        with tracer.invoke([20, 21]):
            model.layers_output[0]
    speech = StandardizedTransformer(build("WhisperForConditionalGeneration"))
    with pytest.raises(InputError, match="no tokens but input_features: give input_features="):
        speech.prepare([20, 21])
    with pytest.raises(InputError, match="There is no prompt: give input_features="):
        speech.prepare()


def test_a_decoder_alone_has_no_encoder_names() -> None:
    model = StandardizedTransformer("demo:gpt2")
    with pytest.raises(
        NotInThisModelError, match="encoder_layers_output: there is none: the model is no encoder-decoder"
    ):
        model.encoder_layers_output.module(0)


def test_cross_attention_under_the_name_of_self_attention_does_not_pass() -> None:
    config = ArchConfig(layers="model.decoder.layers", self_attn="encoder_attn", absent={"mlp": "fc1 and fc2"})
    with pytest.raises(ValidationError, match=r"attention_probabilities\[0\]: is \(2, 4, 6, 7\), not \(2, 4, 6, 6\)"):
        StandardizedTransformer(build("BartForConditionalGeneration"), arch_config=config)


def test_it_is_loaded_from_a_folder_as_what_it_is(tmp_path: Path) -> None:
    hf = build("T5ForConditionalGeneration")
    hf.save_pretrained(tmp_path)
    model = StandardizedTransformer(tmp_path)
    assert type(model.hf_model) is type(hf)
    inputs = inputs_of(hf)
    with torch.no_grad():
        assert torch.equal(model.hf_model(**inputs).logits, hf(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "why", "encoder"),
    [
        ("FSMTForConditionalGeneration", r"its hidden states are \(seq, batch, hidden\)", 0),
        ("ProphetNetForConditionalGeneration", "behind the prompt's stream", 4),
    ],
    ids=["FSMT", "ProphetNet"],
)
def test_a_decoder_of_another_layout_has_the_names_of_no_layer(name: str, why: str, encoder: int) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    assert len(model.encoder_layers_output) == encoder
    for accessor in ("layers_output", "attentions_output", "mlps_input", "attention_probabilities"):
        with pytest.raises(NotInThisModelError, match=f"{accessor}.*{why}"):
            getattr(model, accessor).module(0)
    embedding = model.embed_tokens.module
    points: dict[Any, Any] = {"embeddings": (embedding, "output"), "head": (model.lm_head.module, "input")}
    seen = hooked(hf, lambda: hf(**inputs), points)
    with torch.no_grad(), model.trace(**inputs):
        embeddings, hidden, logits = model.token_embeddings, model.lm_head.input, model.logits
    with torch.no_grad():
        assert torch.equal(logits, hf(**inputs).logits)
    assert torch.equal(embeddings, seen["embeddings"])
    assert torch.equal(hidden, seen["head"])
    expected = edited(lambda: hf(**inputs).logits, embedding, "output", change)
    with torch.no_grad(), model.trace(**inputs):
        model.token_embeddings = change(model.token_embeddings)
        changed = model.logits
    assert torch.equal(changed, expected)
    assert not torch.allclose(changed, logits, atol=1e-3)
