"""Tiny random pipelines of diffusers, built from their config classes: nothing is downloaded. Weights are large enough to matter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from nnatomy.diffusion import DiffusionTransformer

PROMPT = "a photo of a cat"
WORDS = "a photo of cat dog sitting on the red blue table two birds in sky big small tree car".split()
WIDTH = 32


@cache
def tokenizer(length: int, begins: bool = True) -> PreTrainedTokenizerFast:
    """Of whole words; with a token for the beginning (as CLIP's) or without (as T5's)."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if begins else "$A </s>"
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=length,
    )


def clip(projection: bool = False, length: int = 12) -> Any:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=37,
        projection_dim=WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=length,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return lively((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(width: int = WIDTH) -> Any:
    torch.manual_seed(1)
    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)
    return lively(T5EncoderModel(config))


def language_model(name: str, **others: Any) -> Any:
    """Of two layers, whose last states are what a pipeline reads: "Gemma2", ..."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **others})
    return lively(getattr(transformers, f"{name}Model")(config))


def vae(latent_channels: int = 4, blocks: int = 1) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=latent_channels,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
        shift_factor=0.1,
        scaling_factor=0.9,
        sample_size=16,
    ).eval()


def lively(module: Any, std: float = 0.15) -> Any:
    """With weights that make the values inside matter; modulations and biases, which begin at zero, too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else noise)
    return module.eval()


def of_parts(pipeline: str, transformer: Any, **others: Any) -> Any:
    """A pipeline of that transformer; by default with a T5 and its tokenizer, the common decoder, and flow matching."""
    parts = {
        "vae": vae,
        "text_encoder": t5,
        "tokenizer": lambda: tokenizer(20, False),
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    made = {name: others.pop(name) if name in others else make() for name, make in parts.items()}
    return getattr(diffusers, f"{pipeline}Pipeline")(transformer=lively(transformer), **made, **others)


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(12),
        unet=lively(unet, 0.1),
        scheduler=DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return of_parts(
        "PixArtAlpha",
        transformer,
        tokenizer=tokenizer(120, False),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def dit() -> Any:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
    )
    return DiTPipeline(transformer=lively(transformer), vae=vae(), scheduler=DDIMScheduler(clip_sample=False))


def sd3(dual: bool = False) -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return of_parts(
        "StableDiffusion3",
        transformer,
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(12),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(12),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=tokenizer(20, False),
    )


def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return of_parts(
        "Flux",
        transformer,
        text_encoder=clip(),
        tokenizer=tokenizer(12),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(20, False),
    )


def sdxl() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=tokenizer(12),
        tokenizer_2=tokenizer(12),
        unet=lively(unet, 0.1),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear"
        ),  # it scales what the denoiser is given
        add_watermarker=False,
    )


def pixart_sigma() -> Any:
    return of_parts("PixArtSigma", pixart().transformer, scheduler=diffusers.DPMSolverMultistepScheduler())


def aura_flow() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return of_parts("AuraFlow", transformer)


def chroma() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=WIDTH,
        approximator_layers=1,
    )
    return of_parts("Chroma", transformer)


def cogview4() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(64, 64),
    )
    return of_parts(
        "CogView4",
        transformer,
        tokenizer=tokenizer(20),
        text_encoder=language_model("Glm", num_key_value_heads=4, head_dim=8, eos_token_id=2),
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )


def lumina2() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cap_feat_dim=WIDTH,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(300, 64, 64),
    )
    return of_parts(
        "Lumina2",
        transformer,
        text_encoder=language_model("Gemma2", num_key_value_heads=2, head_dim=8),
        tokenizer=tokenizer(60),
    )


def sana() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
    )
    decoder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()
    return of_parts(
        "Sana",
        transformer,
        tokenizer=tokenizer(300),
        text_encoder=language_model("Gemma2", num_key_value_heads=2, head_dim=8),
        vae=decoder,
    )


def wan() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    return of_parts(
        "Wan",
        transformer,
        vae=decoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def cogvideox() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    decoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return of_parts(
        "CogVideoX",
        transformer,
        vae=decoder,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def ltx() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=WIDTH,
    )
    decoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    decoder.use_framewise_encoding = decoder.use_framewise_decoding = False
    return of_parts("LTX", transformer, vae=decoder)


def hunyuan_dit() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        hidden_size=32,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    return of_parts(
        "HunyuanDiT",
        transformer,
        text_encoder=language_model("Bert"),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(20, False),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def chatty(length: int) -> PreTrainedTokenizerFast:
    """One with a chat template."""
    one = tokenizer.__wrapped__(length)
    one.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return one


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return of_parts(
        "ZImage",
        transformer,
        text_encoder=language_model("Qwen3", num_hidden_layers=3, num_key_value_heads=2, head_dim=8),
        tokenizer=chatty(20),
    )


def qwen_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 32,
            "hidden_size": WIDTH,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return of_parts(
        "QwenImage",
        transformer,
        vae=decoder,
        text_encoder=lively(transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer(60),
    )


#: What the tests of names, edits and methods run on: a U-Net, and a transformer of each kind.
PIPELINES: dict[str, Callable[[], Any]] = {
    "stable_diffusion": stable_diffusion,
    "pixart": pixart,
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
}
#: All in the table of docs/diffusion.md.
ALL: dict[str, Callable[[], Any]] = {
    **PIPELINES,
    "sdxl": sdxl,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "aura_flow": aura_flow,
    "chroma": chroma,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "wan": wan,
    "cogvideox": cogvideox,
    "ltx": ltx,
    "hunyuan_dit": hunyuan_dit,
    "z_image": z_image,
    "qwen_image": qwen_image,
}


@cache
def loaded(name: str) -> DiffusionTransformer:
    """A pipeline of the table, loaded once for all tests of a process."""
    return DiffusionTransformer(quiet(ALL[name]()))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(model: DiffusionTransformer, steps: int = 3, guided: bool = True, **more: Any) -> dict[str, Any]:
    """Those of a small call, always with the same noise."""
    known = inspect.signature(type(model.pipeline).__call__).parameters
    wanted: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(4),
        "guidance_scale": 4.0 if guided else 1.0,
        "output_type": "pt" if "class_labels" in known else "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 64,
        "height": 16,
        "width": 16,
    }
    wanted |= {"class_labels": [7]} if "class_labels" in known else {"prompt": PROMPT}
    if guided and "true_cfg_scale" in known:
        wanted |= {"true_cfg_scale": 4.0, "negative_prompt": "two birds"}
    return {**{key: value for key, value in wanted.items() if key in known}, **more}
