"""The naming families: one row each, with the Hugging Face classes that follow it."""

from __future__ import annotations

from nnatomy.arch_configs.config import ArchConfig

FAMILIES: tuple[ArchConfig, ...] = (
    ArchConfig(
        layers="model.layers",
        self_attn="self_attn",
        mlp="mlp",
        ln_final="model.norm",
        classes=(
            "CohereForCausalLM",
            "DeepseekV3ForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "GemmaForCausalLM",
            "Glm4ForCausalLM",
            "GptOssForCausalLM",
            "GraniteForCausalLM",
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "MixtralForCausalLM",
            "Olmo2ForCausalLM",
            "Phi3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
            "StableLmForCausalLM",
            "Starcoder2ForCausalLM",
        ),
    ),
    ArchConfig(
        layers="model.layers",
        self_attn="self_attn",
        mlp="mlp",
        ln_final="model.final_layernorm",
        classes=("PhiForCausalLM",),
    ),
    ArchConfig(
        layers="transformer.h",
        self_attn="attn",
        mlp="mlp",
        ln_final="transformer.ln_f",
        classes=("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM"),
    ),
    ArchConfig(
        layers="gpt_neox.layers",
        self_attn="attention",
        mlp="mlp",
        ln_final="gpt_neox.final_layer_norm",
        classes=("GPTNeoXForCausalLM",),
    ),
    ArchConfig(
        layers="transformer.h",
        self_attn="self_attention",
        mlp="mlp",
        ln_final="transformer.ln_f",
        classes=("BloomForCausalLM", "FalconForCausalLM"),
    ),
    ArchConfig(
        layers="transformer.blocks",
        self_attn="attn",
        mlp="ffn",
        ln_final="transformer.norm_f",
        classes=("MptForCausalLM",),
    ),
    ArchConfig(
        layers="model.decoder.layers",
        self_attn="self_attn",
        ln_final="model.decoder.final_layer_norm",
        absent={
            "mlp": "the MLP is two linears of the layer itself: use layers[i].fc1 and layers[i].fc2 "
            "(they see the tokens of all prompts in one axis: batch * seq)"
        },
        classes=("OPTForCausalLM",),
    ),
    # What a forward pass does not show: the stream is halved between some of the layers.
    ArchConfig(layers="rwkv.blocks", classes=("RwkvForCausalLM",)),
    # Nor that cross-attentions of a list of their own run between the layers.
    ArchConfig(layers="model.layers", classes=("IdeficsForVisionText2Text",)),
    # Of three language models in one, that whose stream the head reads.
    ArchConfig(layers="model.local_decoder.layers", classes=("BltForCausalLM",)),
    # No module is a layer: this is what ends one.
    ArchConfig(
        layers="transformer.layer_norm2",
        self_attn="transformer.attentions.*",
        mlp="transformer.ffns.*",
        classes=("XLMWithLMHeadModel",),
    ),
    ArchConfig(
        layers="model.H_module.layers",
        absent=dict.fromkeys(
            ("layer", "attention", "mlp"),
            "it is gone through several times in a forward pass, as are the layers of model.L_module: "
            "layers[i].calls[n] is each time",
        ),
        classes=("HrmTextForCausalLM",),
    ),
    # Nor what lies between the layers that run once and those that are gone through several times.
    ArchConfig(layers="model.layers", classes=("DoryForCausalLM", "Inkling2LoopForCausalLM")),
    ArchConfig(layers="model.language_model.layers", classes=("Inkling2LoopForConditionalGeneration",)),
    ArchConfig(
        layers="reformer.encoder.layers",
        absent={
            "layer": "the stream is two, of which each is changed by what is read of the other (reversible layers)",
            **dict.fromkeys(
                ("attention", "mlp", "token_embeddings"),
                "a prompt longer than a chunk is filled up to whole chunks, so that the last positions are none of the prompt's",
            ),
        },
        classes=("ReformerModelWithLMHead",),
    ),
    ArchConfig(
        layers="model.decoder.layers",
        absent=dict.fromkeys(("layer", "attention", "mlp"), "its hidden states are (seq, batch, hidden)"),
        classes=("FSMTForConditionalGeneration",),
    ),
    ArchConfig(
        layers="prophetnet.decoder.layers",
        absent=dict.fromkeys(
            ("layer", "attention", "mlp"),
            "behind the prompt's stream, on the axis of positions, are those of the tokens to come",
        ),
        classes=("ProphetNetForConditionalGeneration",),
    ),
)

#: What a class has to be given beside tokens, though the signature of its forward does not say so.
NEEDED: dict[str, tuple[str, ...]] = {
    "IdeficsForVisionText2Text": ("pixel_values", "image_attention_mask"),
    "Kosmos2ForConditionalGeneration": ("image_embeds_position_mask",),
    "UdopForConditionalGeneration": ("bbox",),
    "UdopStack": ("bbox",),
    "VoxtralRealtimeForConditionalGeneration": ("input_features",),
}

#: Classes that generate, and yet attend both ways within a prompt.
PREFIX_LMS = frozenset(("PaliGemmaForConditionalGeneration",))

#: Classes with an encoder and a decoder, of which their configs do not speak.
ENCODER_DECODERS = frozenset(("DiffusionGemmaForBlockDiffusion",))

#: Classes with several images for one prompt: (batch, image, channel, height, width).
SEVERAL_IMAGES = frozenset(("IdeficsForVisionText2Text", "InstructBlipVideoForConditionalGeneration"))
