"""The table of standard names: it says what a model has, and what is written from it is up to date."""

from __future__ import annotations

from functools import cache
from typing import Any

import names_written
import pytest
import torch
import zoo
from encoder_decoders import build as build_encoder_decoder
from encoder_decoders import inputs_of

from nnatomy import StandardizedTransformer
from nnatomy.names import CROSS, OF_LAYERS, ROWS, TABLE, equation
from nnatomy.standardized import LayerAccessor
from nnatomy.standardized.annotations import Annotations

#: Layers with heads of their own for keys and values, experts, several mixers, and none of these.
TYPES = ("gpt2", "llama", "mixtral", "jamba", "gpt_oss", "deepseek_v3", "opt")
OF_MODELS = [row for row in TABLE if row.part == "model"]
BATCH, SEQ = 2, 5


@cache
def loaded(model_type: str) -> StandardizedTransformer:
    return StandardizedTransformer(zoo.shared(model_type))


def accessors(model: StandardizedTransformer) -> dict[str, LayerAccessor]:
    return {name: one for name, one in vars(model).items() if isinstance(one, LayerAccessor)}


@pytest.mark.parametrize("path", names_written.written(), ids=lambda path: path.name)
def test_what_is_written_from_the_table_is_up_to_date(path: Any) -> None:
    assert path.read_text() == names_written.written()[path], "python tests/names_written.py"


def test_a_change_of_the_table_shows_in_all_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *others), of_models = names_written.OF_LAYERS, names_written.OF_MODELS
    monkeypatch.setattr(names_written, "OF_LAYERS", others)
    monkeypatch.setattr(names_written, "OF_MODELS", of_models[1:])
    for path, text in names_written.written().items():
        old = path.read_text().splitlines()
        gone = [line for line in old if line not in text.splitlines()]
        assert any(first.name in line for line in gone), path
        assert len(gone) < 7, path


def test_a_model_has_an_accessor_for_each_row_and_no_other() -> None:
    expected = {row.name for row in TABLE if row.part != "model"}
    of_encoders = {f"encoder_{row.name}" for row in TABLE if row.of_encoders}
    assert accessors(loaded("llama")).keys() == expected | of_encoders
    assert Annotations.__annotations__.keys() == expected | of_encoders
    assert {*OF_LAYERS, *CROSS} == expected


@pytest.mark.parametrize("row", OF_MODELS, ids=lambda row: row.name)
def test_a_row_of_the_model_is_a_property(row: Any) -> None:
    found = getattr(StandardizedTransformer, row.name)
    annotation, kind = found.fget.__annotations__["return"], "Int" if row.integer else "Float"
    if row.shape:
        assert annotation.replace("'", '"') == f'{kind}[Tensor, "{row.shape}"]'
    else:
        assert annotation is torch.Size
    assert (found.fset is not None) == row.assignable
    assert found.__doc__.startswith(row.doc[0].upper() + row.doc[1:])


@pytest.mark.parametrize("model_type", TYPES)
def test_values_have_the_axes_that_their_rows_say(model_type: str) -> None:
    model = loaded(model_type)
    ids = zoo.ids(model.hf_model)[:BATCH, :SEQ]
    for i in range(model.num_layers):
        sizes = {"batch": BATCH, "seq": SEQ, "query": SEQ, "key": SEQ, "hidden": model.hidden_size}
        for name in OF_LAYERS:
            if getattr(model, name).modules[i] is None:
                continue
            with torch.no_grad(), model.trace(input_ids=ids):
                value = getattr(model, name)[i]
            row = ROWS[name]
            assert value.ndim == len(row.axes), (name, value.shape)
            for axis, size in zip(row.axes, value.shape, strict=True):
                assert sizes.setdefault(axis, size) == size, (name, axis, sizes)
            assert value.is_floating_point() != row.integer
            assert row.seq is None or value.shape[row.seq] == SEQ
            assert {value.shape[axis] for axis in (*row.here, *row.so_far)} == {SEQ}


def test_the_heads_of_keys_and_queries_are_told_apart() -> None:
    model = loaded("llama")
    assert (model.num_heads, model.num_kv_heads) == (4, 2)
    with torch.no_grad(), model.trace(zoo.ids(model.hf_model)):
        found = {name: getattr(model, name)[1] for name in OF_LAYERS if ROWS[name].head is not None}
    for name, value in found.items():
        assert value.shape[ROWS[name].head] == (2 if "kv_head" in ROWS[name].axes else 4), name


def test_names_of_an_encoder_decoder() -> None:
    model = StandardizedTransformer(build_encoder_decoder("T5ForConditionalGeneration"))
    found = [(row, f"encoder_{row.name}") for row in TABLE if row.of_encoders]
    for row, name in [*found, *((ROWS[name], name) for name in CROSS)]:
        with torch.no_grad(), model.trace(**inputs_of(model.hf_model)):
            value = getattr(model, name)[0]
        assert value.ndim == len(row.axes), name
        assert row.head is None or value.shape[row.head] == model.num_heads, name


def test_an_equation_says_what_is_summed() -> None:
    pattern, values = torch.rand(2, 4, 5, 5), torch.rand(2, 4, 5, 3)
    heads = torch.einsum(equation(["attention_probabilities", "values"], "heads_output"), pattern, values)
    assert torch.allclose(heads, (pattern @ values).transpose(1, 2))
