"""The zoo's numbers: by the config's field names, and what only some types need."""

from __future__ import annotations

from typing import Any

LAYERS = 4
VOCAB = 83
WINDOW = 4
EXPERTS = 8

_BY_VALUE: list[tuple[Any, str]] = [
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (32, "hidden_size n_embd d_model emb_dim embedding_size embedding_dim"),
    (32, "word_embed_proj_dim hidden_size_global"),
    (32, "lru_width attention_hidden_size adapter_out_dim out_hidden_size"),
    (32, "projector_output_dim ple_embed_dim projector_input_dim vision_output_dim projection_hidden_size"),
    (
        32,
        "embed_dim text_hidden_size vision_hidden_size audio_hidden_size hidden_dim projection_dim base_channels",
    ),
    (32, "encoder_hidden_size image_token_embed_dim moe_hidden_size"),
    (48, "intermediate_size n_inner ffn_dim d_inner dff dim_ff d_ff ffn_hidden_size feed_forward_size"),
    (48, "encoder_ffn_dim decoder_ffn_dim dense_intermediate_size prefix_dense_intermediate_size mlp_dim"),
    (48, "projector_hidden_size projection_hidden_dim projection_intermediate_size"),
    (56, "intermediate_size_mlp"),
    (24, "moe_intermediate_size expert_ffn_hidden_size"),
    (40, "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    (40, "moe_shared_expert_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks"),
    (LAYERS, "num_encoder_layers num_decoder_layers layers"),
    (2, "depth"),
    ([0, 1], "deepstack_visual_indexes"),
    (64, "image_size"),
    (16, "patch_size num_image_tokens"),
    (4, "mm_tokens_per_image latent_query_num num_query_tokens"),
    (2, "pooling_kernel_size"),
    ([[128, 64]], "image_grid_pinpoints"),
    (64, "num_embeddings codebook_size"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    (4, "decoder_attention_heads num_encoder_attention_heads"),
    (4, "num_decoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads"),
    (16, "head_dim swa_head_dim attention_head_size d_head dim_head d_kv kv_channels attention_head_dim"),
    (24, "query_pre_attn_scalar"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size local_attention"),
    (WINDOW, "attention_chunk_size local_attention_window_len keep_window_size rel_extent"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts topk_group"),
    (4, "n_group num_expert_group"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
    (1, "moe_layer_start_index"),
    (LAYERS - 1, "moe_layer_end_index"),
    ([1], "mlp_only_layers"),
    (8, "q_lora_rank kv_lora_rank qk_rope_head_dim o_lora_rank gated_norm_rank hc_lowrank"),
    (8, "laurel_rank rotary_dim output_channels"),
    (6, "qk_nope_head_dim d_rel"),
    (10, "v_head_dim"),
    (8, "index_head_dim hidden_size_per_layer_input router_hidden_size time_step_rank mamba_dt_rank"),
    (3, "index_topk hc_mult hc_count altup_num_inputs"),
    (2, "index_n_heads index_block_size num_kv_shared_layers no_rope_layer_interval floor_scale o_groups"),
    (4, "chunk_size mamba_chunk_size block_size conv_kernel mamba_d_conv conv_kernel_size linear_num_heads"),
    (16, "mamba_d_state state_size ssm_state_size linear_head_dim linear_key_head_dim"),
    (8, "mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim linear_value_head_dim"),
    (64, "mamba_d_ssm"),
    (VOCAB - 2, "unpadded_vocab_size output_vocab_size"),
    (2, "mamba_n_groups n_groups mamba_ngroups linear_num_key_heads n_mamba_heads"),
    (4, "linear_num_value_heads"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions"),
    (64, "context_length model_max_length original_max_position_embeddings"),
    (True, "is_decoder attention_bias mlp_bias use_bias qkv_bias use_qkv_bias"),
    (True, "attention_out_bias lm_head_bias"),
    (True, "use_sliding_window scale_embedding mup_enabled norm_bias conv_bias"),
    (True, "mamba_proj_bias add_bias_linear projectors_bias bias mamba_rms_norm use_qk_norm"),
    (0.5, "log_scaling_alpha"),
    (2.0, "gate_soft_cap"),
    (8, "adapter_rank moe_latent_size"),
    (0.5, "residual_multiplier lm_head_multiplier full_attn_alpha_factor mlp_beta_factor"),
    (0.7, "attention_out_multiplier linear_attn_beta_factor"),
    (1.5, "key_multiplier ssm_out_multiplier attention_in_multiplier linear_attn_alpha_factor"),
    (1.7, "routed_scaling_factor route_scale router_scaling_factor moe_routed_scaling_factor"),
    (0.8, "ssm_in_multiplier full_attn_beta_factor mlp_alpha_factor"),
    (0.2, "attention_multiplier"),
    (0.25, "logit_scale"),
    (2.0, "embedding_multiplier embedding_scale clip_qkv moe_router_logit_softcapping qk_l2_clip_threshold"),
    (2.0, "logits_scaling logits_mup_width_multiplier"),
    (3.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    (1.0, "mlp_gate_softcap rel_l2_clip_threshold swiglu_limit"),
    (1.5, "mlp_up_softcap"),
    (5.0, "attn_logit_softcapping"),
    (0, "pad_token_id decoder_start_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
]
#: Config field -> its value, in every config and sub-config that has the field.
SIZES: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
#: The kinds of layer of a default config -> the kinds to have, where the defaults lack one.
KINDS: dict[frozenset[str], list[str]] = {
    frozenset({"sparse"}): ["dense", "sparse"],
    frozenset({"dense"}): ["dense", "sparse"],
    frozenset({_LINEAR}): [_LINEAR, _FULL],
    frozenset({_SLIDING}): [_SLIDING, _FULL],
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA4 = {
    "enable_moe_block": True,
    "attention_k_eq_v": True,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
}
_GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
_GEMMA4_PATCHES = {"pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}
_GEMMA4_UNIFIED = {"attention_k_eq_v": True, "global_head_dim": 24, "num_global_key_value_heads": 1}
_GEMMA3N = {"activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]}
_LLAMA4 = {"interleave_moe_layer_step": 2, "attn_scale": 0.5}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_DOTS3 = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 6,
}
_NO_EXTRAS = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": LAYERS,
}
_PLE = {
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 1,
    "heads_per_ngram": 2,
}
_AUDIO = {"num_codebooks": 1}

_IMAGE = {"image_size": 16, "patch_size": 4}
_TOKENIZER = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_CODES = range(8, 16)  # the ids of the tokens that images are made of
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "resolution": 16}  # 8 pixels to a token

_NARROW = {"downsample_channels": [16, 32]}
_START = {"vision_start_token_id": 14}  # in the checkpoints' configs, and no field of the class
_IN_WINDOWS = {"vision_config": {"window_size": 32}}  # of the image, in pixels

#: The types of the parts that a config has, where older releases do not say or say what does not run.
PARTS: dict[str, dict[str, str]] = {
    "diffusion_gemma": {"vision_config": "gemma4_vision"},
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "granite4_vision": {"text_config": "granite4_vision_text", "vision_config": "clip_vision_model"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "bert"},
}
_LOOP = {
    "log_scaling_n_floor": 2,
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "loop_gate_rank": 8,
}
_COMPASS_ROPE = _ROPE | {"mrope_section": [1, 1, 2]}

#: What only that type needs.
TYPE_CONFIGS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"codebook_size": len(_CODES)},
        "audio_config": {"codebook_size": len(_CODES), "hidden_size": 32, "codebook_dim": 32},
        "image_token_offset": min(_CODES),
        "audio_token_offset": max(_CODES) + 1,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}, "text_config": {"model_type": "aria_text"}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": LAYERS, "encoder_hash_byte_group_vocab": 100, "patching_threshold": 3.5},
    "chameleon": {
        "vq_config": _VQ | {"num_embeddings": len(_CODES)},
        "vocabulary_map": {"<image>": 3, **{f"IMGIMG{chr(57 + i)}Z": i for i in _CODES}},
    },
    "cohere_compass": {"text_config": {"rope_parameters": {_FULL: _COMPASS_ROPE, _SLIDING: _COMPASS_ROPE}}},
    "cohere_compass_text": {"rope_parameters": {_FULL: _COMPASS_ROPE, _SLIDING: _COMPASS_ROPE}},
    "deepseek_v4": {
        "layer_types": [_SLIDING, "heavily_compressed_attention", "compressed_sparse_attention", _SLIDING],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"] * 2},
        "vision_config": {"sam_config": _NARROW},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "mlp_bias": False},
        "audio_config": {"adapter_input_size": 32},
    },
    "dots3_note_text": _DOTS3,
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "ngpt_alpha_init": 0.3,
        "initializer_range": 1.0,
        "tie_word_embeddings": True,  # the random matrices of embeddings are larger, for logits that matter
    },
    "electra": {"embedding_size": 16},
    "encoder-decoder": {"encoder": {"is_decoder": False}, "decoder": {"add_cross_attention": True}},
    "emu3": {
        "vq_config": _VQ | {"codebook_size": len(_CODES)},
        "vocabulary_map": {
            "<image>": 3,
            "<|extra_200|>": 4,
            **{f"<|visual token {i - 8:06}|>": i for i in _CODES},
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [24, 16], "rope_parameters": {"mrope_section": [1, 1, 2]}}
    },
    "exaone4_5": _IN_WINDOWS,
    "falcon_h1": {"mlp_multipliers": [0.7, 1.3], "ssm_multipliers": [0.7, 1.3, 0.8, 1.2, 1.5]},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
        }
    },
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4, "vision_config": _GEMMA4_VISION},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4_UNIFIED, "vision_config": _GEMMA4_PATCHES},
    "gemma4_unified_text": _GEMMA4_UNIFIED,
    "gemma4_assistant": {"text_config": _NO_EXTRAS},
    "got_ocr2": {"vision_config": {"output_channels": 8, "image_size": 64}},
    "fsmt": {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_topk": 4, "index_kpool": 2}},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 0], [2, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
        "vision_config": {"hidden_size": 64},  # a head is of 64
        "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
    },
    "granite_swa": {"layer_rope_theta": [10000.0, 500.0] * 2},
    "granitemoe_swa": {"layer_rope_theta": [10000.0, 500.0] * 2},
    "helium": {"head_dim": 8},
    "inkling_mm_model": {"vision_config": {"patch_size": 4}},
    "hyperclovax_vision_v2": _IN_WINDOWS,
    "idefics": {"vision_config": _IMAGE | {"embed_dim": 32}},
    "inkling2_loop": {"text_config": _LOOP},
    "inkling2_loop_text": _LOOP,
    "inkling2_text": {"log_scaling_n_floor": 2, "n_layers_per_attn_res_block": 2},
    "inkling_text": {"log_scaling_n_floor": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
    },
    "janus": {"vision_config": {"use_qk_norm": False}},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 8, 4]},
    "lfm2": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm3_vl": {"vision_config": {"conv_kernel_size": 3}},
    "lighton_ocr": {"vision_config": {"head_dim": 8}},
    "llama4": {
        "text_config": _LLAMA4,
        "vision_config": {"intermediate_size": 128, "projector_input_dim": 32},
    },
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": {"scale_emb": 3, "dim_model_base": 16},
    "minimax_m3_vl_text": {"layer_types": [_FULL, "minimax_m3_sparse"] * 2, "index_topk_blocks": 2},
    "mistral4": {"head_dim": 14},
    "mistral3": {"vision_config": {"head_dim": 8}},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 96,
            "num_global_layers": 2,
        },
    },
    "molmo2": {
        "image_patch_id": 3,
        "vision_config": {"image_size": [64, 64]},
        "adapter_config": {"vision_feature_layer": [2, 0]},
    },
    "mpt": {"attn_config": {"softmax_scale": 0.2, "qk_ln": True}},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"hidden_sizes": [8, 16, 16, 32], "patch_sizes": [4, 2, 2, 2]},
    },
    "musicgen": {"decoder": _AUDIO},
    "musicgen_melody": {"decoder": _AUDIO},
    "nemo_speechlm": {"text_config": {"hybrid_override_pattern": "ME*-"}},
    "nemotron_h_omni": {"audio_config": None},
    "omniasr": {
        "audio_config": {
            "conv_dim": [16, 16],
            "conv_kernel": [4, 4],
            "conv_stride": [2, 2],
            "num_conv_pos_embeddings": 8,
        }
    },
    "opt": {"word_embed_proj_dim": 16},
    "paddleocr_vl": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}}},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "bias_max_distance": 10,
        }
    },
    "pix2struct": {
        "text_config": {"d_kv": 8},
        "vision_config": {"d_kv": 8, "patch_embed_hidden_size": 12, "seq_len": 16},
    },
    "pp_formulanet": {
        "vision_config": {
            "image_size": 64,
            "output_channels": 8,
            "post_conv_in_channels": 8,
            "post_conv_mid_channels": 8,
            "post_conv_out_channels": 16,
            "decoder_hidden_size": 32,
        }
    },
    "qwen2_5_omni_thinker": _IN_WINDOWS | _START,
    "qwen2_5_vl": _IN_WINDOWS,
    "qwen3_omni_moe_thinker": _START,
    "qwen4_exp": {"text_config": _QSA | _PLE},
    "qwen4_exp_text": _QSA | _PLE,
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 24),
        "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 16,  # longer than prompts: with shorter ones it cannot generate from its cache
        "num_buckets": 4,
        "hash_seed": 1,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "shape_vocab_size": VOCAB,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "roformer": {"embedding_size": 16},
    "rwkv": {"rescale_every": 2},
    "vision-encoder-decoder": {"encoder": _IMAGE, "decoder": {"add_cross_attention": True}},
    "unlimited_ocr": {"vision_config": {"sam_config": _NARROW}},
    "vibevoice_asr": {
        "semantic_tokenizer_encoder_config": _TOKENIZER,
        "acoustic_tokenizer_encoder_config": _TOKENIZER,
    },
    "vipllava": {"vision_feature_layers": [-1, -2, 1]},
    "xlm": {"causal": True},
    "xlnet": {"d_head": 8, "attn_type": "bi"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # its embeddings are tied, and loading makes padding's row 0
    "zamba": {
        "layers_block_type": [_LINEAR, "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": [_LINEAR, "hybrid"] * 2,
        "num_mem_blocks": 2,
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}
