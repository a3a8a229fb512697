"""Activation patching under TransformerLens's names: each place of a corrupted run gets its value of a clean one, in turn.

Each function takes `(model, corrupted_tokens, clean_cache, patching_metric)` and gives what the metric makes of the logits: a
tensor of the axes that its name says. `nnatomy.methods.activation_patching` does the same in fewer forward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nnatomy.compat.transformer_lens.hook_points import get_act_name

Metric = Callable[[Tensor], Any]


def _patched(name: str, *, head: bool, position: int | None) -> Callable[..., Tensor]:
    """A function over layers, positions where `position` is their axis, and heads."""

    def function(model: Any, corrupted_tokens: Tensor, clean_cache: Any, patching_metric: Metric) -> Tensor:
        short = f"rot_{name}" if any(one.endswith(f"hook_rot_{name}") for one in model.hook_dict) else name
        heads = clean_cache[short, 0].shape[1 if short in ("pattern", "attn_scores") else 2] if head else 0
        axes = [model.cfg.n_layers]
        axes += [] if position is None else [corrupted_tokens.shape[-1]]
        axes += [heads] if head else []
        found = torch.zeros(axes, device=model.cfg.device)
        for index in product(*map(range, axes)):
            layer, *rest = index
            where: list[Any] = [slice(None)] * clean_cache[short, layer].ndim
            if position is not None:
                where[position] = rest[0]
            if head:
                where[1 if short in ("pattern", "attn_scores") else 2] = rest[-1]
            place = tuple(where)

            def hook(value: Tensor, hook: Any, place: Any = place) -> Tensor:
                value[place] = clean_cache[hook.name][place].to(value)
                return value

            logits = model.run_with_hooks(corrupted_tokens, fwd_hooks=[(get_act_name(short, layer), hook)])
            found[index] = torch.as_tensor(patching_metric(logits)).item()
        return found

    axes = ("layer", *(() if position is None else ("pos",)), *(("head",) if head else ()))
    function.__doc__ = f"Of {name!r}: ({', '.join(axes)})."
    return function


get_act_patch_resid_pre = _patched("resid_pre", head=False, position=1)
get_act_patch_resid_mid = _patched("resid_mid", head=False, position=1)
get_act_patch_resid_post = _patched("resid_post", head=False, position=1)
get_act_patch_attn_out = _patched("attn_out", head=False, position=1)
get_act_patch_mlp_out = _patched("mlp_out", head=False, position=1)
get_act_patch_attn_head_out_by_pos = _patched("z", head=True, position=1)
get_act_patch_attn_head_q_by_pos = _patched("q", head=True, position=1)
get_act_patch_attn_head_k_by_pos = _patched("k", head=True, position=1)
get_act_patch_attn_head_v_by_pos = _patched("v", head=True, position=1)
get_act_patch_attn_head_pattern_by_pos = _patched("pattern", head=True, position=2)
get_act_patch_attn_head_out_all_pos = _patched("z", head=True, position=None)
get_act_patch_attn_head_q_all_pos = _patched("q", head=True, position=None)
get_act_patch_attn_head_k_all_pos = _patched("k", head=True, position=None)
get_act_patch_attn_head_v_all_pos = _patched("v", head=True, position=None)
get_act_patch_attn_head_pattern_all_pos = _patched("pattern", head=True, position=None)


def _every(*functions: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metric) -> Tensor:
        return torch.stack([one(model, corrupted_tokens, clean_cache, metric) for one in functions])

    function.__doc__ = "Several of the functions of this page, stacked in the order of its name's parts."
    return function


#: Of the stream before each layer, what the attention and what the MLP adds.
get_act_patch_block_every = _every(get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
#: Of each head: what it gives, its query, key, value and pattern.
get_act_patch_attn_head_all_pos_every = _every(
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_pattern_all_pos,
)

#: The same by position.
get_act_patch_attn_head_by_pos_every = _every(
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_head_pattern_by_pos,
)
