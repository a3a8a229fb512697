"""The validator finds what is wrong: each promise, broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from architectures import TYPES, build, shared
from torch import Tensor, nn
from transformers import AttentionInterface

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import FAMILIES, ArchConfig
from nnatomy.errors import NotInThisModelError, ValidationError


def config_of(model_type: str, **changes: Any) -> ArchConfig:
    name = type(shared(model_type)).__name__
    return dataclasses.replace(next(f for f in FAMILIES if name in f.classes), **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "text"),
    [
        ("llama", {"self_attn": "mlp"}, r"attention_probabilities\[0\]: fires 0 times"),
        ("llama", {"mlp": "self_attn.o_proj.nope"}, None),
        ("llama", {"self_attn": "self_attn.q_proj"}, r"attention_probabilities\[2\]: fires 0 times"),
        (
            "gemma2",
            {"self_attn": "self_attn.q_proj"},
            r"attentions_output\[0\]: is \(2, 6, 64\), not \(2, 6, 32\)",
        ),
        ("gpt2", {"mlp": "mlp.c_fc"}, r"mlps_output\[0\]: is \(2, 6, 48\), not \(2, 6, 32\)"),
        ("opt", {"mlp": "fc1"}, r"mlps_input\[1\]: is \(12, 32\), not \(2, 6, 32\)"),
        (
            "bloom",
            {"lm_head": "transformer.h.0.mlp.dense_4h_to_h"},
            "lm_head: Linear does not give a number for each of 67 tokens",
        ),
        (
            "gpt2",
            {"embed_tokens": "transformer.wpe"},
            "token_embeddings: Embedding is not given the tokens' ids",
        ),
        (
            "llama",
            {"ln_final": "model.layers.0.input_layernorm"},
            r"ln_final: LlamaRMSNorm does not read layers_output\[-1\]",
        ),
    ],
)
def test_a_name_for_the_wrong_module_is_found(model_type: str, changes: Any, text: str | None) -> None:
    if text is None:
        with pytest.raises(Exception, match="has no"):
            StandardizedTransformer(shared(model_type), arch_config=config_of(model_type, **changes))
        return
    with pytest.raises(ValidationError, match=text):
        StandardizedTransformer(shared(model_type), arch_config=config_of(model_type, **changes))


def test_all_failures_come_at_once_with_their_numbers() -> None:
    hf = build("llama")

    class Doubling(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.inner(*args, **kwargs)
            return self.inner(*args, **kwargs)

    for layer in hf.model.layers[:2]:
        layer.wrapped = Doubling(layer.mlp)
        layer.mlp = layer.wrapped
    config = config_of("llama", mlp="mlp.inner")
    for layer in hf.model.layers[2:]:
        layer.mlp = Doubling(layer.mlp)
    with pytest.raises(ValidationError) as error:
        StandardizedTransformer(hf, arch_config=config)
    lines = str(error.value).split("\n")
    assert lines[0] == "6 promise(s) of the standard names failed on LlamaForCausalLM:"
    assert [line.strip(" -") for line in lines[1:7]] == [
        f"mlps_{kind}[{i}]: fires 2 times in a forward pass, not once" for kind in ("input", "output") for i in range(3)
    ]
    assert lines[7].startswith("Give another ArchConfig")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_dead_sublayer_is_found(model_type: str) -> None:
    """A layer whose output does not depend on what a name reads: writing there shows nothing."""
    hf = build(model_type)
    layers = hf.get_submodule(config_of(model_type).layers)
    layer = layers[1]
    forward = layer.forward
    frozen: list[Any] = []

    def constant(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        frozen.append(output)
        return frozen[0]

    layer.forward = constant
    with pytest.raises(ValidationError, match=r"attentions_output\[1\]: writing it changes no layer output"):
        StandardizedTransformer(hf)


def test_values_that_are_not_finite_are_found() -> None:
    hf = build("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValidationError, match=r"mlps_output\[1\]: has values that are not finite"):
        StandardizedTransformer(hf)


@contextmanager
def attending(to: Tensor, factor: float = 1.0) -> Iterator[None]:
    """Models built with `attn_implementation="of_the_test"` attend to what (query, key) says; rows times a factor."""

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        pattern = (q @ k.mT * scaling).masked_fill(~to[: q.shape[-2], : k.shape[-2]], -1e9).softmax(-1) * factor
        return (pattern @ v).transpose(1, 2), pattern

    AttentionInterface.register("of_the_test", attention)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop("of_the_test")


EVERYTHING = torch.ones(8, 8).bool()


@pytest.mark.parametrize(
    ("factor", "to", "text"),
    [
        (1.2, EVERYTHING.tril(), "has rows that sum to more than 1, up to 1.2"),
        (0.8, EVERYTHING.tril(), "has rows that sum to less than 1, down to 0.8, and no attention sink"),
        (-1.0, EVERYTHING.tril(), "has entries below 0, down to -1"),
        (1.0, EVERYTHING, "attends to later positions, with up to 0"),
    ],
)
def test_a_pattern_that_is_no_causal_distribution_is_found(factor: float, to: Tensor, text: str) -> None:
    with attending(to, factor):
        hf = build("qwen3", num_key_value_heads=4, attn_implementation="of_the_test")
        with pytest.raises(ValidationError, match=rf"attention_probabilities\[0\]: {text}"):
            StandardizedTransformer(hf)


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (5, r"\[0\]: attends beyond its window, with up to 0\.\d+"),
        (3, r"\[1\]: attends to less than its window"),
    ],
)
def test_a_pattern_that_has_not_the_windows_of_the_config_is_found(width: int, text: str) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "num_hidden_layers": 2}
    types = ["sliding_attention", "full_attention"]
    options = {
        "num_key_value_heads": 4,
        "attn_implementation": "of_the_test",
        "layer_types": types,
        **windows,
    }
    with attending(EVERYTHING.tril().triu(1 - width)):
        hf = build("qwen3", **options)
        with pytest.raises(ValidationError, match=f"attention_probabilities{text}"):
            StandardizedTransformer(hf)


@pytest.mark.parametrize(
    ("width", "text"), [(5, "attends beyond its window, with up to"), (3, "attends to less than its window")]
)
def test_a_pattern_without_the_one_window_of_all_layers_is_found(width: int, text: str) -> None:
    with attending(EVERYTHING.tril().triu(1 - width)):
        hf = build("mistral", num_key_value_heads=4, attn_implementation="of_the_test", sliding_window=4)
        with pytest.raises(ValidationError, match=rf"attention_probabilities\[\d\]: {text}") as failed:
            StandardizedTransformer(hf)
    assert str(failed.value).count(text) == hf.config.num_hidden_layers


def test_a_pattern_that_looks_ahead_on_a_model_that_does_not_is_found() -> None:
    """One without a head: nothing but what it computes says that it is causal."""

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        pattern = (q @ k.mT * scaling).softmax(-1)
        causal = pattern.tril() / pattern.tril().sum(-1, keepdim=True)
        return (0 * (pattern @ v) + causal @ v).transpose(1, 2), pattern

    AttentionInterface.register("of_the_test", attention)
    try:
        hf = zoo.build_class("LlamaModel", "llama", num_key_value_heads=4, attn_implementation="of_the_test")
        model = StandardizedTransformer(hf)
    finally:
        AttentionInterface._global_mapping.pop("of_the_test")
    assert model.causal  # as seen before
    for layer in range(model.num_layers):
        with pytest.raises(NotInThisModelError, match=r"attention_probabilities.*attends to later positions, with"):
            model.attention_probabilities.module(layer)


def test_a_wrong_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnatomy.standardized.head import Head

    long_way = Head.long_way
    monkeypatch.setattr(Head, "long_way", lambda self, hidden: 1.01 * long_way(self, hidden))
    with pytest.raises(
        ValidationError, match=r"project_on_vocab: of layers_output\[-1\] is not the logits, off by 1.0e-02"
    ):
        StandardizedTransformer(shared("granite"))


def test_a_cap_that_small_logits_do_not_reach_is_in_the_head() -> None:
    """One that is a power of two, so that dividing by it and multiplying again is exact."""
    hf = build("gemma2", final_logit_softcapping=32.0, tie_word_embeddings=False).to(torch.bfloat16)
    with torch.no_grad():
        hf.lm_head.weight *= 1e-2
    model = StandardizedTransformer(hf)
    with torch.no_grad():
        hf.lm_head.weight *= 1e4
        hidden = torch.randn(1, 1, model.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        uncapped = hf.lm_head(hf.model.norm(hidden)).float()
        assert uncapped.abs().max() > 100
        logits = model.project_on_vocab(hidden).float()
    torch.testing.assert_close(logits, 32 * (uncapped / 32).tanh(), rtol=2e-2, atol=2e-1)


def test_without_validation_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build("llama")
    monkeypatch.setattr(hf, "forward", None)
    with pytest.raises(TypeError):
        StandardizedTransformer(hf)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("LlamaForCausalLM", "llama"),
        ("ViTModel", "vit"),
    ],  # the one by what is padded; the other has nothing to pad
)
def test_a_reading_that_changes_the_model_is_found(monkeypatch: pytest.MonkeyPatch, name: str, model_type: str) -> None:
    from nnatomy.standardized.attention import AttentionMode

    sdpa = AttentionMode._sdpa
    monkeypatch.setattr(AttentionMode, "_sdpa", lambda self, *args, **kwargs: 1.01 * sdpa(self, *args, **kwargs))
    with pytest.raises(ValidationError, match=r"reading: it changes layers_output\[-1\], by .*e-0. \(relative\)"):
        StandardizedTransformer(zoo.build_class(name, model_type))


def test_padding_that_gives_no_numbers_is_refused() -> None:
    """In float64, whose lowest number a softmax in float32 takes for minus infinity: a row of it has no numbers."""
    model = StandardizedTransformer(build("gemma2").double())
    (padding,) = (row for row in model.validation if row.name == "padding")
    assert padding.status == "refused"
    assert padding.detail == "it shows in layers_output[-1], by inf (relative)"
    (reading,) = (row for row in model.validation if row.name == "reading")
    assert reading.status == "verified"


def test_a_reading_that_changes_the_model_is_found_where_padding_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nnatomy.standardized.attention import AttentionMode

    soften = AttentionMode._soften
    monkeypatch.setattr(AttentionMode, "_soften", lambda self, *args, **kwargs: 1.01 * soften(self, *args, **kwargs))
    hf = zoo.build_class("DeepseekV4ForCausalLM", "deepseek_v4")
    with pytest.raises(ValidationError, match=r"reading: it changes the logits, by .*e-0. \(relative\)"):
        StandardizedTransformer(hf)


def capped() -> Any:
    """A Gemma 2 whose queries and keys are so large that most scores lie at the end of their cap."""
    hf = build("gemma2", attn_logit_softcapping=1.0)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight *= 40
            layer.self_attn.k_proj.weight *= 40
    return hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_at_the_end_of_a_cap_are_no_fault(dtype: torch.dtype) -> None:
    hf = capped().to(dtype)
    model = StandardizedTransformer(hf)
    kept = {"queries", "keys", "values", "attention_scores", "attention_probabilities", "heads_output"}
    rows = [row for row in model.validation if row.name in kept]
    assert {row.name for row in rows} == kept
    assert {row.status for row in rows} == {"verified"}
    with torch.no_grad(), model.trace(torch.tensor([[5, 6, 7, 8, 9, 10]])):
        scores = model.attention_scores[0]
    seen = scores[scores > -1e4].abs()
    assert float((seen > 0.99).float().mean()) > 0.5


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (
            "scale",
            r"heads_output\[0\]: attention_probabilities times values is not heads_output, off by .*e-0",
        ),
        ("values", r"values\[0\]: writing it changes nothing that comes of it"),
        ("queries", r"queries\[0\]: only 0% of the changes in the scores are those of queries changed"),
        ("keys", r"keys\[1\]: only 0% of the changes in the scores are those of keys changed"),
        ("heads_output", r"heads_output\[2\]: writing it changes no attention"),
    ],
)
def test_a_wrong_inside_of_the_attention_is_found(monkeypatch: pytest.MonkeyPatch, broken: str, text: str) -> None:
    from nnatomy.standardized import attention

    mode, scores = attention.AttentionMode, attention.sdpa_scores
    show, show_shared = mode._show, mode._show_shared

    def shown_only(self: Any, kind: str, own: Any, **kwargs: Any) -> Any:
        """What is written does not reach the model."""
        new = (show_shared if kind in ("keys", "values") else show)(self, kind, own, **kwargs)
        return own if kind == broken else new

    if broken == "scale":
        monkeypatch.setattr(
            attention, "sdpa_scores", lambda q, k, m, c, s: scores(q, k, m, c, 1.1 * q.shape[-1] ** -0.5)
        )
    else:
        monkeypatch.setattr(mode, "_show", shown_only)
        monkeypatch.setattr(mode, "_show_shared", shown_only)
    with pytest.raises(ValidationError, match=text):
        StandardizedTransformer(shared("llama"))
    if broken in ("queries", "keys"):
        with pytest.raises(ValidationError, match=text):
            StandardizedTransformer(capped())
