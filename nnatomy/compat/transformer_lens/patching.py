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
from torch.nn.functional import pad

from nnatomy.compat.transformer_lens.hook_points import get_act_name
from nnatomy.errors import InputError, a_kind

Metric = Callable[[Tensor], Any]


def _patched(name: str, *axes: str) -> Callable[..., Tensor]:
    """A function over layers and those axes of the value."""
    order = ("batch", "head", "dest_pos", "src_pos") if name == "pattern" else ("batch", "pos", "head")
    places, positions = [order.index(one) for one in axes], 2 if name == "pattern" else 1

    def function(model: Any, corrupted_tokens: Any, clean_cache: Any, patching_metric: Metric) -> Tensor:
        short = f"rot_{name}" if any(one.endswith(f"hook_rot_{name}") for one in model.hook_dict) else name
        if not isinstance(corrupted_tokens, Tensor):
            raise InputError(f"corrupted_tokens is {a_kind(corrupted_tokens)}: give ids, model.to_tokens(text).")
        shape = clean_cache[get_act_name(short, 0)].shape
        if shape[positions] != corrupted_tokens.shape[-1]:
            raise InputError(
                f"corrupted_tokens are of {tuple(corrupted_tokens.shape)}, and {short} of layer 0 in clean_cache of "
                f"{tuple(shape)}: give prompts of as many tokens, and a cache with its batch."
            )
        found = torch.zeros([model.cfg.n_layers, *(shape[place] for place in places)], device=model.cfg.device)
        for index in product(*map(range, found.shape)):
            full = get_act_name(short, index[0])
            where: list[Any] = [slice(None)] * len(shape)
            for place, entry in zip(places, index[1:], strict=True):
                where[place] = entry

            def hook(value: Tensor, hook: Any, place: Any = tuple(where)) -> None:
                value[place] = clean_cache[hook.name][place].to(value)

            score = torch.as_tensor(patching_metric(model.run_with_hooks(corrupted_tokens, fwd_hooks=[(full, hook)])))
            if score.numel() != 1:
                raise InputError(f"patching_metric returned {tuple(score.shape)}: it makes one number of the logits.")
            found[index] = score.item()
        return found

    function.__doc__ = f"Of {name!r}: ({', '.join(('layer', *axes))})."
    return function


get_act_patch_resid_pre = _patched("resid_pre", "pos")
get_act_patch_resid_mid = _patched("resid_mid", "pos")
get_act_patch_resid_post = _patched("resid_post", "pos")
get_act_patch_attn_out = _patched("attn_out", "pos")
get_act_patch_mlp_out = _patched("mlp_out", "pos")
get_act_patch_attn_head_out_by_pos = _patched("z", "pos", "head")
get_act_patch_attn_head_q_by_pos = _patched("q", "pos", "head")
get_act_patch_attn_head_k_by_pos = _patched("k", "pos", "head")
get_act_patch_attn_head_v_by_pos = _patched("v", "pos", "head")
get_act_patch_attn_head_pattern_by_pos = _patched("pattern", "head", "dest_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _patched("pattern", "head", "dest_pos", "src_pos")
get_act_patch_attn_head_out_all_pos = _patched("z", "head")
get_act_patch_attn_head_q_all_pos = _patched("q", "head")
get_act_patch_attn_head_k_all_pos = _patched("k", "head")
get_act_patch_attn_head_v_all_pos = _patched("v", "head")
get_act_patch_attn_head_pattern_all_pos = _patched("pattern", "head")


def _every(*functions: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metric) -> Tensor:
        found = [one(model, corrupted_tokens, clean_cache, metric) for one in functions]
        last = max(one.shape[-1] for one in found)
        return torch.stack([pad(one, (0, last - one.shape[-1])) for one in found])

    function.__doc__ = "Several of the functions of this page, stacked. Of fewer key-value heads the rest is 0."
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

#: The same by position: (part, layer, pos, head).
get_act_patch_attn_head_by_pos_every = _every(
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_v_by_pos,
    lambda *given: get_act_patch_attn_head_pattern_by_pos(*given).mT,  # heads last, as the others
)
