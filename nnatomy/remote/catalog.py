"""The methods that a server runs whole, by their names, and what of their arguments is data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from nnatomy import methods

#: Their names.
WHOLE = frozenset(
    """
    activation_patching attribution_patching causal_tracing circuit_faithfulness collect_last_token_activations_session
    collect_token_activations_batched compute_next_token_probs direct_logit_attribution edge_attribution
    get_token_activations head_ablation head_scores integrated_gradients lens_statistics logit_lens
    next_token_probs_unsqueeze patch_object_attn_lens patchscope_generate patchscope_lens path_patching
    """.split()
)
#: Of these, those that run without gradients: where a tensor that is given to them needs one, it makes no difference.
WITHOUT_GRADIENTS = frozenset(
    """
    activation_patching causal_tracing compute_next_token_probs get_token_activations head_ablation head_scores
    lens_statistics logit_lens patch_object_attn_lens patchscope_generate patchscope_lens path_patching
    """.split()
)
#: Why others are not run there.
NOT_WHOLE = {
    "ablate_direction": "it is called in a block, and changes what passes there",
    "collect_activations": "it writes files, of whatever size",
    **dict.fromkeys(
        ("image_lens", "picture_patching"),
        "a server runs forward passes of tokens, and of no images: call it with a model that is loaded here",
    ),
    "run_prompts": "it takes a function of yours; the methods that it calls are run there",
}
#: The arguments of which each of one is looked at with each of another.
CROSSED = {"path_patching": ("sender", "receivers")}
#: The arguments that are the model.
MODELS = ("model", "nn_model")
#: What a prompt that is a dict may have.
PROMPT_KEYS = frozenset("input_ids attention_mask position_ids token_type_ids".split())
#: What may be said of a generation, each of that type. Sampling draws random numbers, which the client does.
GENERATION: dict[str, Any] = {
    "do_sample": bool,
    "num_beams": int,
    "use_cache": bool,
    "min_new_tokens": int,
    "eos_token_id": int,
    "pad_token_id": int,
    "repetition_penalty": float,
}


def method_of(name: str) -> Callable[..., Any]:
    """The method of that name, which is one of WHOLE."""
    found: Callable[..., Any] = getattr(methods, name)
    return found


@cache
def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Its parameters, without the model and what takes any further argument."""
    found = inspect.signature(method_of(name)).parameters
    return {key: one for key, one in found.items() if key not in MODELS and one.kind is not one.VAR_KEYWORD}


@cache
def model_name(name: str) -> str:
    """What it calls the model."""
    return next(one for one in inspect.signature(method_of(name)).parameters if one in MODELS)
