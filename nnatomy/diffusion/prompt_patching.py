"""What of a picture comes from which step and layer: values of another prompt's generation put there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.diffusion.runs import Metric, accessor_of, check, chosen, latents_of
from nnatomy.diffusion.transformer import DiffusionTransformer
from nnatomy.errors import InputError, counted


@dataclass(frozen=True)
class PromptPatching:
    """How far a picture moves to another prompt's, by the step and layer at which a value is put in.

    Attributes:
        effect: 0 where nothing changes, 1 for what the metric says of the other prompt's picture.
        name: of what is put in.
        prompt, other: whose picture is changed, and whose values are put in.
        own, of_other: the metric of the two pictures; None for the default one.
    """

    effect: Float[Tensor, "step layer"]
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    name: str
    prompt: str
    other: str
    own: float | None = None
    of_other: float | None = None

    def plot(self, title: str | None = None) -> Any:
        """A heat map of step by layer, as a plotly figure."""
        from nnatomy.plots import heat_map

        return heat_map(
            self.effect,
            rows=[str(step) for step in self.steps],
            columns=[str(layer) for layer in self.layers],
            title=f"{self.name} of “{self.other}” in “{self.prompt}”" if title is None else title,
            row_title="step",
            column_title="layer",
            diverging=bool((self.effect < 0).any()),
            value_name="moved",
        )

    def __repr__(self) -> str:
        size = f"{counted(len(self.steps), 'step')} x {counted(len(self.layers), 'layer')}"
        return f"<{self.name} of {self.other!r} in {self.prompt!r}: {size}>"


@torch.no_grad()
def prompt_patching(
    model: DiffusionTransformer,
    prompt: Any,
    other: Any,
    *,
    name: str = "image_layers_output",
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> PromptPatching:
    """Draw `prompt`'s picture again and again, each time with one value of `other`'s generation in its place.

    Both begin with the same noise. The value is that of one step and one layer, of the half of guidance that has the prompt.

    Args:
        name: a standard name of layers: "image_layers_output", "heads_output", "cross_heads_output", ...
        layers, steps: all if None. It draws as many pictures as there are of both, and two more.
        metric: a number for a picture's latents. By default how far they lie on the way from `prompt`'s to `other`'s: the
            projection on their difference, in units of that.
        seed: of the noise.
        **kwargs: go to the pipeline: num_inference_steps, guidance_scale, ...

    Raises:
        InputError: for several prompts, layers or steps that there are not, a name that no layer has, or prompts whose pictures (or
            metrics) are the same.
    """
    check(model, "prompt_patching", prompt, kwargs)
    check(model, "prompt_patching", other, kwargs, "other")
    accessor = accessor_of(model, name)
    used = chosen("layers", layers, accessor.layers)
    values: dict[tuple[int, int], Tensor] = {}

    def keep(step: int) -> None:
        for layer in used:
            values[step, layer] = accessor[layer].clone()

    ours, theirs = latents_of(model, prompt, seed, kwargs), latents_of(model, other, seed, kwargs, keep)
    there = list(range(max(step for step, _ in values) + 1))
    times = chosen("steps", steps, there)
    way = (theirs - ours).flatten()

    def along(latents: Tensor) -> float:
        return float((latents - ours).flatten() @ way / (way @ way))

    measure = along if metric is None else metric
    own, of_other = float(measure(ours)), float(measure(theirs))
    if not bool(way.any()) or own == of_other:
        raise InputError(
            "prompt, other: their pictures are the same to the metric, so that there is no way between them."
        )
    found = torch.zeros(len(times), len(used))
    for i, when in enumerate(times):
        for j, layer in enumerate(used):

            def put(step: int, when: int = when, layer: int = layer) -> None:
                if step == when:
                    accessor[layer] = values[when, layer]

            found[i, j] = (float(measure(latents_of(model, prompt, seed, kwargs, put))) - own) / (of_other - own)
    told = (None, None) if metric is None else (own, of_other)
    return PromptPatching(found, tuple(times), tuple(used), name, str(prompt), str(other), *told)
