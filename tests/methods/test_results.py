"""Results: their text, tables and files, against plain sorts and the numbers themselves."""

from __future__ import annotations

import copy
import pickle
import sys
from itertools import product
from pathlib import Path
from typing import Any

import plotly.io
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, MissingPackageError
from nnatomy.methods import (
    LogitLens,
    activation_patching,
    attribution_patching,
    circuit_faithfulness,
    direct_logit_attribution,
    edge_attribution,
    head_ablation,
    head_scores,
    lens_statistics,
    logit_lens,
    path_patching,
)
from nnatomy.methods.result import Result

PROMPT, OTHER = "The capital of France is", "The capital of Italy is"


def metric(logits: Tensor) -> Tensor:
    return logits[:, 7] - logits[:, 9]


def _faithful(m: Any) -> Any:
    return circuit_faithfulness(
        m, PROMPT, OTHER, metric=metric, attribution=edge_attribution(m, PROMPT, OTHER, metric=metric), sizes=[1, 20]
    )


ASKS: dict[str, Any] = {
    "activation_patching": lambda m: activation_patching(m, PROMPT, OTHER, metric=metric),
    "activation_patching of heads": lambda m: activation_patching(
        m, PROMPT, OTHER, metric=metric, point="heads_output", layers=[1, 2]
    ),
    "path_patching": lambda m: path_patching(
        m, clean=PROMPT, corrupted=OTHER, sender="mlps_contribution[0]", receivers="logits", metric=metric
    ),
    "attribution_patching": lambda m: attribution_patching(m, PROMPT, OTHER, metric=metric),
    "edge_attribution": lambda m: edge_attribution(m, PROMPT, OTHER, metric=metric),
    "circuit_faithfulness": _faithful,
    "direct_logit_attribution": lambda m: direct_logit_attribution(m, PROMPT, answer=" Paris", by="component"),
    "head_scores": lambda m: head_scores(m)["induction"],
    "head_ablation": lambda m: head_ablation(m, PROMPT, metric=metric),
    "lens_statistics": lambda m: lens_statistics(m, PROMPT),
    "logit_lens": lambda m: logit_lens(m, PROMPT),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Result]:
    model = StandardizedTransformer("demo:gpt2")
    return {name: ask(model) for name, ask in ASKS.items()}


@pytest.mark.parametrize("name", ASKS)
def test_a_text_is_one_screen_and_html_has_the_plot(
    found: dict[str, Result], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = repr(found[name]).splitlines()
    assert 2 <= len(lines) <= 24
    assert max(map(len, lines)) < 120
    assert found[name].title in lines[0]
    assert "plotly" in found[name]._repr_html_()
    monkeypatch.setattr(plotly.io.renderers, "_default_renderers", [plotly.io.renderers["plotly_mimetype"]])
    bundle = found[name]._repr_mimebundle_()
    assert bundle["text/plain"] == repr(found[name])
    assert bundle["application/vnd.plotly.v1+json"]["data"]


@pytest.mark.parametrize("name", ["attribution_patching", "direct_logit_attribution", "head_scores"])
def test_top_is_a_plain_sort(found: dict[str, Result], name: str) -> None:
    result = found[name]
    values = result.effect.float()  # type: ignore[attr-defined]
    if result.axes[0].name == "prompt":
        values = values.mean(0)
    flat = sorted(values.flatten().tolist(), key=abs, reverse=True)
    assert [x for *_, x in result.top(7)] == flat[:7]


@pytest.mark.parametrize("name", [one for one in ASKS if one != "logit_lens"])
def test_tables_have_each_number_at_its_place(found: dict[str, Result], name: str) -> None:
    result = found[name]
    values: Tensor = result.effect  # type: ignore[attr-defined]
    table, array = result.to_dataframe(), result.to_xarray()
    assert len(table) == values.numel()
    assert array.dims == tuple(axis.name for axis in result.axes)
    for row, at in zip(range(len(table)), product(*map(range, values.shape)), strict=True):
        for i, axis in enumerate(result.axes):
            assert table[axis.name][row] == axis.labels[at[i]] == array.coords[axis.name].values[at[i]]
        one = torch.tensor(table["effect"][row], dtype=values.dtype)
        assert torch.allclose(one, values[at], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ASKS)
def test_a_file_gives_it_back(found: dict[str, Result], name: str, tmp_path: Path) -> None:
    result = found[name]
    result.save(tmp_path / "result")
    for kind in (type(result), Result):
        again = kind.load(tmp_path / "result")
        assert type(again) is type(result)
        assert repr(again) == repr(result)
        for key, value in result._state().items():
            other = again._state()[key]
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value.nan_to_num(7.5), other.nan_to_num(7.5))
            else:
                assert type(value) is type(other)
                assert value == other


def test_what_is_no_such_file_is_refused(found: dict[str, Result], tmp_path: Path) -> None:
    kind, path = type(found["head_scores"]), tmp_path / "result"
    with pytest.raises(InputError, match="There is no file"):
        kind.load(path)
    path.write_text("other")
    with pytest.raises(InputError, match="is no file that a result's save wrote"):
        kind.load(path)
    save_file({"0": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="is no file that a result's save wrote"):
        kind.load(path)
    found["edge_attribution"].save(path)
    with pytest.raises(InputError, match=r"is an EdgeAttribution, not a HeadMap: EdgeAttribution.load\(path\)"):
        kind.load(path)


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_dataframe"), ("xarray", "to_xarray")])
@pytest.mark.parametrize("name", ["head_scores", "logit_lens"])
def test_without_the_package(
    found: dict[str, Result], name: str, package: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf'are made with {package}: pip install "nnatomy\[tables\]"\.'):
        getattr(found[name], call)()


def test_a_lens_is_a_tensor(found: dict[str, Result]) -> None:
    lens = found["logit_lens"]
    assert isinstance(lens, LogitLens)
    plain = lens._numbers()
    for one, other in (
        (lens[0], plain[0]),
        (lens + 1, plain + 1),
        (torch.log(lens), plain.log()),
        (next(iter(lens)), plain[0]),
    ):
        assert type(one) is Tensor
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(lens.argmax(-1), plain.argmax(-1))
    for again in (copy.copy(lens), copy.deepcopy(lens), pickle.loads(pickle.dumps(lens))):
        assert torch.equal(again, plain)
        assert type(again) is LogitLens
        assert repr(again) == repr(lens)
    best = sorted(plain[0, 2].tolist(), reverse=True)[:3]
    assert [x for _, x in lens.top(3, layer=2)] == best
    assert lens.to_dataframe(3).query("layer == 2")["effect"].tolist() == best
    assert torch.equal(torch.as_tensor(lens.plot().data[0].z).squeeze().float(), plain[0].max(-1).values)
    with pytest.raises(InputError, match="layer=99: the layers are 0 to 5"):
        lens.top(layer=99)


def test_a_folder_that_is_not_there_is_said(found: dict[str, Result], tmp_path: Path) -> None:
    _, cache = StandardizedTransformer("demo:gpt2").run_with_cache("Japan is in", ["layers_output"], layers=[1])
    for one in (next(iter(found.values())), cache):
        with pytest.raises(FileNotFoundError, match=r"There is no folder '.*away' to write 'x' into: make it first\."):
            one.save(tmp_path / "away" / "x")
        with pytest.raises(IsADirectoryError, match=r"is a folder: give the path of a file to write\."):
            one.save(tmp_path)
