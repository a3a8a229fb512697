"""Attribution patching: activation patching of everything at once, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.arguments import method
from nnatomy.methods.gradients import (
    AttributionMap,
    Metric,
    Pairs,
    by_node,
    difference,
    gradients,
    values,
)
from nnatomy.methods.points import accessor_of, layers_of, streams_of
from nnatomy.methods.progress import shown
from nnatomy.methods.result import name_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.annotations import PointName


@method
def attribution_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric,
    point: PointName = "layers_output",
    layers: int | Sequence[int] | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    progress: bool = False,
) -> AttributionMap:
    """What putting each clean activation into the corrupted run would do to a metric, to first order.

    (clean - corrupted) · d metric / d activation, the gradient at the corrupted run: one backward pass for all layers,
    positions and heads (Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"). To put corrupted
    activations into the clean run instead, swap the two: then the effects have the other sign.

    With `qk_fix` and `grad_drop` it is AtP* (Kramár, Lieberum, Shah, Nanda 2024, "AtP*: An efficient and scalable method
    for localizing LLM behaviour to components", section 3), which has fewer false negatives:

    Args:
        clean, corrupted: what `model.trace` takes, `Prompt`s too; each pair with the same number of tokens.
        metric: from the logits at the last token, (prompt, vocab), one number for each prompt.
        point: the accessor whose values are patched: "layers_output", "heads_output", "mlps_contribution", ... Of an
            encoder-decoder those of its decoder, or of its encoder ("encoder_layers_output"); positions are of what it reads.
        layers: which layers; all that have it by default.
        qk_fix: of queries and keys, the attention pattern with the clean one is computed by the model itself, and its
            change multiplied with the gradient at the pattern: a softmax that is saturated has no gradient, though
            another query would change it. One more forward pass for queries, one for each position for keys.
        grad_drop: the mean of the absolute effects over backward passes, in each of which no gradient goes through one of
            the layers, so that a direct effect and one by way of a layer do not cancel out. The result has no sign. (The
            sum is divided by the number of layers less one: what is in a layer has no effect where that one is dropped.
            For the stream itself, by the number of layers. Of an encoder's points the layers are the encoder's.)
        progress: show a progress bar over the passes.

    Raises:
        InputError: for prompts of different lengths, an unknown point, a metric of another shape.
        NotInThisModelError, LayerIndexError: for a layer that has no such thing.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import attribution_patching
        >>> model = StandardizedTransformer("demo:llama")
        >>> paris, rome = (model.tokenizer.encode(token)[0] for token in (" Paris", " Rome"))
        >>> found = attribution_patching(
        ...     model,
        ...     "The capital of France is",
        ...     "The capital of Italy is",
        ...     metric=lambda logits: logits[:, paris] - logits[:, rome],
        ... )
        >>> found.effect.shape, found.tokens[int(found.effect[0, 0].argmax())]
        (torch.Size([1, 8, 5]), ' Italy')
    """
    accessor = accessor_of(model, point)
    if qk_fix and point not in ("queries", "keys"):
        raise InputError(f"qk_fix is for point='queries' and 'keys', not for {point!r}.")
    pairs = Pairs.of(model, clean, corrupted, point)
    chosen = tuple(sorted({*layers_of(accessor, layers)}))
    new, clean_value = values(model, pairs.clean, point, chosen, metric)
    old, corrupted_value = values(model, pairs.corrupted, point, chosen, metric)
    where = "attention_probabilities" if qk_fix else point
    before = values(model, pairs.corrupted, where, chosen, metric)[0] if qk_fix else old
    drops = list(range(len(accessor))) if grad_drop else [None]
    slopes = [
        gradients(model, pairs.corrupted, where, chosen, metric, drop)
        for drop in shown(drops, "backward passes", progress)
    ]

    def effect(after: list[Tensor]) -> Float[Tensor, "pass prompt layer *axes"]:
        changes = [difference(one, other) for one, other in zip(after, before, strict=True)]
        return torch.stack([by_node(where, changes, one, pairs.mask) for one in slopes])

    if not qk_fix:
        effects = effect(new)
    elif point == "queries":  # each changes its own row of the pattern: all at once
        effects = effect(_patterns(model, pairs, point, chosen, new, before)).sum(-1).transpose(-1, -2)
    else:
        each = []
        for t in shown(range(old[0].shape[2]), "keys", progress):
            patched = [y.clone() for y in old]
            for x, y in zip(new, patched, strict=True):
                y[:, :, t] = x[:, :, t]
            each.append(effect(_patterns(model, pairs, point, chosen, patched, before)).sum((-1, -2)))
        shared = torch.stack(each, 3)
        effects = shared.unflatten(-1, (old[0].shape[1], -1)).sum(-1)  # query heads may share a key
    if grad_drop:
        of_stream = accessor in streams_of(model, accessor)
        others = len(accessor) if of_stream else max(1, len(accessor) - 1)
        effects = effects.abs().sum(0, keepdim=True) / others
    return AttributionMap(
        point,
        chosen,
        effects[0],
        clean_value.cpu(),
        corrupted_value.cpu(),
        pairs.tokens,
        pairs.prompts,
        name_of(metric),
    )


@torch.no_grad()
def _patterns(
    model: StandardizedTransformer,
    pairs: Pairs,
    point: str,
    layers: tuple[int, ...],
    new: list[Tensor],
    before: list[Tensor],
) -> list[Tensor]:
    """The patterns with other queries or keys, in each layer alone: behind it all is as before."""
    accessor = accessor_of(model, point)
    found = []
    with model.trace(**pairs.corrupted, use_cache=False):
        for i, x, own in zip(layers, new, before, strict=True):
            accessor[i] = x
            found.append(model.attention_probabilities[i])
            model.attention_probabilities[i] = own
    return found
