"""Tiny random models that read sound, each with its family's own processor over a tiny tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
import zoo
from image_families import pil, tokenizer, with_ids
from torch import nn

RATE = 16_000
_WHISPER: Any = {"num_mel_bins": 16, "max_source_positions": 100}


def sound(seed: int = 0, frames: int = 128) -> Any:
    """Noise, of so many frames of 10 ms."""
    return (np.random.default_rng(seed).random(frames * RATE // 100) - 0.5).astype(np.float32)


def _features() -> Any:
    """Whisper's, which fills sounds up to two seconds."""
    return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)


def qwen2_audio() -> tuple[nn.Module, Any]:
    hf = zoo.build_class("Qwen2AudioForConditionalGeneration", "qwen2_audio", audio_config=_WHISPER)
    words = tokenizer(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    processor = transformers.Qwen2AudioProcessor(_features(), words)
    return with_ids(hf, processor, audio_token_id="<|AUDIO|>", audio_token_index="<|AUDIO|>")


def flamingo(name: str, kind: str) -> tuple[nn.Module, Any]:
    hf = zoo.build_class(f"{name}ForConditionalGeneration", kind, audio_config=_WHISPER)
    words = tokenizer(audio_token="<sound>", begin="<|sound_bos|>", end="<|sound_eos|>")
    return with_ids(hf, getattr(transformers, f"{name}Processor")(_features(), words), audio_token_id="<sound>")


def glmasr() -> tuple[nn.Module, Any]:
    hf = zoo.build_class(
        "GlmAsrForConditionalGeneration", "glmasr", audio_config={**_WHISPER, "intermediate_size": 128}
    )
    processor = transformers.GlmAsrProcessor(_features(), tokenizer(audio_token="<|pad|>"))
    return with_ids(hf, processor, audio_token_id="<|pad|>")


def omni() -> tuple[nn.Module, Any]:
    """The thinker, of images and sound."""
    sizes = {**_WHISPER, "n_window": 50, "output_dim": 32}
    hf = zoo.build_class("Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni_thinker", audio_config=sizes)
    vision = hf.config.vision_config
    images = pil(
        "qwen2_vl",
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=1,
        max_pixels=100 * vision.patch_size**2,
    )
    kinds = ("image", "video", "audio")
    words = tokenizer(
        **{f"{kind}_token": f"<|{kind.upper()}|>" for kind in kinds},
        **{f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")},
    )
    with pytest.MonkeyPatch.context() as patch:  # the part for videos, which needs torchvision, is left out
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        processor = transformers.Qwen2_5OmniProcessor(images, None, _features(), words)
    ids = {f"{kind}_token_{end}": f"<|{kind.upper()}|>" for kind in kinds for end in ("id", "index")}
    begins = {"vision_start_token_id": "<|vision_bos|>", "audio_start_token_id": "<|audio_bos|>"}
    return with_ids(hf, processor, **ids, **begins)


def gemma4() -> tuple[nn.Module, Any]:
    """Of images and sound."""
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "subsampling_conv_channels": [128, 4],
        "output_proj_dims": 32,
    }
    hf = zoo.build_class("Gemma4ForConditionalGeneration", "gemma4", audio_config=sizes)
    words = tokenizer(
        image_token="<patch>",
        boi_token="<begin>",
        eoi_token="<end>",
        audio_token="<sound>",
        boa_token="<hear>",
        eoa_token="<heard>",
    )
    vision = hf.config.vision_config
    images = pil("gemma4", patch_size=vision.patch_size, pooling_kernel_size=2, max_soft_tokens=70)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        processor = transformers.Gemma4Processor(Gemma4AudioFeatureExtractor(), images, words, None)
    return with_ids(hf, processor, image_token_id="<patch>", audio_token_id="<sound>", video_token_id="<|video|>")


def whisper() -> tuple[nn.Module, Any]:
    """Whose encoder reads sound: it is no positions of a prompt."""
    hf = zoo.build_class("WhisperForConditionalGeneration", "whisper", **_WHISPER)
    return hf, transformers.WhisperProcessor(_features(), tokenizer())


#: Those of which a sound is positions of a prompt.
FAMILIES = {
    "qwen2_audio": qwen2_audio,
    "audioflamingo3": lambda: flamingo("AudioFlamingo3", "audioflamingo3"),
    "musicflamingo": lambda: flamingo("MusicFlamingo", "musicflamingo"),
    "glmasr": glmasr,
    "qwen2_5_omni": omni,
    "gemma4": gemma4,
}
