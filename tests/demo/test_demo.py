"""The demo: its analyses against plain hooks, what the models know, the tables and the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import edited, hooked

from nnatomy import StandardizedTransformer
from nnatomy.demo.__main__ import MODELS, main
from nnatomy.demo.analysis import Results, analyse, patching, steering
from nnatomy.demo.page import lens_plot, page
from nnatomy.demo.tables import results_table, show_token

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
_results: dict[str, Results] = {}


def results(name: str) -> Results:
    if name not in _results:
        _results[name] = analyse(name)
    return _results[name]


@pytest.mark.parametrize("name", MODELS)
def test_they_know_their_facts_on_held_out_phrasings(name: str) -> None:
    """A sample of the pairs of fact and phrasing that training never saw."""
    sys.path.insert(0, str(ROOT / "training"))
    try:
        from phrasings import sentences  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "training"))
    _, held_out, _ = sentences()
    model = StandardizedTransformer(f"demo:{name}", validate=False)
    sample = held_out[::9]
    right = {1: [], 2: []}  # type: dict[int, list[bool]]
    for sentence in sample:
        answer = model.tokenizer.encode(sentence.answer)
        tokens = model.generate(sentence.prompt, max_new_tokens=len(answer), do_sample=False).run()
        right[sentence.fact.hops].append(tokens[0, -len(answer) :].tolist() == answer)
    assert min(len(right[1]), len(right[2])) > 20
    assert all(right[1])
    assert all(right[2])


@pytest.mark.parametrize("name", MODELS)
def test_the_card_says_what_they_know(name: str) -> None:
    card = json.loads((ROOT / "nnatomy/demo/models/card.json").read_text())
    held_out = card["models"][name]["held_out"]
    assert held_out["one_hop"]["accuracy"] >= 0.95
    assert held_out["two_hop"]["accuracy"] >= 0.85
    folder = ROOT / "nnatomy/demo/models"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4 * 2**20


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_forms_over_several_layers(name: str) -> None:
    for lens, answer in zip(results(name).lenses, (" Paris", " yen"), strict=True):
        by_layer = [dict(row).get(answer, 0.0) for row in lens.last]
        assert by_layer[0] < 0.01
        assert by_layer[-1] > 0.95
        assert any(0.02 < p < 0.98 for p in by_layer)


@pytest.mark.parametrize("name", MODELS)
def test_one_patch_is_what_a_plain_hook_does(name: str) -> None:
    model = StandardizedTransformer(f"demo:{name}", validate=False)
    clean, corrupted = "The capital of Spain is", "The capital of Peru is"
    mine = patching(model, clean, corrupted, " Madrid", " Lima", layer=2)
    hf, right, wrong = (
        model.hf_model,
        model.tokenizer.encode(" Madrid")[0],
        model.tokenizer.encode(" Lima")[0],
    )
    layer = hf.get_submodule(LAYERS[name])[2]
    inputs = {prompt: model.prepare(prompt) for prompt in (clean, corrupted)}
    kept = hooked(hf, lambda: hf(**inputs[clean]), {"clean": (layer, "output")})["clean"]

    def difference(logits: torch.Tensor) -> float:
        return float(logits[0, -1, right] - logits[0, -1, wrong])

    with torch.no_grad():
        ends = [difference(hf(**inputs[prompt]).logits) for prompt in (corrupted, clean)]
    for position in (3, 4):

        def patch(hidden: torch.Tensor, position: int = position) -> torch.Tensor:
            return torch.cat([hidden[:, :position], kept[:, position : position + 1], hidden[:, position + 1 :]], 1)

        patched = difference(edited(lambda: hf(**inputs[corrupted]), layer, "output", patch).logits)
        expected = (patched - ends[0]) / (ends[1] - ends[0])
        assert float(mine.effect[2, position]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_steering_is_what_a_plain_hook_does(name: str) -> None:
    model = StandardizedTransformer(f"demo:{name}", validate=False)
    hf = model.hf_model
    layer = hf.get_submodule(LAYERS[name])[2]
    prompts = ["The capital of Peru is", "The language of Peru is", "The language of Japan is"]
    last = [
        hooked(hf, lambda p=p: hf(**model.prepare(p)), {"h": (layer, "output")})["h"][0, -1]  # type: ignore[misc]
        for p in prompts
    ]
    vector = last[0] - last[1]
    mine = steering(model, prompts[2], prompts[:1], prompts[1:2], (" Japanese", " Tokyo"), 2, [0.7])

    def add(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += 0.7 * vector
        return hidden

    probs = edited(lambda: hf(**model.prepare(prompts[2])), layer, "output", add).logits[0, -1].softmax(-1)
    ids = [model.tokenizer.encode(token)[0] for token in (" Japanese", " Tokyo")]
    assert torch.allclose(mine.probs[0], probs[ids], atol=1e-5)


def test_the_tables_and_the_page(tmp_path: Path, capsys: Any) -> None:
    main(["--html", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    assert printed.count("turns the answer from '·Rome'") == 2
    assert printed.count("·Tokyo (9") >= 6
    text = (tmp_path / "page.html").read_text()
    assert r"\u00b7France|\u00b7Italy" in text  # (in JSON)
    markup = re.sub(r"(?s)<script[^>]*>.*?</script>", lambda m: m.group()[: m.group().index(">") + 1], text)
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", markup)  # nothing is loaded
    assert text.count("plotly-graph-div") >= 10


def test_odd_tokens_are_shown_and_escaped() -> None:
    assert show_token(" a\n\t") == "·a⏎⇥"
    odd = results("gpt2")
    lens = odd.lenses[0]
    lens = type(lens)("<script>x</script>", ["<b>", *lens.tokens[1:]], lens.top, lens.probs, lens.last)
    text = page([type(odd)(**{**odd.__dict__, "lenses": [lens, odd.lenses[1]]})])
    assert "<script>x" not in text
    assert "<b>" not in text


def test_what_plotly_is_given_is_neither_markup_nor_tex() -> None:
    lens = results("gpt2").lenses[0]
    top = [['<b>it\'s "$x$"'] * len(row) for row in lens.top]
    (cells,) = lens_plot(type(lens)("a $ b", lens.tokens, top, lens.probs, lens.last)).data
    assert cells.hovertext[0][0].endswith('<br>&lt;b&gt;it\'s "&#36;x&#36;"')
    ink = '<span style="color:#000000">'  # on a light cell
    assert cells.text[0][0] == f"{ink}&lt;b&gt;it's \"&#36;x…</span>"


def test_the_table_has_the_answer() -> None:
    assert "Paris" in results_table(results("gpt2"))
