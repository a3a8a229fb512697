"""Tiny random models of every architecture in the first support list, set so that being wrong shows.

Weights are large enough that every part matters; multipliers are not 1, caps are low, windows are
shorter than the prompts, and no two of the sizes that could be mixed up are alike.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 67
_NEOX_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_LIKE = {**_NEOX_LIKE, "num_key_value_heads": 2}
_GPT_LIKE = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

#: model type -> the arguments of its config.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT_LIKE,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _NEOX_LIKE,
    "gptj": {**_GPT_LIKE, "rotary_dim": 4},
    "gpt_bigcode": _GPT_LIKE,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mpt": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 64,
        "expansion_ratio": 2,
    },
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 4},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "sliding_window": 4},
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": {**_LLAMA_LIKE, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "qwen3_moe": {**_LLAMA_LIKE, **_MOE, "num_experts": 4, "head_dim": 16},
    "gemma": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {
        "attn_implementation": "eager",  # what newer releases take; SDPA leaves out the cap on the scores
        **_LLAMA_LIKE,
        "head_dim": 16,
        "sliding_window": 4,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 4},
    "phi": _LLAMA_LIKE,
    "phi3": {**_LLAMA_LIKE, "sliding_window": 4},
    "olmo2": _LLAMA_LIKE,
    "cohere": {**_LLAMA_LIKE, "logit_scale": 0.25},
    "granite": {
        **_LLAMA_LIKE,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
    },
    "stablelm": _LLAMA_LIKE,
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": 4},
    "deepseek_v3": {
        **_NEOX_LIKE,
        **_MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 4,
        "v_head_dim": 10,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        **_LLAMA_LIKE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4": {**_LLAMA_LIKE, "head_dim": 16},
}
TYPES = tuple(CONFIGS)

#: Where things are, written down by hand from each model's own code: (layers, attention, MLP).
_LLAMA_PLACES = ("model.layers", "self_attn", "mlp")
PLACES: dict[str, tuple[str, str, str | None]] = {
    **dict.fromkeys(TYPES, _LLAMA_PLACES),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "gpt_bigcode"), ("transformer.h", "attn", "mlp")),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", None),
    "bloom": ("transformer.h", "self_attention", "mlp"),
    "falcon": ("transformer.h", "self_attention", "mlp"),
    "mpt": ("transformer.blocks", "attn", "ffn"),
}
#: Types whose logits are more than lm_head(ln_final(h)).
LONG_HEAD = ("opt", "gemma2", "cohere", "granite")


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A new random model of that type, in eval mode; `changes` go to its config."""
    config = CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})
    torch.manual_seed(TYPES.index(model_type))
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Weights that matter: matrices by their fan-in, biases, norms and sinks away from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * noise)


@functools.cache
def shared(model_type: str) -> PreTrainedModel:
    """The model of that type, built once a process: for tests that leave it as it was."""
    return build(model_type)


def prompt_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> Tensor:
    """Random token ids of (batch, seq), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)
