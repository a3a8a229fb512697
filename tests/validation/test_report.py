"""`model.validation`: what each name is on a model, as data, as text and in a notebook."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import zoo
from architectures import TYPES, build, shared
from rich.console import Console

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import FAMILIES
from nnatomy.errors import InputError, NotInThisModelError, ValidationError
from nnatomy.names import OF_LAYERS as NAMES
from nnatomy.validation.refusing import WHOLE
from nnatomy.validation.report import Report, Row, spans


def wrong(model_type: str, **changes: Any) -> Any:
    name = type(shared(model_type)).__name__
    return dataclasses.replace(next(f for f in FAMILIES if name in f.classes), **changes)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_name_of_every_layer_has_a_row(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    places = [(row.name, row.layer) for row in model.validation]
    assert places == [(n, i) for n in NAMES for i in range(model.num_layers)] + [(n, None) for n in WHOLE]
    assert model.validation.counts["failed"] == model.validation.counts["unverified"] == 0
    for row in model.validation:
        if row.layer is not None:
            there = getattr(model, row.name).modules[row.layer] is not None
            assert row.status == ("verified" if there else "refused")
            assert bool(row.detail) == (not there)


def test_errors_are_what_was_measured() -> None:
    report = StandardizedTransformer(shared("gemma2")).validation
    assert report["layers_output", 1].error == 0  # bit for bit
    for name in ("attention_scores", "heads_output", "mlps_contribution"):
        assert 0 <= report[name, 0].error < 1e-4
    assert any(row.error > 0 for row in report if row.error is not None)
    assert report["mlps_output", 0].error is None  # it fires, has its shape and an effect
    assert report["project_on_vocab", None].error < 1e-6
    with pytest.raises(KeyError, match=r"queries\[9\]"):
        report["queries", 9]


REPORT = Report(
    "ToyForCausalLM",
    [
        Row("layers_output", 0, "verified", 0.0, ""),
        Row("layers_output", 1, "verified", 1e-7, ""),
        Row("mlps_output", 0, "refused", None, "it has <no> MLP"),
        Row("mlps_output", 1, "failed", None, "fires 2 times"),
        Row("padding", None, "unverified", None, ""),
    ],
)


def test_as_text() -> None:
    assert str(REPORT) == (
        "ToyForCausalLM: 2 verified, 1 refused, 1 failed, 1 unverified. "
        "Refused: to ask for it is an error that says why, and never another value. Here (1): it has <no> MLP\n"
        "name           layers  status      error\n"
        "layers_output  0-1     verified    1.0e-07\n"
        "mlps_output    0       refused              it has <no> MLP\n"
        "mlps_output    1       failed               fires 2 times\n"
        "padding                unverified"
    )
    assert repr(REPORT) == (
        "<Report of ToyForCausalLM: 2 verified, 1 refused, 1 failed, 1 unverified; print it for the table>"
    )
    assert spans([0, 1, 2, 4, 7, 8]) == "0-2, 4, 7-8"


def test_reasons_stand_beside_the_count_the_most_frequent_first() -> None:
    reasons = ["it has no MLP", *["its mixer is mamba"] * 3, *["it is shared"] * 2, "it is normed", "it is odd"]
    rows = [Row("mlps_output", i, "refused", None, why) for i, why in enumerate(reasons)]
    assert Report("Toy", rows).why_refused.endswith(
        "Here (3): its mixer is mamba; (2): it is shared; (1): it has no MLP; 2 other reasons, in the rows"
    )
    assert Report("Toy", [Row("logits", None, "verified", None, "")]).why_refused == ""
    assert str(Report("Toy", [Row("logits", None, "verified", None, "")])).startswith("Toy: 1 verified\n")


def test_in_a_terminal_and_a_notebook() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(REPORT)
        text = console.export_text()
    assert all(
        part in text
        for part in ("ToyForCausalLM: 2 verified", "0-1", "it has <no> MLP", "failed", "Refused: to ask for it")
    )
    html = REPORT._repr_html_()
    assert "it has &lt;no&gt; MLP" in html
    assert "1 unverified. Refused: to ask for it is an error that says why" in html
    assert html.count("<tr>") == 5


def test_as_data() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["counts"] == {"verified": 2, "refused": 1, "failed": 1, "unverified": 1}
    assert data["rows"][3] == {
        "name": "mlps_output",
        "layer": 1,
        "status": "failed",
        "error": None,
        "detail": "fires 2 times",
    }


def test_a_model_that_nobody_has_checked_says_so() -> None:
    model = StandardizedTransformer(shared("llama"), validate=False)
    assert {row.status for row in model.validation} == {"unverified"}
    assert "not validated" in repr(model)


def test_a_failed_promise_comes_with_its_report() -> None:
    with pytest.raises(ValidationError) as error:
        StandardizedTransformer(shared("gpt2"), arch_config=wrong("gpt2", mlp="mlp.c_fc"))
    report = error.value.report
    assert {(r.name, r.layer) for r in report if r.status == "failed"} == {("mlps_output", i) for i in range(3)}
    assert "load with allow_failures=True" in str(error.value)


def test_failures_can_be_allowed_and_then_refuse() -> None:
    model = StandardizedTransformer(shared("gpt2"), arch_config=wrong("gpt2", mlp="mlp.c_fc"), allow_failures=True)
    assert model.validation["mlps_output", 2].status == "failed"
    with pytest.raises(NotInThisModelError, match=r"mlps_output\[2\].*it failed validation: is \(2, 6, 48\)"):
        with model.trace([1, 2, 3]):
            model.mlps_output[2]
    with torch.no_grad(), model.trace([1, 2, 3]):
        assert model.layers_output[2].shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("model_type", "changes", "name"),
    [
        ("llama", {"ln_final": "model.layers.0.input_layernorm"}, "ln_final"),
        ("gpt2", {"embed_tokens": "transformer.wpe"}, "token_embeddings"),
        ("bloom", {"lm_head": "transformer.h.0.mlp.dense_4h_to_h"}, "lm_head"),
    ],
)
def test_so_do_names_that_belong_to_no_layer(model_type: str, changes: Any, name: str) -> None:
    model = StandardizedTransformer(shared(model_type), arch_config=wrong(model_type, **changes), allow_failures=True)
    with pytest.raises(NotInThisModelError, match=f"{name}: it failed validation: "):
        with model.trace([1, 2, 3]):
            getattr(model, name)
    if name == "token_embeddings":
        with pytest.raises(NotInThisModelError, match="token_embeddings: it failed"), model.trace([1, 2, 3]):
            model.token_embeddings = torch.zeros(1, 3, 32)


# Shapes alone.


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_shapes_can_be_checked_without_computing(model_type: str) -> None:
    hf = build(model_type).to("meta")
    with pytest.raises(InputError, match="on the meta device.*validate='shapes'"):
        StandardizedTransformer(hf)
    model = StandardizedTransformer(hf, validate="shapes")
    assert {row.status for row in model.validation} <= {"unverified", "refused"}
    assert "not validated" in repr(model)
    with pytest.raises(ValidationError, match=r"mlps_output\[0\]: is \(2, 3, 48\), not \(2, 3, 32\)"):
        StandardizedTransformer(build("gpt2"), arch_config=wrong("gpt2", mlp="mlp.c_fc"), validate="shapes")


# Padding.

#: Types whose positions do not follow the mask, or whose state goes through the padding.
SHOWS = ("bart", "falcon_h1", "recurrent_gemma", "xlstm")


@pytest.mark.parametrize("model_type", [*SHOWS, "roberta", "camembert", "opt", "qwen3_next"])
def test_padding_is_taken_where_it_does_not_show(model_type: str) -> None:
    hf = zoo.build(model_type)
    model = StandardizedTransformer(hf)
    alone, other = [3, 7, 11], [5, 9, 2, 4, 6]
    if model_type in SHOWS:
        assert model.validation["padding", None].detail.startswith("it shows in layers_output[-1], by ")
        for trace in (lambda: model.trace([alone, other]), lambda: invoked(model, alone, other)):
            with pytest.raises(InputError, match="of 3, 5 tokens. On this model padding is no way"), trace():
                model.logits
        with torch.no_grad(), model.trace([alone, other[:3]]):  # of one length
            logits = model.logits[:1]
    else:
        with torch.no_grad(), model.trace([alone, other]):
            logits = model.logits[:1, 2:]
    with torch.no_grad():
        expected = hf(input_ids=torch.tensor([alone])).logits
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def invoked(model: Any, *prompts: Any) -> Any:
    trace = model.trace()
    with trace as tracer:
        for prompt in prompts:
            tracer.invoke(prompt, lambda: model.logits)
    return trace
