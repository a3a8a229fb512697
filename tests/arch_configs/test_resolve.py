"""From a model to its standard modules: by class, by names that fit, by the user's config, or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import zoo
from architectures import PLACES, TYPES, build, prompt_ids, shared

from nnatomy import ArchConfig, StandardizedTransformer
from nnatomy.arch_configs import FAMILIES, resolve
from nnatomy.errors import ModelError, NotInThisModelError, UnknownArchitectureError


@pytest.mark.parametrize("model_type", TYPES)
def test_each_class_is_named_by_one_family(model_type: str) -> None:
    name = type(shared(model_type)).__name__
    families = [family for family in FAMILIES if name in family.classes]
    assert [(f.layers, f.self_attn, f.mlp) for f in families] == [PLACES[model_type]]


def test_no_class_is_named_twice() -> None:
    assert max(Counter(name for family in FAMILIES for name in family.classes).values()) == 1


def test_a_class_nobody_named_is_inferred() -> None:
    class MyOwn(type(shared("llama"))):  # type: ignore[misc]
        pass

    hf = MyOwn(shared("llama").config).eval()
    anatomy = resolve(hf)
    assert anatomy.ln_final is hf.model.norm
    StandardizedTransformer(hf)


def test_an_unknown_architecture_shows_its_tree_and_the_way_out() -> None:
    hf = build("gpt2")
    hf.transformer.blocks_of_mine = hf.transformer.h
    del hf.transformer.h
    with pytest.raises(UnknownArchitectureError, match=r"does not fit GPT2LMHeadModel: it has no 'transformer.h'"):
        StandardizedTransformer(hf, arch_config=FAMILIES[2])

    class Odd(type(hf)):  # type: ignore[misc]
        pass

    hf.__class__ = Odd
    with pytest.raises(UnknownArchitectureError) as error:
        StandardizedTransformer(hf)
    text = str(error.value)
    assert text.startswith(
        "Where the standard modules of Odd are does not show: it cannot be run on token ids alone ('GPT2Model' object has no "
        "attribute 'h'). Say so: StandardizedTransformer(model, arch_config=ArchConfig("
    )
    assert "transformer.blocks_of_mine.0.attn: GPT2Attention" in text
    assert "blocks_of_mine.1" not in text


def test_layers_may_be_spread_over_lists() -> None:
    hf = zoo.build("xlm")
    model = StandardizedTransformer(hf)
    lists = hf.transformer
    assert [layer.module for layer in model.layers] == [*lists.layer_norm2]
    assert model.layers[1].self_attn.path == "transformer.attentions.1"
    assert model.layers[1].mlp.module is lists.ffns[1]
    with torch.no_grad(), model.trace(ids := zoo.ids(hf)):
        stream = [model.layers_output[i] for i in range(4)]
    with torch.no_grad():
        expected = hf(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(stream, expected[1:], strict=True))
    assert model.causal
    assert not StandardizedTransformer(zoo.build("xlm", causal=False)).causal


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"self_attn": "transformer.attention.*"}, "it has no 'transformer.attention.0'"),
        ({"mlp": "transformer.layer_norm1.*"}, "mlps_output[0]: LayerNorm has no matrix"),
        ({"layers": "transformer.layer_norm1"}, "mlps_output[0]: writing it changes no layer output"),
        ({"self_attn": "transformer.ffns.*"}, "queries[0]: fires 0 times in a forward pass, not once"),
    ],
)
def test_spread_over_other_lists_they_are_refused(changes: dict[str, str], why: str) -> None:
    (xlm,) = (family for family in FAMILIES if "XLMWithLMHeadModel" in family.classes)
    with pytest.raises(ModelError) as error:
        StandardizedTransformer(zoo.build("xlm"), arch_config=replace(xlm, **changes))
    assert why in str(error.value)


@pytest.mark.parametrize("model_type", ["hrm_text", "reformer"])
def test_where_no_layer_has_a_name_the_rest_has(model_type: str) -> None:
    hf = zoo.build(model_type)
    model = StandardizedTransformer(hf)
    with torch.no_grad():
        expected = hf(ids := zoo.ids(hf)).logits
        later = outputs(model.layers[2].module, lambda: hf(ids))[-1]
    with torch.no_grad(), model.trace(ids):
        raw = model.layers[2].calls[1].output if model_type == "hrm_text" else model.layers[2].output[0]
        logits = model.logits
    assert torch.equal(logits, expected)
    assert torch.equal(raw, later)
    for name in ("layers_output", "attentions_output", "mlps_input", "queries", "neurons"):
        with pytest.raises(NotInThisModelError, match="this layer has none: .*(several times|is two|chunks)"):
            getattr(model, name).module(0)
    for use in (lambda: model.skip_layer(1), lambda: model.steer(1, raw[0, 0])):
        with pytest.raises(NotInThisModelError), model.trace(ids):
            use()


def outputs(module: torch.nn.Module, run: Callable[[], object]) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    keep = lambda _, __, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])  # noqa: E731
    hook = module.register_forward_hook(keep)
    run()
    hook.remove()
    return seen


def test_the_users_config_is_used() -> None:
    hf = build("gpt2")
    expected = StandardizedTransformer(shared("gpt2"))
    hf.body = hf.transformer
    mine = ArchConfig(layers="body.h", self_attn="attn", mlp="mlp", ln_final="body.ln_f", lm_head="lm_head")
    model = StandardizedTransformer(hf, arch_config=mine)
    with torch.no_grad(), model.trace(prompt_ids()):
        one = model.mlps_output[1]
    with torch.no_grad(), expected.trace(prompt_ids()):
        assert torch.equal(expected.mlps_output[1], one)
