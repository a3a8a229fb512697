"""The config fields that change what a model computes, and which of them somebody has looked at; and those that tell a resampler."""

from __future__ import annotations

import re
from typing import Any

#: What such a field has in its name.
_NAMED = re.compile("multiplier|scale|scaling|cap|clip|alpha|beta|limit|temperature|window")

#: Those of all causal language and image-text models of Transformers 5.17 to 5.24, and of its generation; then some of T5.
KNOWN = frozenset(
    """
    altup_coef_clip altup_correct_scale attention_in_multiplier attention_multiplier
    attention_out_multiplier attention_value_scale attention_window_size attn_logit_softcapping
    attn_scale attn_temperature_tuning block_ffn_dim_multiplier clip_qkv embedding_multiplier
    embedding_scale final_logit_softcapping final_w_init_variance_scale floor_scale
    full_attn_alpha_factor full_attn_beta_factor gate_soft_cap guidance_scale keep_window_size
    key_multiplier linear_attn_alpha_factor linear_attn_beta_factor lm_head_multiplier
    local_attention_window_len log_scaling_alpha log_scaling_n_floor logit_scale
    logits_mup_width_multiplier logits_scaling logits_soft_cap max_window_layers mlp_alpha_factor
    mlp_beta_factor mlp_gate_softcap mlp_multipliers mlp_up_softcap moe_routed_scaling_factor
    moe_router_logit_softcapping mtp_loss_scaling_factor ngpt_alpha_init output_logit_soft_cap output_multiplier penalty_alpha
    prefix_dense_sliding_window_pattern qk_l2_clip_threshold qk_scale_factor rel_l2_clip_threshold rescale_embeddings
    rescale_every rescale_prenorm_residual residual_gate_temperature residual_multiplier rope_scaling
    rope_scaling_layers route_scale
    routed_scaling_factor router_scaling_factor scale_attention_softmax_in_fp32
    scale_attn_by_inverse_layer_idx scale_attn_weights scale_depth scale_emb scale_embedding
    sliding_window sliding_window_pattern sliding_window_size ssm_in_multiplier ssm_multipliers
    ssm_out_multiplier swiglu_alpha swiglu_limit temperature time_step_limit time_step_scale
    use_sliding_window w_init_variance_scale window_size

    alpha_initializer alpha_type logit_scale_init_value scale_decoder_outputs
    """.split()
)


def changing_fields(config: Any) -> dict[str, Any]:
    """The fields of a Hugging Face config, and of that of its text model, whose names say that they change the computation."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    fields = {**vars(config), **vars(text)}
    return {name: value for name, value in fields.items() if _NAMED.search(name) and not name.startswith("_")}


def unknown_fields(config: Any) -> dict[str, Any]:
    """Those of them that nobody has looked at, and that are not neutral.

    Example:
        >>> from transformers import LlamaConfig
        >>> unknown_fields(LlamaConfig(attn_multiplier=0.5, mlp_multiplier=1.0, logit_scale=2.0))
        {'attn_multiplier': 0.5}
    """
    fields = changing_fields(config)
    return {name: value for name, value in fields.items() if name not in KNOWN and not _is_neutral(value)}


def _is_neutral(value: Any) -> bool:
    """Whether a multiplier, a cap or a switch of this value does nothing."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_neutral, value))
    return not value or (value == 1 and value is not True)


def is_resampled(config: Any) -> bool:
    """Whether a model's tokens of an image are a resampler's learned queries, each of which may read all of it."""
    return any(getattr(config, name, None) for name in ("num_query_tokens", "projector_patch_to_query_dict"))
