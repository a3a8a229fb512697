"""Integrated gradients: the effect of each activation, added up on the way from the corrupted to the clean run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnatomy.methods.arguments import method
from nnatomy.methods.gradients import (
    AttributionMap,
    Metric,
    Pairs,
    by_node,
    difference,
    measured,
    values,
)
from nnatomy.methods.points import accessor_of, layers_of
from nnatomy.methods.progress import shown
from nnatomy.methods.result import name_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.annotations import PointName


@method
def integrated_gradients(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric,
    point: PointName = "layers_output",
    layers: int | Sequence[int] | None = None,
    steps: int = 16,
    progress: bool = False,
) -> AttributionMap:
    """(clean - corrupted) · the mean gradient of the metric along the straight line between the two, layer by layer.

    Integrated gradients (Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks", equation 1), with the
    corrupted run's activations as the baseline, and the integral as a sum over the middles of `steps` equal pieces. All
    positions of a layer move together, in the corrupted run; so the effects of a layer add up to what putting all of
    its clean activations into the corrupted run does to the metric (completeness). For the stream that is all there is
    between the two runs. It costs `steps` passes for each layer.

    Args:
        clean, corrupted, metric, point, layers: as in `attribution_patching`.
        steps: how many gradients are averaged.
        progress: show a progress bar over the layers.

    Raises:
        InputError, NotInThisModelError, LayerIndexError: as `attribution_patching`.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import integrated_gradients
        >>> model = StandardizedTransformer("demo:llama")
        >>> paris, rome = (model.tokenizer.encode(token)[0] for token in (" Paris", " Rome"))
        >>> found = integrated_gradients(
        ...     model,
        ...     "The capital of France is",
        ...     "The capital of Italy is",
        ...     metric=lambda logits: logits[:, paris] - logits[:, rome],
        ...     layers=2,
        ... )
        >>> bool(abs(found.normalized.sum() - 1) < 0.02)
        True
    """
    accessor = accessor_of(model, point)
    pairs = Pairs.of(model, clean, corrupted, point)
    chosen = tuple(sorted({*layers_of(accessor, layers)}))
    new, clean_value = values(model, pairs.clean, point, chosen, metric)
    old, corrupted_value = values(model, pairs.corrupted, point, chosen, metric)
    changes, slopes = [], []
    for i, one, other in shown(zip(chosen, new, old, strict=True), "layers", progress):
        change = difference(one, other)
        total = torch.zeros_like(change)
        for k in range(steps):
            at = (other + (k + 0.5) / steps * change).requires_grad_()
            with torch.enable_grad(), model.trace(**pairs.corrupted, use_cache=False):
                accessor[i] = at
                value = measured(metric, model.logits[:, -1])
            (gradient,) = torch.autograd.grad(value, at, torch.ones_like(value))
            total += gradient
        changes.append(change)
        slopes.append(total / steps)
    effects = by_node(point, changes, slopes, pairs.mask)
    return AttributionMap(
        point, chosen, effects, clean_value.cpu(), corrupted_value.cpu(), pairs.tokens, pairs.prompts, name_of(metric)
    )
