"""Whether a position depends on later ones: whether a model is bidirectional."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import example_inputs, logits_of
from nnatomy.validation.near import TOLERANCE, distance
from nnatomy.validation.passes import PROMPT_LENGTH

BATCH = 2
#: How much another number at the last position moves earlier ones, at least, where they depend on it.
LEAST = 1e-2


def looks_ahead(model: Any) -> bool:
    """Whether the plain model gives something else at earlier positions where the last one is changed.

    That is between the first layer's input and the last layer's output; where these are no streams, between tokens and logits.
    """
    inputs = example_inputs(model.steps_of, BATCH, PROMPT_LENGTH, model.device)
    training = [module for module in model.hf_model.modules() if module.training]
    streams = model.layers_input.modules[0], model.layers_output.modules[-1]
    # Another token is a smaller change than the one made in a stream.
    run, least = (_by_tokens, TOLERANCE) if None in streams else (_by_layers, {})
    model.hf_model.eval()
    try:
        with torch.no_grad(), model._shards.gathered(model.steps_of):
            clean, changed = (run(model, inputs, change)[:, :-1] for change in (False, True))
    finally:
        for module in training:
            module.training = True
    return distance(changed, clean) > least.get(clean.dtype, LEAST)


def _by_layers(model: Any, inputs: dict[str, Any], change: bool) -> Tensor:
    seen: list[Tensor] = []
    keep = lambda _, __, output: seen.append(model.layers_output.get(output).clone())  # noqa: E731
    handle = model._anatomy.layers[-1].register_forward_hook(keep)
    try:
        with last_changed(model, slice(None)) if change else nullcontext():
            model.steps_of(**inputs)
    finally:
        handle.remove()
    (output,) = seen
    return output


@contextmanager
def last_changed(model: Any, rows: slice, positions: int | slice = -1, much: float = 1.0) -> Iterator[None]:
    """Give the first layer other numbers at the last position of these prompts, or at others.

    Args:
        much: how much is added, of the largest entry (and 1).
    """
    get, put = model.layers_input.get, model.layers_input.put

    def changed(_: Module, args: Any, kwargs: Any) -> Any:
        new = get((args, kwargs)).clone()
        ramp = torch.linspace(-much, much, new.shape[-1]).to(new)
        new[rows, positions] += ramp * (1 + new.abs().max())
        return put((args, kwargs), new)

    handle = model._anatomy.layers[0].register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _by_tokens(model: Any, inputs: dict[str, Any], change: bool) -> Tensor:
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs[name].clone()
    ids[:, -1] = (ids[:, -1] + change) % ids.max()
    result = model.steps_of(**{**inputs, name: ids})
    logits = logits_of(result)
    given: Tensor = result[0] if logits is None else logits
    return given
