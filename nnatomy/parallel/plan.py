"""Which tensor parallel plan splits a model: Transformers' own, but for an attention whose heads do not go evenly into the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: The projections that make one slice of heads on each rank, and what they are when every rank has all heads.
_WHOLE = {
    "colwise": "colwise_gather_output",
    "rowwise": "rowwise_split_input",
    "replicated_with_grad_allreduce": "replicate",
}


def tp_plan(config: Any, ranks: int) -> dict[str, str] | None:
    """What to change in Transformers' own plan so that a model of this config runs on so many ranks.

    Transformers splits heads by contiguous slices of the projections' outputs. Where the number of query heads or of key and
    value heads cannot be divided by that of ranks (fewer key and value heads than ranks, say), a slice ends within a head, and
    the forward fails. There the attention's weights are still split, but each rank computes all heads, as Transformers' plans
    for Phi-3 and OLMo 2 have it.

    Args:
        config: of the model, as `AutoConfig.from_pretrained` gives it.
        ranks: over how many processes it is split.

    Returns:
        The rules to give as `DistributedConfig(tp_plan=...)`; None if Transformers' own plan ("auto") will do.

    Example:
        >>> from transformers import LlamaConfig
        >>> from nnatomy.parallel import tp_plan
        >>> tp_plan(LlamaConfig(num_attention_heads=8, num_key_value_heads=4), 2)
        >>> rules = tp_plan(LlamaConfig(num_attention_heads=8, num_key_value_heads=1), 2)
        >>> rules["model.layers.*.self_attn.k_proj"]
        'colwise_gather_output'
    """
    text = config.get_text_config()
    plan: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    if not any(heads % ranks for heads in head_counts(text)):
        return None
    # The plan of a base model is of its own modules, which the model with a head has under "model.".
    return {f"model.{name}": _WHOLE.get(style, style) for name, style in plan.items() if is_of_attention(name)}


def head_counts(config: Any) -> Iterator[int]:
    """The numbers of heads that a config speaks of, of queries and of keys and values."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        value = getattr(config, name, None)
        yield from (one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, int))


def is_of_attention(name: str) -> bool:
    """Whether a rule of a plan is for a module of an attention."""
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])
