"""What a plot is of stands above it: the metric, and the prompts."""

from __future__ import annotations

import html
from typing import Any

import pytest
import torch
from results_asked import ASKS, CLEAN, FOURTH, OTHER, THIRD, my_own, pair_of

from nnatomy import StandardizedTransformer
from nnatomy.methods import (
    SteeringVector,
    activation_patching,
    attribution_patching,
    head_scores,
    lens_statistics,
    logit_lens,
    path_patching,
)
from nnatomy.methods.result import KINDS


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer("demo:gpt2")


def title(figure: Any) -> str:
    """As it is read."""
    return html.unescape(figure.layout.title.text.replace("<br>", " "))


@pytest.mark.parametrize("name", ASKS)
def test_it_names_the_prompts_and_the_metric(model: StandardizedTransformer, name: str) -> None:
    ask, prompts, metric = ASKS[name]
    above = title(ask(model).plot())
    assert [one for one in (CLEAN, OTHER, THIRD, FOURTH) if one in above] == [
        one for one in prompts if one != "Japan is in"
    ]
    assert all(one in above for one in prompts)
    assert metric in above
    assert "…" not in above


#: Results of prompts with images, which this model does not read.
OF_IMAGES = {"ImageLens", "PicturePatching"}


def test_each_class_of_results_is_among_them(model: StandardizedTransformer) -> None:
    assert {type(ask(model)).__name__ for ask, *_ in ASKS.values()} == set(KINDS) - OF_IMAGES


def test_of_many_pairs_the_first_and_how_many_and_of_one_its_own(model: StandardizedTransformer) -> None:
    found = activation_patching(model, [CLEAN, CLEAN], [OTHER, THIRD], metric=my_own, layers=[1])
    above = title(found.plot())
    assert f"{CLEAN!r} / {OTHER!r} ... of 4 prompts" in above
    for pair, other in ((0, OTHER), (1, THIRD), (-1, THIRD)):
        assert title(found.plot(pair=pair)).endswith(f": {CLEAN!r} / {other!r}")
    paths = path_patching(
        model, [CLEAN, THIRD], [OTHER, FOURTH], sender="mlps_contribution[0]", receivers="logits", metric=my_own
    )
    assert title(paths.plot(pair=1)).endswith(f": {THIRD!r} / {FOURTH!r}")
    lens = lens_statistics(model, [CLEAN, THIRD])
    assert title(lens.plot("kl", prompt=1)) == f"Lens statistics, kl: {THIRD!r}"


def test_a_long_prompt_is_cut_in_its_middle(model: StandardizedTransformer) -> None:
    long = "The capital of France is Paris . " * 10
    above = title(logit_lens(model, long).plot())
    assert "'The capital of France is Paris ... " in above
    assert len(above) < 120


def test_random_tokens_and_padding(model: StandardizedTransformer) -> None:
    scores = head_scores(model)["induction"]
    assert len(scores.prompts) == 4
    assert "... of 4 prompts" in title(scores.plot())
    of_cache = model.run_with_cache(["Japan is in", CLEAN])[1].logit_attribution(" Paris")
    assert of_cache.prompts == ("Japan is in", CLEAN)
    assert of_cache.metric == "logit of ' Paris'"


def test_a_title_of_ones_own_is_taken_as_it_is(model: StandardizedTransformer) -> None:
    assert title(head_scores(model, CLEAN)["induction"].plot("Mine")) == "Mine"
    assert title(attribution_patching(model, **pair_of(model)).plot("Mine")) == "Mine"


def test_a_vector_names_its_point_and_prompt(model: StandardizedTransformer) -> None:
    vector = SteeringVector({1: torch.ones(model.hidden_size)}, "layers_output", "gpt2", "given")
    wanted = f"Projection of layers_output on the direction of each layer (given): {CLEAN!r}"
    assert title(vector.plot(model, CLEAN)) == wanted
