"""What a picture is without each of the denoiser's heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nnatomy.core.points import Collector, Slot
from nnatomy.diffusion.accessors import At
from nnatomy.diffusion.runs import Metric, accessor_of, check, chosen, latents_of
from nnatomy.diffusion.transformer import DiffusionTransformer
from nnatomy.errors import InputError
from nnatomy.methods.heads import HeadMap


@torch.no_grad()
def head_ablation(
    model: DiffusionTransformer,
    prompt: Any,
    *,
    name: str = "heads_output",
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> HeadMap:
    """Draw the picture once for each head, with zeros in the place of what that head gives, in both halves of guidance.

    Args:
        name: "heads_output", or "cross_heads_output" for the heads that attend to the text.
        layers: all that have it if None.
        steps: those in which the head is taken out; all if None.
        metric: a number for a picture's latents, whose change is told. By default how far the latents move, in units of their norm.
        seed: of the noise.
        **kwargs: go to the pipeline: num_inference_steps, guidance_scale, ...

    Raises:
        InputError: for several prompts, another name, or layers or steps that there are not.
    """
    check(model, "head_ablation", prompt, kwargs)
    if name not in ("heads_output", "cross_heads_output"):
        raise InputError(f"name={name!r}: it is 'heads_output' or 'cross_heads_output'.")
    accessor = accessor_of(model, name)
    used = chosen("layers", layers, accessor.layers)
    counts: dict[int, int] = {}
    number = 0

    def count(step: int) -> None:
        nonlocal number
        number = step + 1
        for layer in used if not counts else ():
            counts[layer] = accessor[layer].shape[2]

    whole = latents_of(model, prompt, seed, kwargs, count)
    times = chosen("steps", steps, range(number))
    found = torch.full((len(used), max(counts.values())), float("nan"))
    for i, layer in enumerate(used):
        place = accessor.at(layer)
        for head in range(counts[layer]):
            without = latents_of(model, prompt, seed, kwargs, without=_Without(place, head, times))
            found[i, head] = _moved(without, whole) if metric is None else float(metric(without)) - float(metric(whole))
    return HeadMap(found, tuple(used), "change of the picture without the head")


class _Without(Collector):
    """Zeros in the place of what a head gives, in every call of some steps."""

    def __init__(self, place: At, head: int, steps: list[int]) -> None:
        self.modules = {place.module}
        self.kinds = {place.kind: place.tap}
        self._head = head
        self._steps = steps

    def take(self, slot: Slot) -> None:
        if slot.step in self._steps:
            heads = slot.value.clone()
            heads[:, :, self._head] = 0
            slot.value = heads


def _moved(latents: Tensor, whole: Tensor) -> float:
    return float((latents - whole).norm() / whole.norm())
