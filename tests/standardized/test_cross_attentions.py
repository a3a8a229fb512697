"""What a decoder's layers read of the encoder, against plain hooks and the models' own returns."""

from __future__ import annotations

import pytest
import torch
import zoo
from encoder_decoders import build, inputs_of
from reference import edited, hooked
from torch import nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, NotInThisModelError
from nnatomy.methods import direct_logit_attribution, edge_attribution, logit_difference, path_patching
from nnatomy.names import CROSS

#: Class -> its layers, their cross-attention, and that one's value and output projections, by hand.
CLASSES: dict[str, tuple[str, str, str, str]] = {
    "T5ForConditionalGeneration": ("decoder.block", "layer.1.EncDecAttention", "v", "o"),
    "BartForConditionalGeneration": ("model.decoder.layers", "encoder_attn", "v_proj", "out_proj"),
    "WhisperForConditionalGeneration": (
        "model.decoder.layers",
        "encoder_attn",
        "v_proj",
        "out_proj",
    ),
}


def crossing(name: str, hf: nn.Module) -> list[nn.Module]:
    return [layer.get_submodule(CLASSES[name][1]) for layer in hf.get_submodule(CLASSES[name][0])]


@pytest.mark.parametrize("name", CLASSES)
def test_input_and_output_are_what_hooks_see(name: str) -> None:
    hf = build(name)
    model, inputs, modules = StandardizedTransformer(hf), inputs_of(hf), crossing(name, hf)
    points = {(side, i): (module, side) for i, module in enumerate(modules) for side in ("input", "output")}
    seen = hooked(hf, lambda: hf(**inputs), points)
    with torch.no_grad():
        plain = hf(**inputs).logits
    for side in ("input", "output"):
        accessor = getattr(model, f"cross_attentions_{side}")
        assert list(accessor.modules) == modules
        with torch.no_grad(), model.trace(**inputs):
            values = accessor[:]
            logits = model.logits
        assert torch.equal(logits, plain)
        assert all(torch.equal(value, seen[side, i]) for i, value in enumerate(values))
    change = lambda hidden: 0.5 * hidden + torch.linspace(-1, 1, hidden.shape[-1])  # noqa: E731
    expected = edited(lambda: hf(**inputs).logits, modules[1], "output", change)
    with torch.no_grad(), model.trace(**inputs):
        model.cross_attentions_output[1] = change(model.cross_attentions_output[1])
        logits = model.logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, plain, atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CLASSES)
def test_patterns_are_those_that_the_model_returns(name: str, implementation: str) -> None:
    hf = build(name, attn_implementation=implementation)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    eager = build(name, attn_implementation="eager")
    with torch.no_grad():
        plain = hf(**inputs).logits
        own = eager(**inputs, output_attentions=True).cross_attentions
        with model.trace(**inputs):
            patterns = model.cross_attention_probabilities[:]
            logits = model.logits
    assert torch.equal(logits, plain)
    assert len(own) == len(patterns) == model.num_layers
    for one, other in zip(patterns, own, strict=True):
        torch.testing.assert_close(one, other)
        assert one.shape[-1] != 6, "the encoder's positions are not the decoder's"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_pattern_on_one_key_gives_that_keys_value(name: str, implementation: str) -> None:
    hf = build(name, attn_implementation=implementation)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    module = crossing(name, hf)[1]
    value, output = (module.get_submodule(path) for path in CLASSES[name][2:])
    with torch.no_grad():
        states = hf(**inputs).encoder_last_hidden_state
        expected = output(value(states[:, 2:3])).expand(-1, 6, -1)
        with model.trace(**inputs):
            pattern = torch.zeros_like(model.cross_attention_probabilities[1])
            pattern[..., 2] = 1
            model.cross_attention_probabilities[1] = pattern
            given = model.cross_attentions_output[1]
            changed = model.logits
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        with_output = edited(lambda: hf(**inputs).logits, module, "output", lambda out: expected.to(out))
    torch.testing.assert_close(changed, with_output, rtol=1e-3, atol=1e-3)


def test_in_each_step_of_a_generation() -> None:
    hf = build("BartForConditionalGeneration")
    model, shapes = StandardizedTransformer(hf), []
    with torch.no_grad(), model.generate(zoo.ids(hf, seq=9), max_new_tokens=3, min_new_tokens=3) as tracer:
        for _ in tracer.iter[:]:
            shapes.append(tuple(model.cross_attention_probabilities[2].shape))
    assert len(shapes) == 3
    assert {shape[2:] for shape in shapes} == {(1, 9)}


def test_each_is_in_the_report_where_there_is_one() -> None:
    model = StandardizedTransformer(build("T5ForConditionalGeneration"))
    for name in CROSS:
        assert [model.validation[name, i].status for i in range(4)] == ["verified"] * 4
    other = StandardizedTransformer("demo:gpt2")
    assert not any(row.name.startswith("cross") for row in other.validation)
    for name in CROSS:
        with pytest.raises(NotInThisModelError, match=f"{name}: there is none: no layer attends to an encoder"):
            getattr(other, name).module(0)


def test_one_that_does_nothing_is_refused() -> None:
    hf = build("BartForConditionalGeneration")
    nn.init.zeros_(crossing("BartForConditionalGeneration", hf)[2].out_proj.weight)
    model = StandardizedTransformer(hf)
    with pytest.raises(
        NotInThisModelError,
        match=r"cross_attention_probabilities\[2\]: .* writing it changes no attention",
    ):
        model.cross_attention_probabilities.module(2)
    assert model.cross_attention_probabilities.module(1) is not None


def test_one_whose_output_is_dropped_is_refused() -> None:
    hf = build("BartForConditionalGeneration")
    nn.init.zeros_(hf.model.decoder.layers[3].encoder_attn_layer_norm.weight)  # it gives its bias, whatever it is given
    model = StandardizedTransformer(hf)
    with pytest.raises(
        NotInThisModelError,
        match=r"cross_attentions_output\[3\]: .* writing it does not change layers_output",
    ):
        model.cross_attentions_output.module(3)


def test_what_does_not_fit_is_an_error() -> None:
    hf = build("T5ForConditionalGeneration")
    model = StandardizedTransformer(hf)
    with pytest.raises(AssignmentError, match=r"cross_attention_probabilities\[0\] is torch.float32 of shape"):
        with model.trace(**inputs_of(hf)):
            model.cross_attention_probabilities[0] = torch.ones(2, 4, 6, 6)


#: Class -> what adds to the stream in its layers, by hand: self-attention, cross-attention, and the last of the MLP.
SUMMANDS = {
    "T5ForConditionalGeneration": (
        "layer.0.SelfAttention",
        "layer.1.EncDecAttention",
        "layer.2.DenseReluDense",
    ),
    "MBartForConditionalGeneration": ("self_attn", "encoder_attn", "fc2"),
    "PegasusForConditionalGeneration": ("self_attn", "encoder_attn", "fc2"),
    "M2M100ForConditionalGeneration": ("self_attn", "encoder_attn", "fc2"),
    "WhisperForConditionalGeneration": ("self_attn", "encoder_attn", "fc2"),
}
CONTRIBUTIONS = ("mixers_contribution", "cross_attentions_contribution", "mlps_contribution")


@pytest.mark.parametrize("name", SUMMANDS)
def test_contributions_are_what_hooks_see_and_add_up(name: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    layers = hf.get_submodule("decoder.block" if name.startswith("T5") else "model.decoder.layers")
    points = {
        (what, i): (layer.get_submodule(path), "output")
        for i, layer in enumerate(layers)
        for what, path in zip(CONTRIBUTIONS, SUMMANDS[name], strict=True)
    }
    seen = hooked(hf, lambda: hf(**inputs), points)
    with torch.no_grad():
        plain = hf(**inputs).logits
        with model.trace(**inputs):
            for i in range(model.num_layers):
                stream = model.layers_input[i]
                assert torch.equal(model.attentions_contribution[i], seen["mixers_contribution", i])
                for what in CONTRIBUTIONS:
                    if what == "mlps_contribution":
                        torch.testing.assert_close(model.layers_mid[i], stream)
                    added = getattr(model, what)[i]
                    assert torch.equal(added, seen[what, i])
                    stream = stream + added
                torch.testing.assert_close(model.layers_output[i], stream)
            logits = model.logits
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("name", SUMMANDS)
def test_writing_a_contribution_changes_that_summand_alone(name: str) -> None:
    hf = build(name)
    model, inputs = StandardizedTransformer(hf), inputs_of(hf)
    layers = hf.get_submodule("decoder.block" if name.startswith("T5") else "model.decoder.layers")
    for what, path in zip(CONTRIBUTIONS, SUMMANDS[name], strict=True):
        change = lambda added: 0.5 * added + torch.linspace(-1, 1, added.shape[-1])  # noqa: E731
        expected = edited(lambda: hf(**inputs).logits, layers[2].get_submodule(path), "output", change)
        with torch.no_grad(), model.trace(**inputs):
            accessor = getattr(model, what)
            accessor[2] = change(accessor[2])
            logits = model.logits
        torch.testing.assert_close(logits, expected)
        with torch.no_grad():
            assert not torch.allclose(logits, hf(**inputs).logits, atol=1e-2)


def test_the_stream_that_is_normalised_on_its_way_has_no_summands() -> None:
    model = StandardizedTransformer(build("BartForConditionalGeneration"))
    for name in (*CONTRIBUTIONS, "layers_mid"):
        with pytest.raises(NotInThisModelError, match="the stream is normalised on its way"):
            getattr(model, name).module(0)


@pytest.mark.parametrize("by", ["component", "head"])
def test_the_parts_of_a_logit_are_all_there(by: str) -> None:
    model = StandardizedTransformer(build("T5ForConditionalGeneration"))
    prompt = zoo.ids(model.hf_model, seq=7)
    found = direct_logit_attribution(model, prompt, answer=5, wrong=9, by=by)
    assert {f"L{i} cross-attention" for i in range(4)} <= {*found.parts}
    torch.testing.assert_close(found.effect.sum(1), found.logits)
    rest = dict(zip(found.parts, found.effect[0].tolist(), strict=True))["rest"]
    assert abs(rest) < 1e-4 * float(found.effect.abs().max()), "T5's final norm and head have no bias"


def test_methods_that_know_of_mixer_and_mlp_alone_refuse() -> None:
    model = StandardizedTransformer(build("T5ForConditionalGeneration"))
    clean, corrupted = zoo.ids(model.hf_model, seq=7)[:1], zoo.ids(model.hf_model, seq=7)[1:]
    metric = logit_difference(5, 9)
    with pytest.raises(NotInThisModelError, match="path_patching takes a layer apart into token mixer and MLP"):
        path_patching(
            model,
            clean=clean,
            corrupted=corrupted,
            sender="mlps_contribution[0]",
            receivers="logits",
            metric=metric,
        )
    with pytest.raises(NotInThisModelError, match="edge_attribution takes a layer apart into"):
        edge_attribution(model, clean=clean, corrupted=corrupted, metric=metric)
