"""Whether a position depends on later ones: whether a model is bidirectional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import example_inputs
from nnatomy.validation.passes import PROMPT_LENGTH

BATCH = 2


def looks_ahead(model: Any) -> bool:
    """Whether, on the plain model, the last layer's output changes at earlier positions with the first layer's last input."""
    get, put = model.layers_input.get, model.layers_input.put
    layers = model._anatomy.layers
    inputs = example_inputs(model.steps_of, BATCH, PROMPT_LENGTH, model.device)
    training = [module for module in model.hf_model.modules() if module.training]

    def change(_: Module, args: Any, kwargs: Any) -> Any:
        new = get((args, kwargs)).clone()
        new[:, -1] += torch.linspace(-1, 1, new.shape[-1]).to(new) * (1 + new.abs().max())
        return put((args, kwargs), new)

    def last_output() -> Tensor:
        seen: list[Tensor] = []
        keep = lambda _, __, output: seen.append(model.layers_output.get(output).clone())  # noqa: E731
        handle = layers[-1].register_forward_hook(keep)
        try:
            with torch.no_grad():
                model.steps_of(**inputs)
        finally:
            handle.remove()
        return seen[0][:, :-1].float()

    model.hf_model.eval()
    try:
        clean = last_output()
        handle = layers[0].register_forward_pre_hook(change, with_kwargs=True)
        try:
            changed = last_output()
        finally:
            handle.remove()
    finally:
        for module in training:
            module.training = True
    return bool((changed - clean).abs().max() > 1e-2 * clean.abs().max())
