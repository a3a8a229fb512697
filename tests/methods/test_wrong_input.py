"""What is wrong with an argument is said, and how to mend it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nnatomy.methods
from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError
from nnatomy.methods import (
    Patching,
    PathPatching,
    SteeringVector,
    activation_patching,
    attribution_patching,
    causal_tracing,
    direct_logit_attribution,
    lens_statistics,
    log_probability,
    logit_difference,
    probability,
)
from nnatomy.methods.arguments import CHECKS

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer("demo:gpt2", validate=False)


def test_each_is_an_error_that_says_how_to_mend_it() -> None:
    script = Path(__file__).with_name("wrong_input.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_arguments_are_looked_at_by_names_that_there_are() -> None:
    names = set()
    for one in vars(nnatomy.methods).values():
        for function in (one, *vars(one).values()) if inspect.isclass(one) else (one,):
            function = getattr(function, "__func__", function)
            if callable(function) and not inspect.ismodule(function):
                names |= {*inspect.signature(function).parameters} if inspect.isfunction(function) else set()
    assert set(CHECKS) <= names


# An answer in another spelling than the one that the run predicts.


@pytest.mark.parametrize("spelled", ["Paris", " Paris"])
def test_an_answer_whose_other_spelling_is_predicted_is_warned_of(model: StandardizedTransformer, spelled: str) -> None:
    logits = model(PROMPT).logits[:, -1].detach()
    given = "Paris" if spelled == " Paris" else " Paris"
    token, other = (model.tokenizer(text)["input_ids"][0] for text in (given, spelled))
    if spelled == "Paris":  # as behind a space
        logits[:, [token, other]] = logits[:, [other, token]]
    ours, theirs = (float(logits.softmax(-1)[0, one]) for one in (token, other))
    assert theirs > 0.9 > 1e-4 > ours
    text = rf"The answer {given!r} \(token {token}\) has probability {ours:.1e} and {spelled!r} \(token {other}\) {theirs:.1e}"
    for metric in (
        logit_difference(given, " Rome", model),
        logit_difference(3, given, model),
        probability(given, model),
    ):
        with pytest.warns(UserWarning, match=text) as caught:
            found = metric(logits)
        assert caught[0].filename == __file__
        assert torch.equal(metric(logits), found)  # said once
    with pytest.warns(UserWarning, match=text):
        log_probability([given, 3], model)(logits.expand(2, -1))
    for right in (spelled, other):
        logit_difference(right, " Rome", model)(logits)  # no warning


def test_the_likelier_of_two_improbable_spellings_is_not_meant(model: StandardizedTransformer) -> None:
    """Unless it begins as what is predicted there does."""
    logits = model(PROMPT).logits[:, -1].detach()
    metric = probability(" Tokyo", model)
    spaced, unspaced, predicted = (model.tokenizer(text)["input_ids"][0] for text in (" Tokyo", "Tokyo", "Paris"))
    logits[:, unspaced] = logits[:, spaced] + 3
    assert logits.softmax(-1)[0, unspaced] < 1e-6
    metric(logits)  # no warning: " Paris" is what is predicted
    logits[:, predicted] = logits.max() + 1
    with pytest.warns(UserWarning, match="If it is that one that is meant, give 'Tokyo'"):
        metric(logits)


def test_methods_that_take_answers_warn(model: StandardizedTransformer) -> None:
    with pytest.warns(
        UserWarning,
        match=r"The answer 'Paris' .* and ' Paris' .*If it is that one that is meant, give ' Paris'",
    ):
        direct_logit_attribution(model, PROMPT, answer="Paris")
    with pytest.warns(UserWarning, match="The answer 'Rome'"):
        direct_logit_attribution(model, PROMPT, answer=" Paris", wrong="Rome")
    with pytest.warns(UserWarning, match="The answer 'Paris'"):
        lens_statistics(model, ["Japan is in", PROMPT], targets=[" Asia", "Paris"])
    with pytest.warns(UserWarning, match="The answer 'Paris'"):
        activation_patching(
            model,
            clean=PROMPT,
            corrupted="The capital of Japan is",
            metric=logit_difference("Paris", " Tokyo", model),
            layers=0,
            progress=False,
        )


def test_where_numbers_are_not_known_nothing_is_said(model: StandardizedTransformer) -> None:
    logits = model(PROMPT).logits[:, -1].detach()
    metric = probability("Paris", model)
    torch.func.grad(lambda x: metric(x).sum())(logits)


# Clean and corrupted alike.


def test_two_prompts_that_are_the_same_are_no_pair(model: StandardizedTransformer) -> None:
    metric = logit_difference(" Paris", " Tokyo", model)
    ids = model.tokenizer(PROMPT)["input_ids"]
    for clean, corrupted, pair in (
        (PROMPT, PROMPT, 0),
        (PROMPT, ids, 0),
        (["Japan is in", PROMPT], ["Italy is in", PROMPT], 1),
    ):
        for ask in (
            lambda: activation_patching(model, clean=clean, corrupted=corrupted, metric=metric),  # noqa: B023
            lambda: attribution_patching(model, clean, corrupted, metric=metric),  # noqa: B023
        ):
            with pytest.raises(
                InputError,
                match=f"the corrupted prompt of pair {pair} are the same, so that there is nothing",
            ):
                ask()


def test_a_metric_that_is_the_same_of_both_has_no_shares(model: StandardizedTransformer) -> None:
    kwargs: dict[str, Any] = {
        "clean": PROMPT,
        "corrupted": "The capital of Japan is",
        "layers": [0],
        "progress": False,
    }
    found = activation_patching(model, metric=lambda logits: 0 * logits[:, 0] + 7, **kwargs)
    text = r"The metric is the same in the clean and the corrupted run \(7 and 7\), so that no effect is a share"
    with pytest.raises(InputError, match=text):
        found.normalized
    with pytest.raises(InputError, match=text):
        found.plot()
    found.plot(normalized=False)
    assert found.effect.eq(7).all()
    noise = causal_tracing(model, PROMPT, subject="France", noise=0.0, samples=2, layers=[0], progress=False)
    with pytest.raises(InputError, match="The metric is the same in the clean and the corrupted run"):
        noise.normalized
    two = torch.tensor([1.0, 2.0])
    pairs = PathPatching(("a",), ("logits",), torch.ones(2, 1), two, torch.tensor([0.5, 2.0 + 1e-7]))
    with pytest.raises(InputError, match=r"run of pairs 1 \(2 and 2\)"):
        pairs.normalized
    nothing = Patching("layers_output", torch.ones(1, 1), two[0] * torch.nan, two[1], (0,), None, (0,), (("a",),), True)
    with pytest.raises(InputError, match="is not finite: nothing is a share"):
        nothing.normalized


def test_a_vector_is_not_made_of_letters(model: StandardizedTransformer) -> None:
    text = r"pairs\[0\] is 'ab': give pairs of prompts, \[\(positive, negative\), \.\.\.\]\. Of prompts that are not in pairs"
    for pairs in (["ab", "cd"], "ab", (one for one in ("ab",))):
        with pytest.raises(InputError, match=text):
            SteeringVector.from_pairs(model, pairs)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=r"pairs\[0\] is \[\{'role'"):
        SteeringVector.from_pairs(model, [chat])
    found = SteeringVector.from_pairs(model, [[PROMPT, "The language of France is"]], layers=[2], progress=False)
    assert found.directions[2].norm() > 0
