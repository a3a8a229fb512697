"""What some types cannot do, and why."""

from __future__ import annotations

_ASSISTANT = (
    "it goes on from another model's embeddings, keys and values; "
    "raises ValueError: inputs_embeds and shared_kv_states cannot be None."
)
#: Types that do not run on token ids alone: the reason and, after "raises", the error of building or calling it.
REASONS: dict[str, str] = {
    "gemma3n": "its vision tower is one of timm's; raises ImportError: TimmWrapperModel requires",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}

_TIMM = "its vision tower is one of timm's; raises ImportError: TimmWrapperModel requires"
#: Other classes that cannot be built, in the same form.
NOT_BUILT: dict[str, str] = {
    "FastVlmForConditionalGeneration": _TIMM,
    "Gemma3nForConditionalGeneration": _TIMM,
    "PerceptionLMForConditionalGeneration": _TIMM,
}

#: Types in which a token changes the logits before it.
NOT_CAUSAL: dict[str, str] = {
    "cpmant": "a prompt is context, which is read in both directions",
    "prophetnet": "the relative position bias of the stream that predicts is laid out across positions",
    "xlnet": "its attention is bidirectional (it cannot generate with the other kind)",
}

#: Types of which not every weight can be asked whether it matters.
NO_GRADIENTS: dict[str, str] = {
    "mllama": "a layer of cross-attention is left out where there is no image",
    "reformer": "its backward pass is its own, for training alone",
    "rwkv": "it changes its state in place",
    "xlstm": "it changes its state in place",
}

#: Weights that the logits of token ids do not depend on, or only by a choice: parts of their names.
WITHOUT_GRADIENT = (
    *(
        "vision",
        "audio",
        "image_embed",
        "visual_projection",
        "multi_modal_projector",
        "vqmodel",
    ),  # other modalities
    *("encoder_attn", "cross_attn", "pooler"),  # of an encoder that is not there, for other tasks
    *("indexer", "correction_bias", "expert_bias", "patcher"),  # what chooses keys, experts, patches
    *("router.weight",),  # phimoe's, where one expert's share is all
    *("mask_emb", "r_s_bias", "seg_embed"),  # xlnet's, of inputs not given
    *("pronunciation_embed", "shape_embed"),  # roc_bert's, of inputs not given
    *("z_L_init",),  # hrm_text's, which replaces it at once
)

#: Other classes that nnatomy refuses: the reason, and what the error says.
REFUSED_CLASSES: dict[str, tuple[str, str]] = {
    "Llama4ForConditionalGeneration": (
        "in this release of Transformers its forward fails, with an image and without: it asks its language model for "
        "what that does not give (its `language_model` loads)",
        "it cannot be run .* no attribute 'image_outputs'",
    ),
    "PI0ForConditionalGeneration": (
        "it is a robot's policy, which is given a state and gives velocities, no logits of tokens",
        "missing 1 required positional argument: 'state'",
    ),
}
