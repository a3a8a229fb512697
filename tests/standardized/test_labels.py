"""Labels: the loss of a prompt is that of the plain model on it alone, or is refused."""

from __future__ import annotations

import pytest
import torch
from architectures import prompt_ids, shared

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, RowsError

LONG, SHORT = prompt_ids(1, 8, 1), prompt_ids(1, 5, 2)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("how", ["in the block", "in a dict", "for all blocks"])
def test_labels_beside_other_blocks_are_refused(how: str, second: bool) -> None:
    """At the second block: one alone has its own loss."""
    model = StandardizedTransformer(shared("llama"))
    given = {"labels": LONG} if how == "for all blocks" else {}
    with pytest.raises(
        InputError,
        match=r"has one loss for it.*model.hf_model.loss_function\(model.logits, labels, model.vocab_size\)",
    ):
        with model.trace(**given) as tracer:
            if how == "in a dict":
                tracer.invoke({"input_ids": LONG, "labels": LONG}, lambda: None)
            else:
                tracer.invoke(LONG, lambda: None, **({"labels": LONG} if how == "in the block" else {}))
            tracer.invoke(SHORT, lambda: None, **({"labels": SHORT} if second else {}))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe"])
def test_a_blocks_own_loss_as_the_error_says(model_type: str) -> None:
    hf = shared(model_type)
    model = StandardizedTransformer(hf)

    def loss(labels: torch.Tensor) -> torch.Tensor:
        return hf.loss_function(model.logits, labels, model.vocab_size)

    with torch.no_grad():
        with model.trace() as tracer:
            blocks = [tracer.invoke(ids, lambda ids=ids: loss(ids)) for ids in (LONG, SHORT)]
        for block, ids in zip(blocks, (LONG, SHORT), strict=True):
            assert torch.allclose(block.value, hf(ids, labels=ids).loss, atol=1e-5)
        with model.trace() as tracer:  # one block alone
            alone = tracer.invoke(SHORT, lambda: tracer.result.loss, labels=SHORT)
        assert torch.equal(alone.value, hf(SHORT, labels=SHORT).loss)
    assert abs(float(blocks[0].value) - float(blocks[1].value)) > 0.01


def test_what_is_one_for_all_blocks_is_no_blocks_own() -> None:
    hf = shared("qwen2_moe")
    model = StandardizedTransformer(hf)
    with torch.no_grad():
        with model.trace(output_router_logits=True) as tracer:
            first = tracer.invoke(LONG, lambda: tracer.result)
            second = tracer.invoke(SHORT, lambda: tracer.result)
            both = tracer.invoke(lambda: tracer.result)
        plain = [hf(ids, output_router_logits=True) for ids in (LONG, SHORT)]
    for block, expected in zip((first, second), plain, strict=True):
        assert torch.allclose(block.value.logits, expected.logits, atol=1e-4)
        for name in ("aux_loss", "cache" if "cache" in expected else "past_key_values"):
            with pytest.raises(RowsError, match=f"{name} is one for the prompts of all blocks"):
                getattr(block.value, name).item()
    assert float(plain[0].aux_loss) != float(plain[1].aux_loss)
    assert both.value.aux_loss.ndim == 0


def test_labels_where_prompts_are_padded_here() -> None:
    hf = shared("llama")
    model = StandardizedTransformer(hf)
    prompts = [LONG[0].tolist(), SHORT[0].tolist()]
    labels = torch.cat([torch.zeros(1, 3, dtype=torch.long), SHORT], 1)
    labels = torch.cat([LONG, labels])
    with pytest.raises(InputError, match="3 of the labels are where the prompts are padded, on the left.*-100"):
        model.trace(prompts, labels=labels)
    labels[1, :3] = -100
    with torch.no_grad():
        with model.trace(prompts, labels=labels) as tracer:
            loss = tracer.result.loss
        expected = sum(hf(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in (LONG, SHORT)) / 11
    # The first token of the shorter prompt is counted as well: it comes after a pad.
    assert loss.isfinite()
    labels[1, 3] = -100
    with torch.no_grad(), model.trace(prompts, labels=labels) as tracer:
        assert torch.allclose(tracer.result.loss, expected, atol=1e-5)
