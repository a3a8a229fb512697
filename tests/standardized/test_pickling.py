"""Views are of this process: pickling one says what to do instead, and that works."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, UsageError

PROMPT = "The capital of France is"


def test_a_model_is_not_pickled_and_what_is_said_instead_works(tmp_path: Path) -> None:
    model = StandardizedTransformer("demo:gpt2", validate=False)
    edited = model.edit(lambda: model.steer(1, torch.ones(model.hidden_size)))
    for view in (model, edited, model.layers[0], model.layers_output, model.attentions, [model]):
        for dump in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
            with pytest.raises(UsageError, match=r"cannot be pickled .* model\.hf_model\.save_pretrained\(folder\)"):
                dump(view)
    expected = model(PROMPT).logits
    model.hf_model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    other = StandardizedTransformer(copy.deepcopy(model.hf_model), model.tokenizer, validate=False)
    for again in (StandardizedTransformer(tmp_path, validate=False), other):
        assert torch.equal(again(PROMPT).logits, expected)


def test_views_are_copied_as_views() -> None:
    model = StandardizedTransformer("demo:gpt2", validate=False)
    edited = model.edit(lambda: model.steer(1, torch.ones(model.hidden_size)))
    again = copy.copy(edited)
    assert again.hf_model is model.hf_model
    assert again.edits == edited.edits
    assert torch.equal(again(PROMPT).logits, edited(PROMPT).logits)
    assert not torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert torch.equal(edited.without_edits()(PROMPT).logits, model(PROMPT).logits)
    deep = copy.deepcopy(model)  # with the model in it
    expected = model(PROMPT).logits
    assert torch.equal(deep(PROMPT).logits, expected)
    with deep.trace(PROMPT):
        hidden = deep.layers_output[2]
    with model.trace(PROMPT):
        assert torch.equal(model.layers_output[2], hidden)
    with torch.no_grad():
        deep.hf_model.transformer.h[0].mlp.c_proj.bias += 1
    assert not torch.equal(deep(PROMPT).logits, expected)
    assert torch.equal(model(PROMPT).logits, expected)


def test_a_second_argument_that_is_no_tokenizer() -> None:
    with pytest.raises(
        InputError,
        match="tokenizer=True: it is a tokenizer, or its id or folder. All other arguments are given by",
    ):
        StandardizedTransformer("demo:gpt2", True)


class Names:
    """A tokenizer in which several tokens have one name, and one has none."""

    padding_side = "left"

    def __call__(self, _: str) -> Any: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [None if token == 5 else "same" if token % 2 else f"token {token}" for token in ids]


def test_tokens_of_one_name_are_told_apart() -> None:
    model = StandardizedTransformer(
        StandardizedTransformer("demo:gpt2", validate=False).hf_model, Names(), validate=False
    )
    hidden = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probs = model.project_on_vocab(hidden).softmax(-1)
        rows = model.get_topk_closest_tokens(hidden, k=model.vocab_size)
    for row, expected in zip(rows, probs, strict=True):
        assert len(row) == model.vocab_size
        order = expected.argsort(descending=True).tolist()
        assert [*row.values()] == pytest.approx(expected.sort(descending=True).values.tolist())
        odd = [token for token in order if token % 2 and token != 5]
        names = ["same", *(f"same[{token}]" for token in odd[1:])]
        assert all(row[name] == pytest.approx(float(expected[token])) for name, token in zip(names, odd, strict=True))
        assert row["[5]"] == pytest.approx(float(expected[5]))
