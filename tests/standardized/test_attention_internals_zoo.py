"""The inside of the attention on every causal-LM type of transformers: it is there, or refused for a reason known."""

from __future__ import annotations

import pytest
import releases
import torch
import zoo

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError

NAMES = (
    *("queries", "keys", "values", "attention_scores", "attention_probabilities", "values_weighted"),
    "heads_output",
)
#: Types of which no layer has an attention that is found, and what a refusal says.
WITHOUT_ATTENTION = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), "mamba"),
    "rwkv": "rwkv",
    "xlstm": "xlstm|lstm",
    "hrm_text": "it is gone through several times",
    "reformer": "is filled up to whole chunks",
    "inkling2_loop_text": "it has several: self_attn, mlp_input",
    **dict.fromkeys(("cpmant", "gemma3n_text", "inkling2_text", "longcat_flash", "prophetnet", "xlnet"), None),
}
#: type -> how many attention layers refuse, and what the refusals say.
REFUSED: dict[str, tuple[int, dict[str, str]]] = {
    # The difference of two attentions.
    "diffllama": (4, dict.fromkeys(NAMES, "fires 2 times")),
    # Some keys stand for several tokens, which a softmax of its own weighs.
    "deepseek_v4": (
        2,
        dict.fromkeys(NAMES, r"nothing shows that it is that|, 7(, 16)?\), not \(2|fires [23] times"),
    ),
}


@pytest.mark.parametrize("model_type", [name for name in zoo.TYPES if name not in zoo.REASONS])
def test_a_type(model_type: str) -> None:
    hf = zoo.shared(model_type)
    model, ids = zoo.loaded(model_type), zoo.ids(hf)
    assert (model_type in WITHOUT_ATTENTION) == (not model.attention_layers)
    if model_type in WITHOUT_ATTENTION:
        for name in NAMES:
            with pytest.raises(NotInThisModelError, match=WITHOUT_ATTENTION[model_type]), model.trace(ids):
                getattr(model, name)[0]
        return
    count, reasons = REFUSED.get(model_type, (0, {}))
    refused = []
    for layer in model.attention_layers:
        missing = {name for name in NAMES if getattr(model, name).modules[layer] is None}
        if missing:
            refused.append(layer)
            assert missing == reasons.keys()
            for name in missing:
                with pytest.raises(NotInThisModelError, match=reasons[name]), model.trace(ids):
                    getattr(model, name)[layer]
    assert len(refused) == count
    layers = [layer for layer in model.attention_layers if layer not in refused]
    with torch.no_grad():
        with model.trace(ids):
            found = [[getattr(model, name)[layer] for name in NAMES] for layer in layers]
            logits = model.logits
        assert torch.equal(logits, hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    for q, k, v, scores, pattern, weighted, heads in found:
        batch, count, seq, _ = q.shape
        assert (batch, seq) == (2, 9)
        assert (k.shape[-1], k.shape[1:3]) == (q.shape[-1], v.shape[1:3])
        assert scores.shape == pattern.shape == (2, count, 9, k.shape[2])
        assert k.shape[2] == 9 or model_type == "deepseek_v4"  # compressed ones, too
        part = pattern.sum(-1, keepdim=True)  # less than 1 with sinks
        torch.testing.assert_close(scores.softmax(-1) * part, pattern, rtol=0, atol=1e-5)
        v = v.repeat_interleave(count // v.shape[1], 1)
        torch.testing.assert_close(weighted, torch.einsum("bhqk,bhkd->bhqkd", pattern, v))
        given = (pattern @ v).transpose(1, 2)
        torch.testing.assert_close(heads, given, rtol=1e-4, atol=1e-4)


def test_the_tables_are_of_types_that_there_are() -> None:
    assert releases.missing({*WITHOUT_ATTENTION, *REFUSED}, zoo.TYPES) == set()


CHOOSE_KEYS = ("axk2", "hy_v4", "deepseek_v32", "glm_moe_dsa", "gpt_neo", "big_bird", "roformer", "llama")


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [(name, how) for name in CHOOSE_KEYS for how in ("sdpa", "eager") if (name, how) != ("hy_v4", "sdpa")],
)
def test_as_many_positions_as_heads(model_type: str, implementation: str) -> None:
    """Where a module within chooses keys, it has heads and positions in the places of positions and heads."""
    hf = zoo.shared(model_type)
    before = hf.config._attn_implementation
    hf.set_attn_implementation(implementation)
    try:
        model, ids = StandardizedTransformer(hf), zoo.ids(hf, seq=12)
        layer, heads = model.attention_layers[0], model.num_heads
        assert heads is not None
        for name in ("queries", "keys"):
            with torch.no_grad(), model.trace(ids[:, :heads]):
                few = getattr(model, name)[layer]
            with torch.no_grad(), model.trace(ids[:, : heads + 1]):
                more = getattr(model, name)[layer]
            assert few.shape[-2] == heads
            assert torch.allclose(few, more[:, :, :heads], atol=1e-4)
    finally:
        hf.set_attn_implementation(before)
