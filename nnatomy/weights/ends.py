"""The token embedding and the unembedding, as matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnatomy.validation.near import is_near
from nnatomy.weights.probes import passing
from nnatomy.weights.projection import Projection, RefusedError, Seen, is_transposed, weight_of

_Call = tuple[Any, Any]


def _calls(model: Any, modules: list[Any]) -> dict[Any, list[_Call]]:
    """What each was given and gave, in a pass on one prompt."""
    calls: dict[Any, list[_Call]] = {module: [] for module in modules}
    with passing(model, 1) as inputs:
        hooks = [
            one.register_forward_hook(lambda module, args, output: calls[module].append((args and args[0], output)))
            for one in modules
        ]
        try:
            model.steps_of(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def find_embedding(model: Any) -> Callable[[], Tensor]:
    """What gives the matrix of (vocab, hidden), with the scale that the module multiplies it by."""
    model._check_refused("token_embeddings")
    module, path = model._anatomy.embed_tokens, model.embed_tokens.path
    calls = _calls(model, [module])[module]
    if len(calls) != 1 or not isinstance(calls[0][0], Tensor) or not isinstance(calls[0][1], Tensor):
        raise RefusedError(f"{path} is called {len(calls)} times, or not with token ids alone")
    ids, gave = calls[0]
    table = weight_of(module, path)
    if gave.shape != (*ids.shape, table.shape[1]):
        raise RefusedError(f"{path} gives {tuple(gave.shape)} for its rows of {table.shape[1]}")
    own = table.detach()[ids]
    scale = float((own.double() * gave.double()).sum() / own.double().square().sum())
    scale = 1.0 if is_near(own, gave, 2) else scale
    if not is_near(own * scale, gave, 16):
        raise RefusedError(f"{path} gives something else than rows of its weight, times one number")
    # One number as the module has it, rather than as it is measured.
    held = [float(one) for one in (*vars(module).values(), *module.buffers()) if _is_number(one)]
    scale = next((one for one in held if is_near(own * one, gave, 16)), scale)
    return lambda: weight_of(module, path) if scale == 1 else weight_of(module, path) * scale


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def find_unembedding(model: Any) -> Projection:
    """The matrix from what the final norm gives to logits."""
    model._check_refused("lm_head")
    head, path, norm = model._anatomy.lm_head, model.lm_head.path, model._anatomy.ln_final
    last = model._anatomy.layers[-1]
    calls = _calls(model, [head, last] if norm is None else [head, norm])
    if any(len(one) != 1 for one in calls.values()):
        raise RefusedError(f"the last layer, the final norm or {path} is called several times, or not at all")
    (given, gave), before = calls[head][0], calls[last if norm is None else norm][0][1]
    before = model.layers_output.get(before)
    if given.ndim == before.ndim == 3:  # of some positions alone, it may be
        before = before[:, -given.shape[1] :]
    given, gave, before = (one.reshape(-1, one.shape[-1]) for one in (given, gave, before))
    # A norm without parameters may be no module.
    either = (before, *_normed(before)) if norm is None else (before,)
    if not any(given.shape == one.shape and _is_multiple(given, one) for one in either):
        raise RefusedError(
            f"{path} does not read what the final norm (or the last layer) gives, but what is made of it"
        )
    return Projection(head, path, None, "gives", is_transposed(head, path, Seen(given, gave)), norm=norm)


def _normed(stream: Tensor) -> tuple[Tensor, Tensor]:
    """By its size, without its mean and with it."""
    centered = stream - stream.mean(-1, keepdim=True)
    one, other = (each / each.square().mean(-1, keepdim=True).sqrt() for each in (centered, stream))
    return one, other


def _is_multiple(one: Tensor, other: Tensor) -> bool:
    factor = (one.double() * other.double()).sum() / other.double().square().sum().clamp(min=1e-30)
    return is_near(other * float(factor), one) and bool(torch.isfinite(factor))
