"""Prompts have places, all else is given by its name: in all methods alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import nnatomy.methods
from nnatomy import StandardizedTransformer

#: What a method is about: the model, and what is run through it.
MODEL = {"model", "nn_model"}
PROMPTS = {"prompt", "prompts", "clean", "corrupted", "source_prompts", "target_prompts", "texts", "pairs", "images"}
PROMPTS |= {"positive", "negative", "target_patch_prompt", "target_patch_prompts"}

#: What has a place though it is no prompt, and why.
EXCEPTIONS = {
    ("ablate_direction", "direction"): "it has no prompts: a direction is what it is about",
    ("SteeringVector.apply", "factor"): "it has no prompts: the vector times this is what is added",
    ("Prompt.run", "get_probs"): "the function that is called is all that is given, as nnterp has it",
}


def methods() -> dict[str, Callable[..., Any]]:
    """All public functions that take a model before anything else, those of classes too."""
    found: dict[str, Callable[..., Any]] = {}
    for name in nnatomy.methods.__all__:
        one = getattr(nnatomy.methods, name)
        each = {name: one}
        if inspect.isclass(one):
            each = {f"{name}.{key}": getattr(value, "__func__", value) for key, value in vars(one).items()}
        for key, value in each.items():
            if not inspect.isfunction(value) or key.rpartition(".")[2].startswith("_"):
                continue
            names = [one for one in inspect.signature(value).parameters if one not in ("self", "cls")]
            if names and names[0] in MODEL:
                found[key] = value
    return found


METHODS = methods()


def test_all_of_them_are_looked_at() -> None:
    assert {"activation_patching", "logit_lens", "run_prompts", "SteeringVector.apply", "TunedLens.train"} <= set(
        METHODS
    )
    functions = [one for one in nnatomy.methods.__all__ if not inspect.isclass(getattr(nnatomy.methods, one))]
    others = {"get_first_tokens", "it_repeat_prompt", "repeat_prompt"}  # they make prompts, and take none
    others |= {"kl_divergence", "log_probability", "logit_difference", "probability"}  # metrics, of answers
    assert set(functions) - set(METHODS) == others


@pytest.mark.parametrize("name", METHODS)
def test_only_the_model_and_prompts_have_places(name: str) -> None:
    parameters = inspect.signature(METHODS[name]).parameters.values()
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    placed = [one.name for one in parameters if one.kind in kinds and one.name not in ("self", "cls")]
    excused = [key for at, key in EXCEPTIONS if at == name]
    assert set(placed[1:]) - PROMPTS == set(excused)


def test_what_is_given_a_place_is_told_its_name() -> None:
    model = StandardizedTransformer("demo:gpt2", validate=False)
    text = r"attribution_patching\(model, clean, corrupted\): the rest is given by keyword: "
    text += r"attribution_patching\(model, clean, corrupted, metric=\.\.\.\)\."
    with pytest.raises(TypeError, match=text):
        nnatomy.methods.attribution_patching(model, "a", "b", lambda logits: logits[:, 0])  # type: ignore[misc]
    text = r"circuit_faithfulness\(.*corrupted, metric=\.\.\., attribution=\.\.\., sizes=\.\.\.\)"
    with pytest.raises(TypeError, match=text):
        nnatomy.methods.circuit_faithfulness(model, "a", "b", 1, 2, 3)  # type: ignore[misc]
