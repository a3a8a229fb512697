"""Scores, patterns and edits of them in half precision, against attention written out in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from architectures import build, prompt_ids, shared
from encoder_decoders import build as build_seq2seq
from encoder_decoders import inputs_of
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError

HALVES = (torch.bfloat16, torch.float16)
LAYER = 1
#: With few key heads (GQA), multi-head latent attention, windows, biases, fused projections.
TYPES = (
    "qwen2",
    "llama",
    "mistral",
    "phi",
    "gpt2",
    "opt",
    "starcoder2",
    "deepseek_v3",
    "gpt_neox",
    "gemma3_text",
)


class Called(NamedTuple):
    """The arguments of one call of SDPA in a plain pass, and what it gave."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None
    result: Tensor

    @property
    def scores(self) -> Tensor:
        q, k = self.query.double(), self.key.double()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.mT * (self.scale or q.shape[-1] ** -0.5)
        mask = self.mask
        if self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()

    def heads(self, pattern: Tensor) -> Tensor:
        v = self.value.double()
        return pattern.double() @ v.repeat_interleave(pattern.shape[1] // v.shape[1], 1)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Called]]:
    """The calls of SDPA within, in their order."""
    calls: list[Called] = []
    sdpa = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        result = sdpa(query, key, value, attn_mask, **rest)
        calls.append(Called(query, key, value, attn_mask, rest.get("is_causal", False), rest.get("scale"), result))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        yield calls


def with_large_keys(hf: Any, dtype: torch.dtype, size: float = 300.0) -> Any:
    """Keys with large biases, as Qwen2 has them: scores are large, and their differences are not."""
    for name, module in hf.named_modules():
        if name.endswith(("k_proj", "kv_b_proj")):
            width = module.weight.shape[0]
            module.bias = nn.Parameter(torch.linspace(-size, size, width))
        elif name.endswith(("c_attn", "query_key_value")):
            with torch.no_grad():
                module.bias += torch.linspace(-size / 20, size / 20, len(module.bias))
        elif name.endswith("k_norm"):
            with torch.no_grad():
                module.weight += size / 3
    return hf.to(dtype)


def near(one: Tensor, other: Tensor, dtype: torch.dtype, roundings: float = 4) -> bool:
    """But for some roundings in that dtype, of the largest."""
    seen = other.isfinite()
    assert torch.equal(seen, one > torch.finfo(one.dtype).min / 2)
    off = (one.double() - other.double())[seen].abs().max()
    return bool(off <= roundings * torch.finfo(dtype).eps * other[seen].abs().max())


def with_its_call(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[StandardizedTransformer, Tensor, Any, Tensor]:
    """A model with large keys, a prompt, SDPA's call of one layer in the plain model, and its logits."""
    hf = with_large_keys(build(model_type), dtype)
    ids = prompt_ids()
    with torch.no_grad(), recorded(monkeypatch) as calls:
        plain = hf(ids).logits
    return StandardizedTransformer(hf), ids, calls[LAYER], plain


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model_type", TYPES)
def test_scores_and_pattern_are_those_that_sdpa_computes(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, call, plain = with_its_call(model_type, dtype, monkeypatch)
    with torch.no_grad():
        with model.trace(ids):
            scores, pattern = model.attention_scores[LAYER], model.attention_probabilities[LAYER]
            heads, logits = model.heads_output[LAYER], model.logits
        assert torch.equal(logits, plain)
        assert torch.equal(heads.transpose(1, 2), call.result)
        assert scores.dtype == torch.float32
        assert pattern.dtype == dtype
        assert near(scores, call.scores, torch.float32, 64)
        exact = call.scores.softmax(-1)
        assert near(pattern, exact, dtype, 1)
        assert near(call.heads(exact), call.result.double(), dtype)  # that SDPA is right
        # In the model's dtype they would be others.
        q, k = call.query, call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        rough = q @ k.mT * (call.scale or q.shape[-1] ** -0.5)
        rough = rough.masked_fill(call.scores == -math.inf, -math.inf).softmax(-1)
        assert not near(rough, exact, dtype, 2)


@pytest.mark.parametrize("name", ["attention_probabilities", "attention_scores"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_written_back_gives_what_sdpa_gives(
    model_type: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, call, plain = with_its_call(model_type, dtype, monkeypatch)
    with torch.no_grad():
        with model.trace(ids):
            getattr(model, name)[LAYER] = getattr(model, name)[LAYER].clone()
            back, logits = model.heads_output[LAYER].transpose(1, 2), model.logits
        with model.trace(ids):
            half = getattr(model, name)[LAYER]
            half *= 0.5
            halved = model.heads_output[LAYER].transpose(1, 2)
    assert back.dtype == halved.dtype == dtype
    assert near(back, call.result.double(), dtype, 2)
    assert logits.isfinite().all()
    assert float((logits - plain).abs().max() / plain.abs().max()) < 0.1  # rounding, which the layers after it spread
    pattern = call.scores.softmax(-1) / 2 if name == "attention_probabilities" else (call.scores / 2).softmax(-1)
    assert near(halved, call.heads(pattern), dtype)


def test_scores_larger_than_float16_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = with_large_keys(build("qwen2"), torch.float16, 40000.0)
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad():
        with recorded(monkeypatch) as calls:
            plain = hf(ids).logits
        with model.trace(ids):
            scores, pattern = model.attention_scores[LAYER], model.attention_probabilities[LAYER]
        with model.trace(ids):
            model.attention_probabilities[LAYER] = pattern
            logits = model.logits
    assert plain.isfinite().all()
    assert calls[LAYER].scores[calls[LAYER].scores.isfinite()].abs().max() > 65504
    assert near(scores, calls[LAYER].scores, torch.float32, 64)
    assert near(pattern, calls[LAYER].scores.softmax(-1), torch.float16, 1)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_an_additive_mask(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = with_large_keys(build("qwen2"), dtype)
    model, ids = StandardizedTransformer(hf), prompt_ids()
    mask = torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(
        ~torch.ones(9, 9, dtype=torch.bool).tril(), torch.finfo(dtype).min
    )
    mask[:, :, 5:, 2] = -3.0
    with torch.no_grad():
        with recorded(monkeypatch) as calls:
            hf(ids, attention_mask=mask)
        with model.trace(ids, attention_mask=mask):
            pattern = model.attention_probabilities[LAYER]
    assert calls[LAYER].mask is not None
    assert calls[LAYER].mask.dtype == dtype
    assert near(pattern, calls[LAYER].scores.softmax(-1), dtype, 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_an_encoder_and_a_cross_attention(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = with_large_keys(build_seq2seq("BartForConditionalGeneration"), dtype)
    model, ids = StandardizedTransformer(hf), inputs_of(hf)["input_ids"]
    with torch.no_grad():
        with recorded(monkeypatch) as calls:
            plain = hf(ids, decoder_input_ids=ids[:, :5]).logits
        with model.trace(ids, decoder_input_ids=ids[:, :5]):
            encoder = model.encoder_attention_probabilities[0]
            pattern = model.attention_probabilities[0]
            cross = model.cross_attention_probabilities[0]
            logits = model.logits
    assert torch.equal(logits, plain)
    shapes = [tuple(call.scores.shape[-2:]) for call in calls]
    for shown, shape in ((encoder, (9, 9)), (pattern, (5, 5)), (cross, (5, 9))):
        assert near(shown, calls[shapes.index(shape)].scores.softmax(-1), dtype, 1)


@pytest.mark.parametrize("name", ["attention_probabilities", "attention_scores"])
def test_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA takes what it is given in autocast's dtype, and computes in float32."""
    hf = with_large_keys(build("qwen2"), torch.float32)
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with recorded(monkeypatch) as calls:
            plain = hf(ids).logits
        call = calls[LAYER]
        call = call._replace(query=call.query.bfloat16(), key=call.key.bfloat16(), value=call.value.bfloat16())
        with model.trace(ids):
            pattern = model.attention_probabilities[LAYER]
            logits = model.logits
        with model.trace(ids):
            getattr(model, name)[LAYER] = getattr(model, name)[LAYER].clone()
            back = model.heads_output[LAYER].transpose(1, 2)
    assert torch.equal(logits, plain)
    assert pattern.dtype == back.dtype == torch.bfloat16
    assert near(pattern, call.scores.softmax(-1), torch.bfloat16, 1)
    assert near(back, call.result.double(), torch.bfloat16, 2)


def test_in_float64_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = copy.deepcopy(shared("qwen2")).double()
    model, ids = StandardizedTransformer(hf), prompt_ids()
    with torch.no_grad():
        with recorded(monkeypatch) as calls:
            hf(ids)
        with model.trace(ids):
            pattern = model.attention_probabilities[LAYER]
    assert pattern.dtype == torch.float64
    assert near(pattern, calls[LAYER].scores.softmax(-1), torch.float64, 8)


def test_a_write_takes_the_dtype_that_is_shown() -> None:
    model, ids = StandardizedTransformer(copy.deepcopy(shared("qwen2")).bfloat16()), prompt_ids()
    with torch.no_grad(), model.trace(ids):
        with pytest.raises(
            AssignmentError, match=r"attention_scores\[1\] is torch.float32 .* x.to\('cpu', torch.float32\)"
        ):
            model.attention_scores[LAYER] = model.attention_scores[LAYER].bfloat16()
        with pytest.raises(AssignmentError, match=r"attention_probabilities\[1\] is torch.bfloat16"):
            model.attention_probabilities[LAYER] = model.attention_probabilities[LAYER].float()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gemma2", "gpt_oss"])
def test_in_eager_mode_it_is_what_the_model_itself_computes(model_type: str, dtype: torch.dtype) -> None:
    """Rounded as the model rounds, with sinks and caps; where its scores overflow (GPT-NeoX in float16), it has no numbers."""
    hf = with_large_keys(build(model_type, attn_implementation="eager"), dtype, 200.0)
    if (model_type, dtype) == ("gpt_neox", torch.float16):
        with torch.no_grad():
            hf.gpt_neox.layers[LAYER].attention.query_key_value.weight *= 300
    model, ids = StandardizedTransformer(hf, validate=False), prompt_ids()
    with torch.no_grad():
        expected = hf(ids, output_attentions=True)
        with model.trace(ids):
            scores, pattern = model.attention_scores[LAYER], model.attention_probabilities[LAYER]
            logits = model.logits
    assert scores.dtype == pattern.dtype == dtype
    assert pattern.isfinite().all() == ((model_type, dtype) != ("gpt_neox", torch.float16))
    torch.testing.assert_close(pattern, expected.attentions[LAYER], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0, equal_nan=True)
