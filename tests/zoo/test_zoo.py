"""Each type of the zoo runs, repeats, is causal, is saved and generates: what the tests that use it take for granted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import in_memory_of_its_own
from torch import Tensor, nn

import zoo


@pytest.mark.parametrize("model_type", [name for name in zoo.TYPES if name not in zoo.REASONS])
def test_a_type(model_type: str, tmp_path: Path) -> None:
    model = zoo.build(model_type)
    runs_and_repeats(model)
    is_causal(model, model_type not in zoo.NOT_CAUSAL)
    if model_type not in zoo.NO_GRADIENTS:
        every_weight_matters(model)
    generates(model)
    is_saved_and_loaded(zoo.build(model_type), tmp_path)  # a new one: rwkv divides its weights when first called


def runs_and_repeats(model: nn.Module) -> None:
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    first = logits(model, zoo.ids(model))
    assert first.shape == (2, 9, zoo.vocab_size(model))
    assert first.isfinite().all()
    assert first.std() > 0.5, "the tokens do not matter"
    assert torch.equal(logits(model, zoo.ids(model)), first)


def is_causal(model: nn.Module, causal: bool) -> None:
    ids = zoo.ids(model)
    changed = ids.clone()
    changed[:, -1] = torch.where(ids[:, -1] + 1 < zoo.vocab_size(model), ids[:, -1] + 1, ids[:, -1] - 1)
    change = (logits(model, changed) - logits(model, ids)).abs()
    assert change[:, -1].max() > 0.1, "the last token does not matter to its own logits"
    if causal:
        assert change[:, :-1].max() < 1e-4  # not 0: experts' rows are added up in another order
    else:
        assert change[:, :-1].max() > 1e-3, "now it is causal: take it out of NOT_CAUSAL"


def every_weight_matters(model: nn.Module) -> None:
    logits = model(zoo.ids(model)).logits
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = (logits * torch.arange(logits.numel()).reshape(logits.shape).sin()).sum()
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    idle = {name for name, g in zip(weights, gradients, strict=True) if g is None or not g.any()}
    assert {name for name in idle if not any(part in name for part in zoo.WITHOUT_GRADIENT)} == set()


def generates(model: nn.Module) -> None:
    ids = zoo.ids(model)
    options = {"do_sample": False, "pad_token_id": 0, "decoder_start_token_id": 1, "num_return_sequences": 1}
    tokens = model.generate(ids, max_new_tokens=3, min_new_tokens=3, **options)
    tokens = tokens.squeeze(1)  # musicgen's are (batch, codebook, seq), and it puts its own first token
    assert tokens.shape == (2, 12)
    assert torch.equal(tokens[:, 1:9], ids[:, 1:])


def is_saved_and_loaded(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    ids = zoo.ids(model)
    assert torch.equal(logits(in_memory_of_its_own(loaded.eval()), ids), logits(model, ids))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("model_type", zoo.REASONS)
def test_a_type_that_does_not_run_fails_for_the_reason_given(model_type: str) -> None:
    _, error = zoo.REASONS[model_type].split("; raises ")
    with pytest.raises((ImportError, ValueError)) as raised:
        model = zoo.build(model_type)
        model(zoo.ids(model))
    assert f"{raised.type.__name__}: {str(raised.value).strip()}".startswith(error)


def test_the_exceptions_are_of_types_that_there_are() -> None:
    assert {*zoo.REASONS, *zoo.NOT_CAUSAL, *zoo.NO_GRADIENTS} <= set(zoo.TYPES)


def test_building_is_repeatable_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    first, second = zoo.build("gpt2").state_dict(), zoo.build("gpt2").state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_checks_can_fail() -> None:
    model = zoo.build("gpt2")
    every_weight_matters(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    with pytest.raises(AssertionError, match=r"h\.1\.mlp\.c_fc"):
        every_weight_matters(model)
    with pytest.raises(AssertionError):
        is_causal(zoo.build("bert", is_decoder=False), causal=True)
    with pytest.raises(AssertionError, match="take it out"):
        is_causal(model, causal=False)


@pytest.mark.parametrize(("model_type", "causal"), [("xlnet", False), ("prophetnet", False), ("reformer", True)])
def test_whether_it_is_causal_is_seen_where_no_layer_has_a_stream(model_type: str, causal: bool) -> None:
    model = zoo.loaded(model_type)
    ids = zoo.ids(model.hf_model, seq=6)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 7) % 50 + 3
    with torch.no_grad():
        one, other = (model.hf_model(input_ids=prompt).logits[:, :-1] for prompt in (ids, changed))
    assert torch.allclose(one, other, atol=1e-4) == causal == model.causal
