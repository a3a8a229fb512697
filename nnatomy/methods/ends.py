"""The last position, at which a forward pass can end before the head: logits of all positions are not needed for its own."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from nnatomy.standardized import StandardizedTransformer


def by_stream(model: StandardizedTransformer) -> bool:
    """Whether the last layer's output gives the logits, by `project_on_vocab`. (An edit may be behind that layer.)"""
    return not (model.edits or model.layers_output.modules[-1] is None or model._head.refused)


def ends(model: StandardizedTransformer) -> Float[Tensor, "batch end"]:
    """In a trace: at the last position, what the logits are made of, or they themselves."""
    end = model.layers_output[-1] if by_stream(model) else model.logits
    return end[:, -1].to(model.device)  # methods pad on the left


def end_logits(model: StandardizedTransformer, end: Float[Tensor, "*rows end"]) -> Float[Tensor, "*rows vocab"]:
    """The logits at the last position, of what `ends` gave."""
    return model._head(end) if by_stream(model) else end
