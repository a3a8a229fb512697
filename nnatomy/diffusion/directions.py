"""Steering a picture: a direction in the streams of some layers, found from prompts and added in the steps of a generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.diffusion.runs import accessor_of, check, chosen, generator
from nnatomy.diffusion.transformer import DiffusionTransformer
from nnatomy.errors import InputError, counted
from nnatomy.whole_number import is_truth


@dataclass(frozen=True)
class Direction:
    """A direction for each of some layers, to be added at every position of a stream.

    Attributes:
        directions: by layer, (hidden).
        name: the standard name where it comes from and is added.
    """

    directions: dict[int, Float[Tensor, " hidden"]]
    name: str

    @staticmethod
    @torch.no_grad()
    def from_prompts(
        model: DiffusionTransformer,
        positive: Sequence[Any],
        negative: Sequence[Any],
        *,
        layers: Iterable[int] | None = None,
        name: str = "image_layers_output",
        seed: int = 0,
        **kwargs: Any,
    ) -> Direction:
        """The difference of the means over two lists of prompts, all positions and all steps, from the same noise.

        Args:
            layers: all that have the name if None.
            name: a standard name of layers, of (batch, token, hidden).
            **kwargs: go to the pipeline.

        Raises:
            InputError: for lists without a prompt, a name or layers that there are not, or examples that do not differ.
        """
        accessor = accessor_of(model, name)
        if accessor.row.axes[1:] != ("token", "hidden"):
            raise InputError(
                f"name={name!r} is of {', '.join(accessor.row.axes)}: steer a stream, such as image_layers_output."
            )
        used = chosen("layers", layers, accessor.layers)
        means = []
        for said, prompts in (("positive", positive), ("negative", negative)):
            if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
                raise InputError(f"{said}={prompts!r:.40}: give a list of prompts, one at least.")
            sums = {layer: torch.zeros(()) for layer in used}
            count = 0
            for prompt in prompts:
                given = prompt if isinstance(prompt, str) else [prompt]
                check(model, "Direction.from_prompts", given, kwargs, said)
                with model.generate(given, generator=generator(seed), **kwargs) as tracer:
                    for _ in tracer.iter[:]:
                        count += 1
                        for layer in used:
                            sums[layer] = sums[layer] + accessor[layer][0].float().mean(0).cpu()
            means.append({layer: one / count for layer, one in sums.items()})
        directions = {layer: means[0][layer] - means[1][layer] for layer in used}
        for layer, one in directions.items():
            if not bool(one.any()):
                raise InputError(f"{name}[{layer}]: the positive and the negative prompts do not differ there.")
        return Direction(directions, name)

    def apply(self, model: DiffusionTransformer, factor: float = 1.0) -> None:
        """Add `factor` times the direction at every position, in the step that the block is in, to the half that has the prompt.

        In every step: `model.edit(lambda: direction.apply(model, 2.0))`.

        Raises:
            InputError: for a factor that is no number, or a direction of another width than the model's.
        """
        given: Any = factor
        try:
            number = math.nan if is_truth(given) or isinstance(given, str) else float(given)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"factor={factor!r}: it is a finite number.")
        accessor = accessor_of(model, self.name)
        for layer, direction in sorted(self.directions.items()):
            stream = accessor[layer]
            if stream.shape[-1:] != direction.shape:
                raise InputError(
                    f"{self.name}[{layer}] is {stream.shape[-1]} wide, and the direction {len(direction)}: it is of another model."
                )
            accessor[layer] = stream + number * direction.to(stream)

    def __repr__(self) -> str:
        return f"<a direction at {self.name} of {counted(len(self.directions), 'layer')}>"
