"""Whole generations for the methods: always with the same noise, so that pictures can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nnatomy.core.points import Collector
from nnatomy.diffusion.accessors import Accessor
from nnatomy.diffusion.names import OF_LAYERS
from nnatomy.diffusion.stage import latents_of as latents_in
from nnatomy.diffusion.transformer import DiffusionTransformer
from nnatomy.errors import InputError, a_kind
from nnatomy.whole_number import whole_number

#: What a method measures of a picture's latents.
Metric = Callable[[Tensor], float]


def check(model: Any, method: str, prompt: Any, kwargs: dict[str, Any], least: str = "prompt") -> None:
    """Raise InputError for what no method can run."""
    if not isinstance(model, DiffusionTransformer):
        raise InputError(f"{method} takes a DiffusionTransformer; got {a_kind(model)}.")
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and len(prompt) == 1)
    if not is_one:
        raise InputError(
            f"{least}={prompt!r:.40}: {method} draws one picture: give one prompt, a text (or a list of one class)."
        )
    for name in ("generator", "output_type", "num_images_per_prompt", "return_dict"):
        if name in kwargs:
            raise InputError(
                f"{name}: {method} draws one picture, several times from the same noise: give seed=0 for another noise."
            )


def accessor_of(model: DiffusionTransformer, name: str) -> Accessor:
    """The accessor of a standard name, of the half with the prompt."""
    if name not in OF_LAYERS:
        raise InputError(f"name={name!r}: it is a name of layers: {', '.join(OF_LAYERS)}.")
    found = getattr(model.conditional, name)
    if not found.layers:
        raise InputError(f"name={name!r}: no layer of this pipeline has it: {found.places[0]}.")
    return found


def chosen(name: str, wanted: Iterable[int] | None, there: Iterable[int]) -> list[int]:
    """Numbers of layers or steps, in order, of those that there are."""
    there = list(there)
    if wanted is None:
        return there
    try:
        numbers = sorted({whole_number(one) for one in wanted})
    except TypeError:
        raise InputError(f"{name}={wanted!r:.40}: give their numbers, such as {there[:2]}.") from None
    if not numbers:
        raise InputError(f"{name}={wanted!r:.40}: give at least one, such as {there[:2]}.")
    if missing := [one for one in numbers if one not in there]:
        raise InputError(f"{name}: there is no {missing[0]}; there are {there[0]} to {there[-1]}: {there}.")
    return numbers


def latents_of(
    model: DiffusionTransformer,
    prompt: Any,
    seed: int,
    kwargs: dict[str, Any],
    edit: Callable[[int], Any] | None = None,
    without: Collector | None = None,
) -> Tensor:
    """The last latents of a generation (what the scheduler gives in the last step), with an edit in each step.

    Args:
        without: puts other values in their place before any block sees them.
    """
    with model.generate(prompt, generator=generator(seed), **kwargs) as tracer:
        result = None
        if without is not None:
            tracer.block.run.replace(without)
        for step in tracer.iter[:]:
            if edit is not None:
                edit(step)
            result = model.scheduler.output
        assert result is not None
    return latents_in(result).detach().float().cpu()


def generator(seed: int) -> torch.Generator:
    """One that draws the same noise in each run."""
    try:
        return torch.Generator().manual_seed(whole_number(seed))
    except TypeError:
        raise InputError(f"seed={seed!r}: it is a whole number.") from None
