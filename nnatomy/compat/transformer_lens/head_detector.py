"""How much a head's attention is like a pattern: previous token, duplicate token, induction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.errors import InputError

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES = ("previous_token_head", "duplicate_token_head", "induction_head")
ErrorMeasure = Literal["abs", "mul"]


def get_previous_token_head_detection_pattern(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos pos"]:
    """1 at each token's predecessor."""
    return torch.ones(tokens.shape[-1] - 1).diag(-1)


def get_duplicate_token_head_detection_pattern(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos pos"]:
    """1 at each earlier place of the same token."""
    return (tokens[0][:, None] == tokens[0]).float().tril(-1).cpu()


def get_induction_head_detection_pattern(tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos pos"]:
    """1 at what came after each earlier place of the same token."""
    same = get_duplicate_token_head_detection_pattern(tokens)
    return torch.cat([torch.zeros_like(same[:, :1]), same[:, :-1]], 1)


_PATTERNS = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


def detect_head(
    model: Any,
    seq: str | list[str],
    detection_pattern: Tensor | HeadName,
    heads: Any = None,
    cache: Any = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
) -> Float[Tensor, "n_layers n_heads"]:
    """A score of each head: how much of its attention lies on the pattern.

    Args:
        seq: a text, or several, of which the scores are the mean.
        detection_pattern: by name, or (pos, pos), lower triangular.
        heads: which: pairs of layer and head, or by layer the heads; all by default. The others' score is -1.
        cache: of `seq`, one text, if it has been run.
        exclude_bos, exclude_current_token: leave out attention to the first token, or to the token itself.
        error_measure: "mul": the share of the attention that the pattern has; "abs": 1 less what attention and pattern differ by,
            summed over the keys of a query, in the mean over queries.
    """
    cfg = model.cfg
    if isinstance(seq, list):
        if cache is not None:
            raise InputError(
                f"cache= is of one text, and seq is a list of {len(seq)}: leave it out, or give each text with its own cache and "
                "take the mean."
            )
        options: dict[str, Any] = {"exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
        found = [
            detect_head(model, one, detection_pattern, heads, None, error_measure=error_measure, **options)
            for one in seq
        ]
        return torch.stack(found).mean(0)
    tokens = model.to_tokens(seq).cpu()
    length = tokens.shape[-1]
    assert 1 < length < (cfg.n_ctx or length + 1), (
        f"The sequence must be non-empty and must fit within the model's context window: {length} tokens."
    )
    if isinstance(detection_pattern, str):
        assert detection_pattern in _PATTERNS, (
            f"detection_pattern must be a Tensor or one of head names: {HEAD_NAMES}; got {detection_pattern}"
        )
        detection_pattern = _PATTERNS[detection_pattern](tokens)
    wanted = detection_pattern.to(cfg.device)
    assert wanted.shape == (length, length), (
        f"detection_pattern must be of ({length}, {length}); it is {tuple(wanted.shape)}"
    )
    assert wanted.equal(wanted.tril()), "detection_pattern is not lower triangular"
    if cache is None:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, remove_batch_dim=True, names_filter=lambda name: name.endswith("hook_pattern")
            )
    by_layer = _by_layer(heads, cfg.n_layers, cfg.n_heads)
    scores = -torch.ones(cfg.n_layers, cfg.n_heads)
    for layer, which in by_layer.items():
        for head in which:
            pattern = cache["pattern", layer].detach().float()
            pattern = (pattern[0] if pattern.ndim == 4 else pattern)[head].clone()
            scores[layer, head] = _score(pattern, wanted, exclude_bos, exclude_current_token, error_measure)
    return scores


def _by_layer(heads: Any, layers: int, count: int) -> dict[int, list[int]]:
    if heads is None:
        return {layer: [*range(count)] for layer in range(layers)}
    if isinstance(heads, dict):
        return heads
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


def _score(pattern: Tensor, wanted: Tensor, exclude_bos: bool, exclude_current: bool, measure: str) -> float:
    assert measure in ("mul", "abs"), f"error_measure must be 'mul' or 'abs'; it is {measure!r}"
    wanted = wanted.clone()
    for one in (pattern, wanted):
        if exclude_bos:
            one[:, 0] = 0
        if exclude_current:
            one.fill_diagonal_(0)
    if measure == "mul":
        return float((pattern * wanted).sum() / pattern.sum())
    return 1 - round(float((pattern - wanted).abs().mean()) * len(pattern), 3)
