"""An attention pattern: rows that are distributions, over the keys that the config lets each query see."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from nnatomy.arch_configs import text_config, visible_keys
from nnatomy.validation.near import slack_of_sums
from nnatomy.validation.passes import Passes


def check_pattern(
    passes: Passes,
    layer: int,
    attention: Module,
    pattern: Float[Tensor, "batch head query key"],
    scores: Float[Tensor, "batch head query key"] | None = None,
) -> None:
    """Note what does not hold of a layer's pattern.

    Args:
        scores: what it comes of: an entry may be 0, though nothing masks it, where the softmax is saturated.
    """
    expect = partial(_expect, passes, layer)
    rows = pattern.float().sum(-1)
    slack = slack_of_sums(pattern.dtype)
    expect(bool((pattern >= 0).all()), f"has entries below 0, down to {float(pattern.min()):.3g}")
    expect(bool((rows <= 1 + slack).all()), f"has rows that sum to more than 1, up to {float(rows.max()):.5g}")
    if not any("sink" in parameter for parameter, _ in attention.named_parameters()):
        least = f"has rows that sum to less than 1, down to {float(rows.min()):.5g}, and no attention sink"
        expect(bool((rows >= 1 - slack).all()), least)
    past = pattern.shape[-1] - pattern.shape[-2]  # keys of a wrapper's, that come before all queries
    above = float(pattern.triu(1 + past).abs().max())
    if above and passes.may_look_ahead:
        passes.ahead[layer] = above
        return
    _expect_causal(passes, layer, above)
    model = passes.model
    visible = visible_keys(
        text_config(model.steps_of), layer, model.num_layers, pattern.shape[-1], passes.masks_windows
    )
    if visible is not None:
        visible = visible[past:]
        seen = (pattern != 0).any(0).any(0).cpu()
        beyond = float(pattern.cpu()[:, :, ~visible].abs().max())
        expect(not (seen & ~visible).any(), f"attends beyond its window, with up to {beyond:.3g}")
        farthest = int(visible[-1].long().argmax())
        there = bool(seen[-1, farthest]) or (scores is not None and _unmasked(scores, farthest))
        expect(there, "attends to less than its window")


def _unmasked(scores: Tensor, key: int) -> bool:
    """Whether the last query's score for a key is none of those that masks give, as the first query has for the keys after it."""
    masked = float(scores[:, :, 0, 1 + scores.shape[-1] - scores.shape[-2] :].max())
    return bool((scores[:, :, -1, key] > masked / 2).any()) if masked < 0 else False


def check_ahead(passes: Passes) -> None:
    """Note where a layer's pattern attends to later positions, and the model turns out to be causal."""
    if passes.ahead and passes.model.causal:
        for layer, above in passes.ahead.items():
            _expect_causal(passes, layer, above)


def _expect_causal(passes: Passes, layer: int, above: float) -> None:
    _expect(passes, layer, above == 0, f"attends to later positions, with up to {above:.3g}")


def _expect(passes: Passes, layer: int, holds: bool, why: str) -> None:
    passes.expect(holds, "attention_probabilities", layer, why)
